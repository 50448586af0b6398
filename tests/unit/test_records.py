"""metrics.jsonl and TensorBoard events."""

import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from one_jax.errors import UserError
from one_jax.runtime import records


def read_events(directory):
    """Reads all event files: {tag: [(step, value)]}, and the steps of restarts."""
    scalars, restarts = {}, []
    for path in sorted(directory.glob('events.out.tfevents.*')):
        content = path.read_bytes()
        # TFRecord framing: length, its checksum, the event, its checksum.
        while content:
            (length,) = struct.unpack('<Q', content[:8])
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.HasField('session_log'):
                restarts.append(event.step)
            for value in event.summary.value:
                scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
    return scalars, restarts


def write_steps(writer, steps):
    for step in steps:
        writer.write(step, step / 4, 'train', {'loss': np.float32(1 / step)})
        if step % 4 == 0:
            writer.write(step, step / 4, 'test', {'branch_top1': [90.0 + step, 91.0]})


def test_record_writer_writes_json_lines_and_events(tmp_path):
    with records.RecordWriter(tmp_path) as writer:
        writer.write(
            3,
            0.5,
            'train',
            {
                'loss': jnp.float32(0.25),
                'gate_weights': jnp.array([0.5, 0.5], jnp.bfloat16),
                'broken': [np.nan, 1.0],
                'infinite': np.inf,
                'teacher_top1': None,
            },
            timing={'images_per_second': 1234.0},
        )
        # Readable by another process at once, before the writer is closed.
        lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
    record = {
        'step': 3,
        'epoch': 0.5,
        'split': 'train',
        'loss': 0.25,
        'gate_weights': [0.5, 0.5],
        'broken': [None, 1.0],
        'infinite': None,
    }
    assert [json.loads(line) for line in lines] == [record]
    assert records.read_records(tmp_path) == [record]
    scalars, _ = read_events(tmp_path)
    assert scalars.pop('train/images_per_second') == [(3, 1234.0)]
    assert scalars.pop('train/gate_weights/1') == [(3, 0.5)]
    assert scalars.pop('train/loss') == [(3, 0.25)]
    assert np.isnan(scalars.pop('train/broken/0')[0][1])
    assert set(scalars) == {'train/gate_weights/0', 'train/broken/1', 'train/infinite'}


@pytest.mark.parametrize(
    'damage', [b'', b'{"step": 9, "epo', b'\x00\xff\x00\n\x93', b'[1]\n', b'5']
)
def test_record_writer_resumed_after_damage_equals_uninterrupted(tmp_path, damage):
    whole, resumed = tmp_path / 'whole', tmp_path / 'resumed'
    with records.RecordWriter(whole) as writer:
        write_steps(writer, range(1, 11))
    with records.RecordWriter(resumed) as writer:
        write_steps(writer, range(1, 8))
    with (resumed / 'metrics.jsonl').open('ab') as file:
        file.write(damage)
    with records.RecordWriter(resumed, resume_step=4) as writer:
        write_steps(writer, range(5, 11))
    expected = (whole / 'metrics.jsonl').read_bytes()
    assert (resumed / 'metrics.jsonl').read_bytes() == expected
    assert not list(resumed.glob('.metrics*'))
    scalars, restarts = read_events(resumed)
    # TensorBoard drops what it has from step 5 on, and gets it again.
    assert restarts == [0, 5]
    assert [step for step, _ in scalars['train/loss']] == [*range(1, 8), *range(5, 11)]


def test_record_writer_last_record_without_line_end_is_kept(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text('{"step": 1}\n{"step": 2}')
    records.RecordWriter(tmp_path, resume_step=2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_record_writer_without_resume_step_starts_anew(tmp_path):
    with records.RecordWriter(tmp_path) as writer:
        write_steps(writer, range(1, 4))
    records.RecordWriter(tmp_path).close()
    assert (tmp_path / 'metrics.jsonl').read_bytes() == b''


def test_read_records_skips_half_lines(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st\xc3')
    assert records.read_records(path) == [{'step': 1}, {'step': 2}]
    with pytest.raises(UserError, match='nowhere'):
        records.read_records(tmp_path / 'nowhere')
