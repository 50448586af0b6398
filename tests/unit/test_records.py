"""metrics.jsonl and TensorBoard events."""

import json
import os
import signal
import struct
import subprocess
import sys
import time

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


def assert_events_equal_records(directory):
    """Every scalar of metrics.jsonl is in the events once, in order, and no other."""
    expected = {}
    for record in records.read_records(directory):
        for name, entry in record.items():
            if name in ('step', 'epoch', 'split'):
                continue
            for index, value in np.ndenumerate(np.asarray(entry, np.float32)):
                tag = '/'.join([record['split'], name, *map(str, index)])
                expected.setdefault(tag, []).append((record['step'], value))
    scalars, restarts = read_events(directory)
    assert restarts == [0]  # What a TensorBoard that is open drops.
    assert scalars == expected


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
    assert_events_equal_records(resumed)


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


OTHERS = ('events.out.tfevents.1700000000.host', 'events.out.tfevents.1700000000.host.12345.0.v2')
EARLIER = 'events.out.tfevents.1700000000.host.1700000000123456789'


def test_record_writer_resumed_with_the_clock_set_back_replaces_only_its_own_events(
    tmp_path, monkeypatch
):
    for name in (*OTHERS, EARLIER):
        (tmp_path / name).write_bytes(b'')
    with records.RecordWriter(tmp_path) as writer:
        write_steps(writer, range(1, 8))
    now, now_ns = time.time(), time.time_ns()
    monkeypatch.setattr(time, 'time', lambda: now - 1e8)
    monkeypatch.setattr(time, 'time_ns', lambda: now_ns - 10**17)
    with records.RecordWriter(tmp_path, resume_step=4) as writer:
        write_steps(writer, range(5, 11))
    found = {path.name for path in tmp_path.glob('events.*')}
    assert set(OTHERS) < found
    assert len(found) == len(OTHERS) + 1
    for name in OTHERS:
        (tmp_path / name).unlink()
    assert_events_equal_records(tmp_path)


def test_record_writer_resumed_without_its_records_keeps_the_events(tmp_path):
    with records.RecordWriter(tmp_path) as writer:
        write_steps(writer, range(1, 8))
    (tmp_path / 'metrics.jsonl').unlink()
    records.RecordWriter(tmp_path, resume_step=7).close()
    assert [step for step, _ in read_events(tmp_path)[0]['train/loss']] == [*range(1, 8)]


KILLED = """
import os, signal, sys
from one_jax.runtime import records
writer = records.RecordWriter(sys.argv[1])
for step in range(1, 4):
    writer.write(step, step / 4, 'test', {'top1': step})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_record_writer_killed_after_a_write_has_lost_nothing(tmp_path):
    process = subprocess.run([sys.executable, '-c', KILLED, str(tmp_path)], check=False)
    assert process.returncode == -signal.SIGKILL
    assert_events_equal_records(tmp_path)
    assert read_events(tmp_path)[0] == {'test/top1': [(1, 1.0), (2, 2.0), (3, 3.0)]}


@pytest.mark.parametrize(
    'line',
    [
        b'{"step": 2.5}',
        b'{"step": true}',
        b'{"step": 2, "loss": "x"}',
        b'{"step": 2, "loss": [[1]]}',
        b'{"step": 2, "loss": {"a": 1}}',
        b'{"step": 2, "loss": 1' + 400 * b'0' + b'}',
        b'{"step": 2, "split": "\\u001b[31m"}',
        b'[' * 100_000,
        b'{"step": 2, "loss": "\xff"}',
    ],
)
def test_read_records_skips_lines_of_another_kind(tmp_path, line):
    path = tmp_path / 'metrics.jsonl'
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3, "loss": [null, 1]}\n')
    assert records.read_records(path) == [{'step': 1}, {'step': 3, 'loss': [None, 1]}]
    records.RecordWriter(tmp_path, resume_step=3).close()
    assert path.read_bytes() == b'{"step": 1}\n{"step": 3, "loss": [null, 1]}\n'


def test_read_records_of_a_pipe_is_an_error(tmp_path):
    os.mkfifo(tmp_path / 'metrics.jsonl')
    with pytest.raises(UserError, match='is not a regular file'):
        records.read_records(tmp_path)
