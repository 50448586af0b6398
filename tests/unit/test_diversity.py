"""Diversity between branches against NumPy, and where the records and tables show it."""

import itertools

import jax
import numpy as np
import pytest

from one_jax import metrics
from one_jax.reporting import tables
from one_jax.students import evaluation

diversity_sums = jax.jit(metrics.diversity_sums)


def numpy_diversity(logits):
    """Of logits [K, N, C], means over images and pairs: L2 of softmax outputs, other class in %."""
    exponentials = np.exp(logits.astype(np.float64))
    probabilities = exponentials / exponentials.sum(axis=-1, keepdims=True)
    distances, differ = [], []
    for first, second in itertools.combinations(range(len(logits)), 2):
        for image in range(logits.shape[1]):
            gap = probabilities[first, image] - probabilities[second, image]
            distances.append(np.sqrt((gap**2).sum()))
            differ.append(logits[first, image].argmax() != logits[second, image].argmax())
    return np.mean(distances), 100 * np.mean(differ)


@pytest.mark.parametrize('num_branches', [2, 4])
def test_diversity_in_padded_batches_equals_numpy(num_branches):
    logits = np.random.default_rng(0).normal(size=(num_branches, 50, 7)).astype(np.float32)
    mask = np.ones(64)
    mask[50:] = 0
    padded = np.concatenate([logits, np.full((num_branches, 14, 7), np.nan, np.float32)], axis=1)
    sums = [
        {**metrics.prediction_sums(x, np.zeros(32, int), m), **diversity_sums(x, m)}
        for x, m in ((padded[:, :32], mask[:32]), (padded[:, 32:], mask[32:]))
    ]
    summary = metrics.summarise(metrics.add_sums(jax.device_get(sums)))
    distance, disagreement = numpy_diversity(logits)
    assert summary['pairwise_l2'] == pytest.approx(distance, rel=1e-5)
    assert summary['disagreement'] == pytest.approx(disagreement)


def test_diversity_of_equal_branches_is_zero():
    logits = np.broadcast_to(np.random.default_rng(1).normal(size=(5, 3)), (3, 5, 3))
    sums = diversity_sums(logits, np.ones(5))
    assert float(sums['pairwise_l2']) == float(sums['disagreement']) == 0


def test_evaluation_record_and_table_show_diversity():
    summary = {measure: [90.0, 91.0, 92.0] for measure in metrics.MEASURES}
    record = evaluation.evaluation_record(
        {**summary, 'pairwise_l2': 0.125, 'disagreement': 3.5}, 2, False, 'ensemble'
    )
    assert record['pairwise_l2'] == 0.125
    assert record['deployed_top1'] == 92.0
    table = tables.run_table(record)
    assert 'mean L2 distance between two branches 0.1250, disagreement 3.50 %' in table
    assert 'diversity' not in tables.run_table(
        evaluation.evaluation_record(summary, 2, False, 'branch 0')
    )


def test_table_of_heterogeneous_branches_has_their_sizes():
    summary = {measure: [97.0, 96.0, 97.5] for measure in metrics.MEASURES}
    result = evaluation.evaluation_record(summary, 2, False, 'branch 0') | {
        'branch_network': ['resnet8', 'resnet8@0.5'],
        'branch_parameters': [78042, 20218],
        'branch_flops': [25_000_000, 7_100_000],
    }
    rows = tables.run_table(result).splitlines()
    assert rows[1].split()[:4] == ['output', 'network', 'params', 'MFLOPs']
    assert rows[3].split()[:6] == ['branch', '0', 'resnet8', '78.0k', '25.0', '97.00']
    assert rows[4].split()[:6] == ['branch', '1', 'resnet8@0.5', '20.2k', '7.1', '96.00']
