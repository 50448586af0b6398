"""Convolutions that stay dense under vmap, and PyTorch's conventions."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core

from one_jax.models import layers

CHANNELS_LAST = ('NHWC', 'HWIO', 'NHWC')
OPTIONS = {
    'window_strides': (2, 2),
    'padding': ((1, 1), (1, 1)),
    'dimension_numbers': CHANNELS_LAST,
}
dense = functools.partial(layers.dense_conv_general_dilated, **OPTIONS)
reference = functools.partial(lax.conv_general_dilated, **OPTIONS)


def feature_groups(jaxpr):
    """The feature_group_count of every convolution in a jaxpr, the called ones included."""
    groups = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == 'conv_general_dilated':
            groups.append(
                equation.params['feature_group_count'] * equation.params['batch_group_count']
            )
        for called in core.jaxprs_in_params(equation.params):
            groups += feature_groups(called)
    return groups


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
def test_dense_convolution_is_the_convolution(name):
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
    # And the other way round: the gradient inside, the vmap outside.
    inside = transform(jax.grad(functools.partial(squares, dense), (0, 1)))(x, kernel)
    outside = transform(jax.grad(functools.partial(squares, reference), (0, 1)))(x, kernel)
    chex.assert_trees_all_close(inside, outside, rtol=1e-4, atol=1e-3)

    jaxpr = jax.make_jaxpr(gradients)(x, kernel).jaxpr
    assert set(feature_groups(jaxpr)) == {1}


def test_the_group_count_sees_grouped_convolutions():
    x, kernel = jnp.ones((3, 2, 6, 6, 4)), jnp.ones((3, 3, 3, 4, 5))
    assert feature_groups(jax.make_jaxpr(jax.vmap(reference))(x, kernel).jaxpr) == [3]


def test_operands_of_kernel_gradients_are_not_fused_into_transpositions_on_cpu():
    """A residual network is a chain of elementwise operations for XLA; for other platforms the
    program has nothing of the wall against it."""
    conv = functools.partial(layers.dense_conv_general_dilated, window_strides=(1, 1))
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


@pytest.mark.parametrize(('size', 'stride', 'kernel_size'), [(8, 1, 3), (15, 2, 3), (7, 2, 1)])
def test_small_maps_as_matrix_products(size, stride, kernel_size):
    """Equal to the convolution; over branches, one batched product in each direction."""
    padding = 2 * ((kernel_size // 2, kernel_size // 2),)
    options = {'window_strides': (stride, stride), 'padding': padding}
    gemm = functools.partial(
        layers.gemm_conv_general_dilated, **options, dimension_numbers=CHANNELS_LAST
    )
    convolution = functools.partial(
        lax.conv_general_dilated, **options, dimension_numbers=CHANNELS_LAST
    )
    keys = jax.random.split(jax.random.key(1))
    x = jax.random.normal(keys[0], (3, 2, size, size, 4))
    kernel = jax.random.normal(keys[1], (3, kernel_size, kernel_size, 4, 5))

    def gradients(conv):
        def total(x, kernel):
            return jax.vmap(functools.partial(squares, conv))(x, kernel).sum()

        return jax.jit(jax.value_and_grad(total, (0, 1)))

    chex.assert_trees_all_close(
        gradients(gemm)(x, kernel), gradients(convolution)(x, kernel), rtol=1e-4, atol=1e-3
    )
    jaxpr = jax.make_jaxpr(gradients(gemm))(x, kernel)
    assert feature_groups(jaxpr.jaxpr) == []
    assert str(jaxpr).count('dot_general') == 3


@pytest.mark.parametrize(('size', 'groups'), [(9, 1), (8, 2)])
def test_large_maps_and_groups_stay_convolutions(size, groups):
    conv = layers.make_conv(jnp.float32, 'gemm')(4, 3, groups=groups)
    x = jnp.ones((1, size, size, 4))
    kernel = {'params': {'kernel': jnp.ones((3, 3, 4 // groups, 4))}}
    jaxpr = jax.make_jaxpr(conv.apply)(kernel, x)
    assert feature_groups(jaxpr.jaxpr) == [groups]


def test_padding_is_symmetric_at_stride_two():
    """The output at (i, j) is centred on input pixel (2i, 2j); Flax's 'SAME' is a pixel off."""
    conv = layers.make_conv(jnp.float32, 'dense')(1, 3, 2)
    image = jnp.zeros((1, 8, 8, 1)).at[0, 4, 2, 0].set(1.0)
    kernel = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
    output = conv.apply({'params': {'kernel': kernel}}, image)
    assert output.shape == (1, 4, 4, 1)
    assert np.argwhere(output[0, :, :, 0]).tolist() == [[2, 1]]


def test_initialisation_is_pytorchs():
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


def test_normalisation_has_pytorchs_momentum_and_epsilon():
    norm = layers.make_norm(jnp.float32, axis_name=None, train=True)()
    x = jnp.asarray([[0.0, 1e-3], [2.0, 3e-3]])
    variables = norm.init(jax.random.key(0), x)
    y, updated = norm.apply(variables, x, mutable=['batch_stats'])
    np.testing.assert_allclose(updated['batch_stats']['mean'], [0.1, 2e-4], rtol=1e-5)
    np.testing.assert_allclose(updated['batch_stats']['var'], [1.0, 0.9 + 1e-7], rtol=1e-5)
    np.testing.assert_allclose(y[1], [1 / (1 + 1e-5) ** 0.5, 1e-3 / (1.1e-5) ** 0.5], rtol=1e-4)
