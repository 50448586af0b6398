"""Masked sums against numpy on whole splits; the record files; the progress line."""

import io
import json
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from tensorboardX.proto import event_pb2

from one_jax import metrics, progress
from one_jax.errors import UserError

prediction_sums = jax.jit(metrics.prediction_sums, static_argnames='num_bins')


def numpy_measures(logits, labels, num_bins=15):
    """The four measures of one predictor, [N, C], example by example and from the definitions."""
    logits = logits.astype(np.float64)
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    # A stable sort of the negated logits: the lower class first among equals.
    ranks = np.argsort(-logits, axis=1, kind='stable')
    correct = ranks[:, 0] == labels
    confidence = probabilities.max(axis=1)
    ece = 0.0
    for lower in range(num_bins):
        inside = (confidence > lower / num_bins) & (confidence <= (lower + 1) / num_bins)
        if inside.any():
            gap = correct[inside].mean() - confidence[inside].mean()
            ece += inside.mean() * abs(gap)
    return {
        'top1': 100 * correct.mean(),
        'top5': 100 * np.mean([label in row[:5] for label, row in zip(labels, ranks, strict=True)]),
        'nll': -np.log(probabilities[np.arange(len(labels)), labels]).mean(),
        'ece': 100 * ece,
    }


def random_split(num_predictors=2, num_examples=300, num_classes=10, seed=0):
    rng = np.random.default_rng(seed)
    logits = 3 * rng.normal(size=(num_predictors, num_examples, num_classes)).astype(np.float32)
    labels = rng.integers(num_classes, size=num_examples)
    logits[:, np.arange(num_examples), labels] += 2
    return logits, labels


@pytest.mark.parametrize('batch_size', [300, 64])
@pytest.mark.parametrize('num_classes', [10, 3])
def test_measures_against_numpy(batch_size, num_classes):
    """Also in batches of which the last is padded with garbage: the result is that of the split."""
    logits, labels = random_split(num_classes=num_classes)
    sums = []
    for start in range(0, len(labels), batch_size):
        part = slice(start, start + batch_size)
        padding = batch_size - len(labels[part])
        sums.append(
            prediction_sums(
                np.pad(logits[:, part], ((0, 0), (0, padding), (0, 0)), constant_values=np.nan),
                np.pad(labels[part], (0, padding), constant_values=-7),
                np.pad(np.ones(len(labels[part])), (0, padding)),
            )
        )
    summary = metrics.summarise(metrics.add_sums(sums))
    for predictor in range(len(logits)):
        for name, expected in numpy_measures(logits[predictor], labels).items():
            np.testing.assert_allclose(summary[name][predictor], expected, rtol=1e-5, err_msg=name)


def test_leading_dimensions_are_kept():
    logits, labels = random_split(num_predictors=6)
    mask = np.ones(len(labels), bool)
    grid = metrics.summarise(prediction_sums(logits.reshape(2, 3, *logits.shape[1:]), labels, mask))
    flat = metrics.summarise(prediction_sums(logits, labels, mask))
    single = metrics.summarise(prediction_sums(logits[4], labels, mask))
    for name in ('top1', 'top5', 'nll', 'ece'):
        np.testing.assert_allclose(np.ravel(grid[name]), flat[name], rtol=1e-6)
        assert isinstance(single[name], float)
        np.testing.assert_allclose(single[name], flat[name][4], rtol=1e-6)


def test_ties_go_to_the_lower_class():
    logits = jnp.zeros((8, 8))
    sums = prediction_sums(logits, np.arange(8), np.ones(8))
    assert (sums['top1'], sums['top5']) == (1, 5)
    np.testing.assert_allclose(metrics.summarise(sums)['nll'], np.log(8), rtol=1e-6)


def test_calibration_in_closed_form():
    """Four predictions at probability 0.9 with three right, one at 1.0 that is wrong."""
    logits = np.log(np.array([[0.9, 0.1]] * 4 + [[1.0, 1e-30]], np.float32))
    sums = prediction_sums(logits, np.array([0, 0, 0, 1, 1]), np.ones(5))
    np.testing.assert_allclose(sums['bin_examples'], [0] * 13 + [4, 1])
    np.testing.assert_allclose(sums['bin_correct'], [0] * 13 + [3, 0])
    ece = metrics.summarise(sums)['ece']
    np.testing.assert_allclose(ece, 100 * (4 / 5 * 0.15 + 1 / 5 * 1.0), rtol=1e-5)


def test_number_of_bins():
    logits, labels = random_split(num_predictors=1)
    sums = prediction_sums(logits[0], labels, np.ones(len(labels)), num_bins=4)
    expected = numpy_measures(logits[0], labels, num_bins=4)
    np.testing.assert_allclose(metrics.summarise(sums)['ece'], expected['ece'], rtol=1e-5)


def test_sums_over_devices():
    """Inside `shard_map`, where the last device has padding only."""
    logits, labels = random_split(num_examples=16)
    mask = np.arange(16) < 11
    mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(
        lambda *batch: jax.lax.psum(metrics.prediction_sums(*batch), 'data'),
        mesh=mesh,
        in_specs=(P(None, 'data'), P('data'), P('data')),
        out_specs=P(),
    )
    summary = metrics.summarise(jax.jit(sharded)(logits, labels, mask))
    for name, expected in numpy_measures(logits[1, :11], labels[:11]).items():
        np.testing.assert_allclose(summary[name][1], expected, rtol=1e-5, err_msg=name)


def test_sums_do_not_lose_small_batches():
    """A million batches' worth of counts, then one example: float32 would not notice it."""
    many = {'examples': np.float32(2**25), 'top1': np.float32(2**25)}
    one = {'examples': np.float32(1), 'top1': np.float32(0)}
    # As a Python float: compared in float32, the two numbers are equal.
    assert float(metrics.add_sums([many, one])['examples']) == 2**25 + 1


def test_no_examples():
    logits, labels = random_split(num_examples=4)
    with pytest.raises(UserError, match='no examples'):
        metrics.summarise(prediction_sums(logits, labels, np.zeros(4)))
    with pytest.raises(UserError, match='no examples'):
        metrics.add_sums([])


def read_events(directory):
    """The scalars in all event files: {tag: [(step, value)]}, and the steps of restarts."""
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


def test_records(tmp_path):
    with metrics.RecordWriter(tmp_path) as writer:
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
    assert metrics.read_records(tmp_path) == [record]
    scalars, _ = read_events(tmp_path)
    assert scalars.pop('train/images_per_second') == [(3, 1234.0)]
    assert scalars.pop('train/gate_weights/1') == [(3, 0.5)]
    assert scalars.pop('train/loss') == [(3, 0.25)]
    assert np.isnan(scalars.pop('train/broken/0')[0][1])
    assert set(scalars) == {'train/gate_weights/0', 'train/broken/1', 'train/infinite'}


@pytest.mark.parametrize(
    'damage', [b'', b'{"step": 9, "epo', b'\x00\xff\x00\n\x93', b'[1]\n', b'5']
)
def test_resumed_file_equals_the_uninterrupted(tmp_path, damage):
    whole, resumed = tmp_path / 'whole', tmp_path / 'resumed'
    with metrics.RecordWriter(whole) as writer:
        write_steps(writer, range(1, 11))
    with metrics.RecordWriter(resumed) as writer:
        write_steps(writer, range(1, 8))
    with (resumed / 'metrics.jsonl').open('ab') as file:
        file.write(damage)
    with metrics.RecordWriter(resumed, resume_step=4) as writer:
        write_steps(writer, range(5, 11))
    expected = (whole / 'metrics.jsonl').read_bytes()
    assert (resumed / 'metrics.jsonl').read_bytes() == expected
    assert not list(resumed.glob('.metrics*'))
    scalars, restarts = read_events(resumed)
    # TensorBoard drops what it has from step 5 on, and gets it again.
    assert restarts == [0, 5]
    assert [step for step, _ in scalars['train/loss']] == [*range(1, 8), *range(5, 11)]


def test_record_without_its_line_end_is_whole(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text('{"step": 1}\n{"step": 2}')
    metrics.RecordWriter(tmp_path, resume_step=2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_start_afresh(tmp_path):
    with metrics.RecordWriter(tmp_path) as writer:
        write_steps(writer, range(1, 4))
    metrics.RecordWriter(tmp_path).close()
    assert (tmp_path / 'metrics.jsonl').read_bytes() == b''


def test_read_records_of_a_damaged_file(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st\xc3')
    assert metrics.read_records(path) == [{'step': 1}, {'step': 2}]
    with pytest.raises(UserError, match='nowhere'):
        metrics.read_records(tmp_path / 'nowhere')


def test_import_without_tensorflow():
    code = 'import sys, one_jax.metrics; sys.exit("tensorflow" in sys.modules)'
    subprocess.run([sys.executable, '-c', code], check=True)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def make_progress(stream):
    """A progress whose clock the test turns: it returns both."""
    now = [0.0]
    return progress.Progress(100, 32, start_step=20, stream=stream, clock=lambda: now[0]), now


def test_progress_lines():
    stream = io.StringIO()
    progress, now = make_progress(stream)
    now[0] = 10.0
    progress.update(40)
    assert stream.getvalue() == ''
    assert progress.log(40, 2.0, 0.5) == 64.0
    with progress.paused():
        now[0] = 30.0
    now[0] = 40.0
    # Twenty steps in ten seconds without the pause. With it, one a second: 40 s for 40 steps.
    assert progress.log(60, 3.0, 0.25) == 64.0
    progress.message('test top-1 97.1 %')
    progress.close()
    first, second, third = stream.getvalue().splitlines()
    assert first == 'step 40/100  epoch 2.00  loss 0.5000  64 images/s  00:30 left'
    assert second == 'step 60/100  epoch 3.00  loss 0.2500  64 images/s  00:40 left'
    assert third == 'test top-1 97.1 %'


def test_progress_bar():
    stream = Terminal()
    progress, now = make_progress(stream)
    now[0] = 10.0
    assert progress.log(40, 2.0, 0.5) == 64.0
    progress.message('a line of its own')
    progress.update(100)
    progress.close()
    shown = stream.getvalue()
    assert '40/100' in shown
    assert 'loss 0.5000, 64 images/s' in shown
    assert 'a line of its own\n' in shown
    assert '100%' in shown.splitlines()[-1]
