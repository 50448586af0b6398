"""CL-ILR: its terms, the target that learns too, and the gradient into the trunk."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_fixtures import (
    BATCH,
    CLASSES,
    create,
    cross_entropy,
    gradient_norms,
    kl_divergence,
    random_labels,
    random_outputs,
)

from one_jax import config as config_lib
from one_jax import losses, methods, models
from one_jax.errors import ConfigError


def test_terms_against_the_formula():
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


def test_padding_is_left_out():
    outputs, labels, method = random_outputs(), random_labels(), create('cl_ilr')
    padded = outputs.replace(logits=outputs.logits.copy())
    padded.logits[:, 2] = 1e30
    loss, _ = method.loss(padded, methods.Context(labels, np.array([1, 1, 0, 1])))
    whole = outputs.replace(logits=np.delete(outputs.logits, 2, axis=1))
    expected, _ = method.loss(whole, methods.Context(np.delete(labels, 2)))
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_the_target_learns_too():
    def divergence(logits):
        context = methods.Context(random_labels())
        outputs = random_outputs().replace(logits=logits)
        return create('cl_ilr').loss(outputs, context)[1]['distillation'][0]

    logits = jnp.asarray(random_outputs().logits)
    gradient = jax.grad(divergence)(logits)
    # Of each of the two others: T (p (log p - log q) less its mean under p) / 2, mean over images.
    z = np.asarray(logits)
    log_p, log_q = (np.asarray(jax.nn.log_softmax(x / 3)) for x in ((z[1] + z[2]) / 2, z[0]))
    p, gap = np.exp(log_p), log_p - log_q
    expected = 3 * p * (gap - (p * gap).sum(axis=-1, keepdims=True)) / 2 / BATCH
    np.testing.assert_allclose(gradient[1], expected, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(gradient[2], expected, rtol=1e-3, atol=1e-6)


def test_who_gets_gradient_from_which_term():
    def first(name):
        return lambda method, outputs, context: method.loss(outputs, context)[1][name][0]

    norms = gradient_norms(first('branch_cross_entropy'), 'cl_ilr', 3)
    assert min(norms['trunk'], norms['head'][0]) > 0
    assert norms['head'][1] == norms['head'][2] == 0
    norms = gradient_norms(first('distillation'), 'cl_ilr', 3)
    assert min(norms['trunk'], *norms['head']) > 0


def network_gradient(num_branches, rescale_gradient):
    """Value and gradient of the loss in a ResNet-8 on 16x16 images, in training mode."""
    config = config_lib.default_config()
    config.model.update({'name': 'resnet8', 'num_branches': num_branches})
    config.method.update({'name': 'cl_ilr', 'rescale_gradient': rescale_gradient})
    config = config_lib.resolve(config)
    method = methods.create(config)
    network = models.make_network(config.model, CLASSES, method)
    images = np.random.default_rng(5).normal(size=(BATCH, 16, 16, 3)).astype(np.float32)

    @jax.jit
    def value_and_gradient():
        variables = network.init(jax.random.key(0), images, train=False)

        def loss(params):
            outputs, _ = network.apply(
                {**variables, 'params': params}, images, train=True, mutable=['batch_stats']
            )
            return method.loss(outputs, methods.Context(jnp.asarray(random_labels())))[0]

        return jax.value_and_grad(loss)(variables['params'])

    return value_and_gradient()


@pytest.mark.parametrize('num_branches', [3, 4])
def test_the_trunk_gets_one_kth_of_the_gradient(num_branches):
    value, gradient = network_gradient(num_branches, True)
    unscaled_value, unscaled = network_gradient(num_branches, False)
    assert float(value) == float(unscaled_value)
    # A division by a power of two is exact in binary; one by 3 is to the order of rounding.
    tolerance = 0 if num_branches == 4 else 1e-5
    expected = jax.tree.map(lambda g: g / num_branches, unscaled['trunk'])
    chex.assert_trees_all_close(gradient['trunk'], expected, rtol=tolerance, atol=tolerance)
    chex.assert_trees_all_equal(gradient['head'], unscaled['head'])
    assert float(jnp.abs(gradient['trunk']['conv1']['kernel']).max()) > 1e-3


def test_two_branches_are_each_others_teacher():
    outputs = random_outputs(2)
    method = create('cl_ilr', **{'model.num_branches': 2})
    _, terms = method.loss(outputs, methods.Context(random_labels()))
    expected = losses.kl_divergence(outputs.logits[::-1], outputs.logits, 3.0).mean(axis=-1)
    np.testing.assert_allclose(terms['distillation'], expected, rtol=1e-5)


def test_what_is_refused():
    with pytest.raises(ConfigError, match=r'model.num_branches=1 is not allowed'):
        create('cl_ilr', **{'model.num_branches': 1})
    with pytest.raises(ConfigError, match=r'method.temperature=0.0 is not allowed'):
        create('cl_ilr', temperature=0.0)
