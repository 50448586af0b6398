"""The controls: branches that learn from the labels alone, and the average trained jointly."""

import numpy as np
import pytest
from method_fixtures import create, cross_entropy, gradient_norms, random_labels, random_outputs

from one_jax import methods
from one_jax.errors import ConfigError


def test_independent_branches_are_a_sum_of_cross_entropies():
    outputs, labels = random_outputs(), random_labels()
    loss, terms = create('independent').loss(outputs, methods.Context(labels))
    expected = [cross_entropy(logits, labels) for logits in outputs.logits]
    np.testing.assert_allclose(terms['branch_cross_entropy'], expected, rtol=1e-5)
    assert float(loss) == pytest.approx(sum(expected), rel=1e-5)
    assert terms.keys() == {'branch_cross_entropy'}


def test_the_joint_average_is_one_cross_entropy():
    outputs, labels = random_outputs(), random_labels()
    loss, terms = create('joint_average').loss(outputs, methods.Context(labels))
    expected = cross_entropy(outputs.logits.mean(axis=0), labels)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(terms['ensemble_cross_entropy']) == pytest.approx(expected, rel=1e-5)
    assert terms.keys() == {'ensemble_cross_entropy'}


@pytest.mark.parametrize('name', ['independent', 'joint_average'])
def test_padding_and_target_probabilities(name):
    outputs, labels, method = random_outputs(), random_labels(), create(name)
    mask = np.array([1, 1, 0, 1])
    padded = outputs.replace(logits=outputs.logits.copy())
    padded.logits[:, 2] = np.inf
    whole = outputs.replace(logits=np.delete(outputs.logits, 2, axis=1))
    loss, _ = method.loss(padded, methods.Context(labels, mask))
    expected, _ = method.loss(whole, methods.Context(np.delete(labels, 2)))
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)

    probabilities = np.eye(outputs.logits.shape[-1])[labels]
    loss, _ = method.loss(outputs, methods.Context(probabilities))
    expected, _ = method.loss(outputs, methods.Context(labels))
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


def test_who_gets_gradient():
    def first_branch(method, outputs, context):
        return method.loss(outputs, context)[1]['branch_cross_entropy'][0]

    norms = gradient_norms(first_branch, 'independent', 2)
    assert min(norms['trunk'], norms['head'][0]) > 0
    assert norms['head'][1] == 0

    def ensemble(method, outputs, context):
        return method.loss(outputs, context)[0]

    norms = gradient_norms(ensemble, 'joint_average', 2)
    assert min(norms['trunk'], *norms['head']) > 0


def test_what_is_deployed_and_the_fewest_branches():
    assert create('independent').deployed == 'branch 0'
    assert create('joint_average').deployed == 'ensemble'
    for name in ('independent', 'joint_average'):
        with pytest.raises(ConfigError, match=r'model.num_branches=1 is not allowed'):
            create(name, **{'model.num_branches': 1})
