"""Convolutions under vmap over branches, and PyTorch's conventions."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
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
joint = functools.partial(convolution.joint_conv_general_dilated, **OPTIONS)
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


@pytest.mark.parametrize('conv', [dense, joint])
@pytest.mark.parametrize('name', TRANSFORMATIONS)
def test_branch_convolution_under_transformations_equals_the_convolution(name, conv):
    transform, image_axes, kernel_axes = TRANSFORMATIONS[name]
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (*image_axes, 2, 6, 6, 4))
    kernel = jax.random.normal(keys[1], (*kernel_axes, 3, 3, 4, 5))

    def total(conv, x, kernel):
        return transform(functools.partial(squares, conv))(x, kernel).sum()

    np.testing.assert_allclose(
        transform(conv)(x, kernel), transform(reference)(x, kernel), rtol=1e-5, atol=1e-5
    )
    gradients = jax.grad(functools.partial(total, conv), (0, 1))
    expected = jax.grad(functools.partial(total, reference), (0, 1))(x, kernel)
    chex.assert_trees_all_close(gradients(x, kernel), expected, rtol=1e-4, atol=1e-3)
    # The other order: the gradient inside, the vmap outside.
    inside = transform(jax.grad(functools.partial(squares, conv), (0, 1)))(x, kernel)
    outside = transform(jax.grad(functools.partial(squares, reference), (0, 1)))(x, kernel)
    chex.assert_trees_all_close(inside, outside, rtol=1e-4, atol=1e-3)

    jaxpr = jax.make_jaxpr(gradients)(x, kernel).jaxpr
    assert set(feature_groups(jaxpr)) == {1} or conv is joint


def test_feature_groups_finds_a_grouped_convolution():
    x, kernel = jnp.ones((3, 2, 6, 6, 4)), jnp.ones((3, 3, 3, 4, 5))
    assert feature_groups(jax.make_jaxpr(jax.vmap(reference))(x, kernel).jaxpr) == [3]


@pytest.mark.parametrize('count', [1, 2, 3])
@pytest.mark.parametrize('groups', [1, 2])
def test_joint_convolution_of_any_number_of_branches_has_no_more_groups(count, groups):
    x, kernel = jnp.ones((count, 2, 6, 6, 4)), jnp.ones((count, 3, 3, 4 // groups, 6))
    for axes, maps in (((None, 0), x[0]), ((0, 0), x)):
        vmapped = jax.vmap(functools.partial(joint, feature_group_count=groups), axes)
        assert feature_groups(jax.make_jaxpr(vmapped)(maps, kernel).jaxpr) == [groups]
        expected = jax.vmap(functools.partial(reference, feature_group_count=groups), axes)
        np.testing.assert_allclose(vmapped(maps, kernel), expected(maps, kernel), rtol=1e-6)


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


def normalise(norm, mean, x):
    """Returns the output and the new statistics of a training step with this running mean."""
    statistics = {'mean': jnp.float32(mean), 'var': jnp.ones(x.shape[-1])}
    variables = {'params': norm.init(jax.random.key(0), x)['params'], 'batch_stats': statistics}
    return norm.apply(variables, x, mutable=['batch_stats'])


@pytest.mark.parametrize(
    ('ratio', 'distance', 'error'),
    # A running mean of 0, as at the start; and near the batch's, as later.
    [(10, 10, 1e-4), (1000, 100, 2e-2), (1000, 1, 1e-5), (3000, 1, 1e-5)],
)
def test_batch_norm_of_a_large_mean_near_the_running_mean_is_accurate(ratio, distance, error):
    x = (np.random.default_rng(0).normal(size=(32, 8, 8, 4)) + ratio).astype(np.float32)
    exact = x.astype(np.float64)
    mean, var = exact.mean((0, 1, 2)), exact.var((0, 1, 2))
    norm = layers.make_norm(jnp.float32, axis_name=None, train=True)()
    y, updated = normalise(norm, mean - distance, jnp.asarray(x))
    assert np.abs(y - (exact - mean) / np.sqrt(var + 1e-5)).max() < error
    statistics = updated['batch_stats']
    np.testing.assert_allclose(statistics['mean'], mean - 0.9 * distance, rtol=1e-6)
    np.testing.assert_allclose(statistics['var'], 0.9 + 0.1 * var, rtol=error)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_batch_norm_and_its_gradients_are_those_of_flax(dtype):
    ours = layers.make_norm(dtype, axis_name=None, train=True)()
    theirs = nn.BatchNorm(False, momentum=0.9, epsilon=1e-5, dtype=dtype)
    keys = jax.random.split(jax.random.key(0), 4)
    x = (1 + jax.random.normal(keys[0], (16, 4, 4, 3))).astype(dtype)
    params = {'scale': jax.random.normal(keys[1], (3,)), 'bias': jax.random.normal(keys[2], (3,))}
    weights = jax.random.normal(keys[3], x.shape)
    statistics = {'mean': jnp.arange(3.0), 'var': jnp.ones(3)}

    def loss(norm, params, x):
        variables = {'params': params, 'batch_stats': statistics}
        y, updated = norm.apply(variables, x, mutable=['batch_stats'])
        assert y.dtype == dtype
        return (y * weights).sum(), (y, updated)

    def outcome(norm):
        return jax.value_and_grad(functools.partial(loss, norm), (0, 1), has_aux=True)(params, x)

    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    same = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=10 * tolerance)
    jax.tree.map(same, outcome(ours), outcome(theirs))


def test_synchronised_batch_norm_is_that_of_the_whole_batch_with_one_all_reduce():
    x = 100 + jax.random.normal(jax.random.key(0), (4, 6, 3))
    synchronised = layers.make_norm(jnp.float32, axis_name='parts', train=True)()
    mean = np.full(3, 99.0)
    parts = jax.vmap(functools.partial(normalise, synchronised, mean), axis_name='parts')
    y, updated = parts(x)
    whole = layers.make_norm(jnp.float32, axis_name=None, train=True)()
    expected_y, expected = normalise(whole, mean, x.reshape(24, 3))
    np.testing.assert_allclose(y.reshape(24, 3), expected_y, rtol=1e-4, atol=1e-4)
    for name, values in expected['batch_stats'].items():
        np.testing.assert_allclose(updated['batch_stats'][name], [values] * 4, rtol=1e-4)
    step = jax.make_jaxpr(functools.partial(normalise, synchronised, mean), axis_env=[('parts', 4)])
    assert str(step(x[0])).count('psum') == 1
