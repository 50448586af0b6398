"""CL-ILR: its terms, the target that is pulled too, and the gradient into the trunk."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_fixtures import (
    BATCH,
    case,
    create,
    cross_entropy,
    kl_divergence,
    random_labels,
    random_outputs,
    with_logits,
)

from one_jax import methods


def test_loss_equals_the_formula():
    outputs, labels = random_outputs(4), random_labels()
    method = create('cl_ilr', **{'model.num_branches': 4})
    loss, terms = method.loss(outputs, methods.Context(labels, progress=0.1))
    z = outputs.logits
    targets = [(z[1] + z[2] + z[3]) / 3, (z[0] + z[2] + z[3]) / 3]
    targets += [(z[0] + z[1] + z[3]) / 3, (z[0] + z[1] + z[2]) / 3]
    divergences = [kl_divergence(t, s, 3.0) for t, s in zip(targets, z, strict=True)]
    entropies = [cross_entropy(s, labels) for s in z]
    ramp = np.exp(-5 * (1 - 0.1 / (80 / 300)) ** 2)
    np.testing.assert_allclose(terms['distillation'], divergences, rtol=1e-4)
    np.testing.assert_allclose(terms['branch_cross_entropy'], entropies, rtol=1e-5)
    assert float(terms['distill_weight']) == pytest.approx(ramp, rel=1e-5)
    assert float(loss) == pytest.approx(sum(entropies) + ramp * sum(divergences), rel=1e-4)


def test_gradient_of_the_divergence_pulls_the_target_too():
    def divergence(logits):
        context = methods.Context(random_labels())
        outputs = with_logits(random_outputs(), logits)
        return create('cl_ilr').loss(outputs, context)[1]['distillation'][0]

    logits = jnp.asarray(random_outputs().logits)
    gradient = jax.grad(divergence)(logits)
    # For both other branches: T p (log p - log q minus its mean under p) / 2, mean over images.
    z = np.asarray(logits)
    log_p, log_q = (np.asarray(jax.nn.log_softmax(x / 3)) for x in ((z[1] + z[2]) / 2, z[0]))
    p, gap = np.exp(log_p), log_p - log_q
    expected = 3 * p * (gap - (p * gap).sum(axis=-1, keepdims=True)) / 2 / BATCH
    np.testing.assert_allclose(gradient[1], expected, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(gradient[2], expected, rtol=1e-3, atol=1e-6)


def test_trunk_gradient_is_divided_by_the_number_of_branches():
    (_, value, _, scaled), (_, unscaled_value, _, unscaled) = (
        case('cl_ilr', rescale_gradient=rescale).results for rescale in (True, False)
    )
    assert float(value) == float(unscaled_value)
    expected = jax.tree.map(lambda g: g / 3, unscaled['loss']['trunk'])
    chex.assert_trees_all_close(scaled['loss']['trunk'], expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(scaled['loss']['head'], unscaled['loss']['head'], rtol=1e-6)
