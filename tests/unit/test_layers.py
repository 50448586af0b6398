"""Convolutions that stay dense under vmap, and PyTorch's conventions."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from network_fixtures import feature_groups

from one_jax.models import convolution, layers

CHANNELS_LAST = ('NHWC', 'HWIO', 'NHWC')
OPTIONS = {
    'window_strides': (2, 2),
    'padding': ((1, 1), (1, 1)),
    'dimension_numbers': CHANNELS_LAST,
}
dense = functools.partial(convolution.dense_conv_general_dilated, **OPTIONS)
reference = functools.partial(lax.conv_general_dilated, **OPTIONS)


def squares(conv, x, kernel):
    return (conv(x, kernel) ** 2).sum()


TRANSFORMATIONS = {
    'plain': (lambda f: f, (), ()),
    'vmap': (lambda f: jax.vmap(f), (3,), (3,)),
    'vmap over kernels': (lambda f: jax.vmap(f, (None, 0)), (), (3,)),
    'vmap over images': (lambda f: jax.vmap(f, (0, None)), (3,), ()),
    'vmap of vmap': (lambda f: jax.vmap(jax.vmap(f)), (2, 3), (2, 3)),
    'vmap of vmap over kernels': (
        lambda f: jax.vmap(jax.vmap(f, (None, 0)), (0, None)),
        (2,),
        (3,),
    ),
}


@pytest.mark.parametrize('name', TRANSFORMATIONS)
def test_dense_convolution_under_transformations_equals_the_convolution(name):
    transform, image_axes, kernel_axes = TRANSFORMATIONS[name]
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (*image_axes, 2, 6, 6, 4))
    kernel = jax.random.normal(keys[1], (*kernel_axes, 3, 3, 4, 5))

    def total(conv, x, kernel):
        return transform(functools.partial(squares, conv))(x, kernel).sum()

    np.testing.assert_allclose(
        transform(dense)(x, kernel), transform(reference)(x, kernel), rtol=1e-5, atol=1e-5
    )
    gradients = jax.grad(functools.partial(total, dense), (0, 1))
    expected = jax.grad(functools.partial(total, reference), (0, 1))(x, kernel)
    chex.assert_trees_all_close(gradients(x, kernel), expected, rtol=1e-4, atol=1e-3)
    # The other order: the gradient inside, the vmap outside.
    inside = transform(jax.grad(functools.partial(squares, dense), (0, 1)))(x, kernel)
    outside = transform(jax.grad(functools.partial(squares, reference), (0, 1)))(x, kernel)
    chex.assert_trees_all_close(inside, outside, rtol=1e-4, atol=1e-3)

    jaxpr = jax.make_jaxpr(gradients)(x, kernel).jaxpr
    assert set(feature_groups(jaxpr)) == {1}


def test_feature_groups_finds_a_grouped_convolution():
    x, kernel = jnp.ones((3, 2, 6, 6, 4)), jnp.ones((3, 3, 3, 4, 5))
    assert feature_groups(jax.make_jaxpr(jax.vmap(reference))(x, kernel).jaxpr) == [3]


def test_kernel_gradient_operands_on_cpu_are_behind_a_fusion_barrier():
    """XLA would fuse the elementwise operations of a residual network; other platforms' programs
    do not change."""
    conv = functools.partial(convolution.dense_conv_general_dilated, window_strides=(1, 1))
    conv = functools.partial(conv, padding=((1, 1), (1, 1)), dimension_numbers=CHANNELS_LAST)

    def network(kernels, x):
        for kernel in kernels:
            x = jax.nn.relu(x + conv(x, kernel))
        return x.sum()

    kernels = 3 * [jnp.ones((3, 3, 4, 4))]
    traced = jax.jit(jax.grad(network)).trace(kernels, jnp.ones((2, 8, 8, 4)))
    text = traced.lower(lowering_platforms=('cpu',)).compile().as_text()
    walls = re.findall(r' call\(.*inlineable="false"', text)
    assert len(walls) == 2 * len(kernels)
    for platform in ('cuda', 'tpu'):
        assert 'inlineable' not in traced.lower(lowering_platforms=(platform,)).as_text()


def test_convolution_at_stride_two_pads_symmetrically():
    """The output at (i, j) is centred on input pixel (2i, 2j); Flax's 'SAME' is a pixel off."""
    conv = layers.make_conv(jnp.float32, 'dense')(1, 3, 2)
    image = jnp.zeros((1, 8, 8, 1)).at[0, 4, 2, 0].set(1.0)
    kernel = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
    output = conv.apply({'params': {'kernel': kernel}}, image)
    assert output.shape == (1, 4, 4, 1)
    assert np.argwhere(output[0, :, :, 0]).tolist() == [[2, 1]]


def test_initial_parameters_have_pytorchs_distributions():
    conv = layers.make_conv(jnp.float32, 'dense')(256, 3)
    kernel = conv.init(jax.random.key(0), jnp.zeros((1, 8, 8, 64)))['params']['kernel']
    deviation = (2 / (3 * 3 * 256)) ** 0.5
    np.testing.assert_allclose(kernel.std(), deviation, rtol=0.01)
    # Not truncated at two standard deviations.
    assert jnp.abs(kernel).max() > 4 * deviation

    params = layers.Linear(1000).init(jax.random.key(0), jnp.zeros((1, 64)))['params']
    for values in params.values():
        limit = 64**-0.5
        assert 0.99 * limit < jnp.abs(values).max() <= limit
        np.testing.assert_allclose(values.std(), limit / 3**0.5, rtol=0.05)


def test_batch_norm_has_pytorchs_momentum_and_epsilon():
    norm = layers.make_norm(jnp.float32, axis_name=None, train=True)()
    x = jnp.asarray([[0.0, 1e-3], [2.0, 3e-3]])
    variables = norm.init(jax.random.key(0), x)
    y, updated = norm.apply(variables, x, mutable=['batch_stats'])
    np.testing.assert_allclose(updated['batch_stats']['mean'], [0.1, 2e-4], rtol=1e-5)
    np.testing.assert_allclose(updated['batch_stats']['var'], [1.0, 0.9 + 1e-7], rtol=1e-5)
    np.testing.assert_allclose(y[1], [1 / (1 + 1e-5) ** 0.5, 1e-3 / (1.1e-5) ** 0.5], rtol=1e-4)
