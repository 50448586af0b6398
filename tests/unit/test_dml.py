"""DML: its terms, the symmetry of two networks, constant targets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_fixtures import (
    BATCH,
    create,
    cross_entropy,
    kl_divergence,
    random_labels,
    random_outputs,
    softmax,
    with_logits,
)

from one_jax import methods
from one_jax.errors import ConfigError


def test_loss_equals_the_formula():
    outputs, labels = random_outputs(3), random_labels()
    method = create('dml', distill_weight=0.5, **{'model.num_branches': 3})
    loss, terms = method.loss(outputs, methods.Context(labels, progress=0.0))
    z = outputs.logits
    divergences = [
        sum(kl_divergence(z[j], z[i], 1.0) for j in range(3) if j != i) / 2 for i in range(3)
    ]
    entropies = [cross_entropy(logits, labels) for logits in z]
    np.testing.assert_allclose(terms['distillation'], divergences, rtol=1e-4)
    np.testing.assert_allclose(terms['branch_cross_entropy'], entropies, rtol=1e-5)
    assert float(terms['distill_weight']) == 0.5
    assert float(loss) == pytest.approx(sum(entropies) + 0.5 * sum(divergences), rel=1e-4)


def test_exchanged_networks_have_exchanged_terms_and_gradients():
    method, context = create('dml'), methods.Context(random_labels())

    @jax.jit
    @jax.value_and_grad
    def evaluate(logits):
        return method.loss(with_logits(random_outputs(2), logits), context)[0]

    logits = jnp.asarray(random_outputs(2).logits)
    loss, gradient = evaluate(logits)
    exchanged_loss, exchanged_gradient = evaluate(logits[::-1])
    assert float(loss) == pytest.approx(float(exchanged_loss), rel=1e-6)
    np.testing.assert_allclose(gradient, exchanged_gradient[::-1], rtol=1e-5, atol=1e-7)


def test_gradient_of_the_divergence_pulls_one_network_to_the_others():
    """It is (p_i - mean of the others' p) / B at T = 1."""
    method = create('dml', **{'model.num_branches': 3})
    outputs = random_outputs(3)

    def divergence(logits):
        context = methods.Context(random_labels())
        return method.loss(with_logits(outputs, logits), context)[1]['distillation'][0]

    gradient = jax.grad(divergence)(jnp.asarray(outputs.logits))
    p = softmax(outputs.logits)
    np.testing.assert_allclose(gradient[0], (p[0] - (p[1] + p[2]) / 2) / BATCH, atol=1e-6)
    np.testing.assert_array_equal(gradient[1:], 0)


def test_branches_are_whole_networks_and_may_be_heterogeneous():
    method = create('dml')
    assert (method.num_branches, method.share_stages) == (2, 0)
    method = create('dml', **{'model.branch_networks': 'resnet8,wrn10_1,vgg6_tiny'})
    assert (method.num_branches, method.share_stages) == (3, 0)
    for fields, message in [
        ({'model.share_stages': 2}, r'model.share_stages=2 .* branches are whole networks'),
        ({'model.num_branches': 1}, r'model.num_branches=1 is not allowed: at least 2'),
        (
            {'model.num_branches': 3, 'model.branch_networks': 'resnet8,wrn10_1'},
            r'model.num_branches=3 .*None or 2, the number of model.branch_networks',
        ),
    ]:
        with pytest.raises(ConfigError, match=message):
            create('dml', **fields)
