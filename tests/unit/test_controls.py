"""The controls: branches that learn from the labels alone, and the average trained jointly."""

import numpy as np
import pytest
from method_fixtures import create, cross_entropy, random_labels, random_outputs

from one_jax import methods
from one_jax.errors import ConfigError


def test_independent_loss_is_the_sum_of_cross_entropies():
    outputs, labels = random_outputs(), random_labels()
    loss, terms = create('independent').loss(outputs, methods.Context(labels))
    expected = [cross_entropy(logits, labels) for logits in outputs.logits]
    np.testing.assert_allclose(terms['branch_cross_entropy'], expected, rtol=1e-5)
    assert float(loss) == pytest.approx(sum(expected), rel=1e-5)
    assert terms.keys() == {'branch_cross_entropy'}


def test_joint_average_loss_is_the_ensembles_cross_entropy():
    outputs, labels = random_outputs(), random_labels()
    loss, terms = create('joint_average').loss(outputs, methods.Context(labels))
    expected = cross_entropy(outputs.logits.mean(axis=0), labels)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(terms['ensemble_cross_entropy']) == pytest.approx(expected, rel=1e-5)
    assert terms.keys() == {'ensemble_cross_entropy'}


def test_controls_need_two_branches():
    assert create('independent').deployed == 'branch 0'
    assert create('joint_average').deployed == 'ensemble'
    for name in ('independent', 'joint_average'):
        with pytest.raises(ConfigError, match=r'model.num_branches=1 is not allowed'):
            create(name, **{'model.num_branches': 1})
