"""Masked sums of an evaluation, against NumPy on whole splits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from one_jax import metrics
from one_jax.errors import UserError

prediction_sums = jax.jit(metrics.prediction_sums, static_argnames='num_bins')


def numpy_measures(logits, labels, num_bins=15):
    """Computes the measures of logits [N, C] example by example, from the definitions."""
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


def random_split(num_outputs=2, num_examples=300, num_classes=10, seed=0):
    rng = np.random.default_rng(seed)
    logits = 3 * rng.normal(size=(num_outputs, num_examples, num_classes)).astype(np.float32)
    labels = rng.integers(num_classes, size=num_examples)
    logits[:, np.arange(num_examples), labels] += 2
    return logits, labels


@pytest.mark.parametrize('batch_size', [300, 64])
@pytest.mark.parametrize('num_classes', [10, 3])
def test_summary_of_padded_batches_equals_numpy_on_the_split(batch_size, num_classes):
    """The last batch is padded with garbage."""
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
    for output in range(len(logits)):
        for name, expected in numpy_measures(logits[output], labels).items():
            np.testing.assert_allclose(summary[name][output], expected, rtol=1e-5, err_msg=name)


def test_summary_keeps_leading_dimensions():
    logits, labels = random_split(num_outputs=6)
    mask = np.ones(len(labels), bool)
    grid = metrics.summarise(prediction_sums(logits.reshape(2, 3, *logits.shape[1:]), labels, mask))
    flat = metrics.summarise(prediction_sums(logits, labels, mask))
    single = metrics.summarise(prediction_sums(logits[4], labels, mask))
    for name in ('top1', 'top5', 'nll', 'ece'):
        np.testing.assert_allclose(np.ravel(grid[name]), flat[name], rtol=1e-6)
        assert isinstance(single[name], float)
        np.testing.assert_allclose(single[name], flat[name][4], rtol=1e-6)


def test_prediction_sums_of_equal_logits_rank_the_lower_class_higher():
    logits = jnp.zeros((8, 8))
    sums = prediction_sums(logits, np.arange(8), np.ones(8))
    assert (sums['top1'], sums['top5']) == (1, 5)
    np.testing.assert_allclose(metrics.summarise(sums)['nll'], np.log(8), rtol=1e-6)


def test_calibration_error_has_its_closed_form():
    """Four predictions at probability 0.9 with three right, one at 1.0 that is wrong."""
    logits = np.log(np.array([[0.9, 0.1]] * 4 + [[1.0, 1e-30]], np.float32))
    sums = prediction_sums(logits, np.array([0, 0, 0, 1, 1]), np.ones(5))
    np.testing.assert_allclose(sums['bin_examples'], [0] * 13 + [4, 1])
    np.testing.assert_allclose(sums['bin_correct'], [0] * 13 + [3, 0])
    ece = metrics.summarise(sums)['ece']
    np.testing.assert_allclose(ece, 100 * (4 / 5 * 0.15 + 1 / 5 * 1.0), rtol=1e-5)


def test_calibration_error_with_other_bins_equals_numpy():
    logits, labels = random_split(num_outputs=1)
    sums = prediction_sums(logits[0], labels, np.ones(len(labels)), num_bins=4)
    expected = numpy_measures(logits[0], labels, num_bins=4)
    np.testing.assert_allclose(metrics.summarise(sums)['ece'], expected['ece'], rtol=1e-5)


def test_prediction_sums_over_devices_equal_numpy():
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


def test_add_sums_is_float64():
    """float32 loses the last example."""
    many = {'examples': np.float32(2**25), 'top1': np.float32(2**25)}
    one = {'examples': np.float32(1), 'top1': np.float32(0)}
    # As a Python float: in float32 the two numbers are equal.
    assert float(metrics.add_sums([many, one])['examples']) == 2**25 + 1


def test_add_sums_of_no_examples_is_an_error():
    with pytest.raises(UserError, match='no examples'):
        metrics.add_sums([])
