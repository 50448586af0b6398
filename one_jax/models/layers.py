"""Convolution, batch normalisation and linear layers with PyTorch's conventions.

The published networks were defined in PyTorch, so its initialisation, padding and epsilon are part
of the methods. Flax's defaults differ in all three.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from one_jax.models import convolution

# He et al. 2015, fan out, not truncated: N(0, 2 / (k * k * C_out)).
conv_kernel_init = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
# PyTorch's default for a linear layer: U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)).
linear_kernel_init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')

# PyTorch's, of batch normalisation.
EPSILON = 1e-5

# What `vmap` over branches makes of a convolution: 'dense', one convolution for each branch;
# 'grouped', one grouped convolution. 'auto' is one convolution on TPU and 'dense' elsewhere.
BRANCH_CONVOLUTIONS = {
    'auto': convolution.conv_general_dilated,
    'dense': convolution.dense_conv_general_dilated,
    'grouped': lax.conv_general_dilated,
}
# What a block recomputes in its backward pass, see `remat`.
REMAT = ('none', 'convolutions', 'blocks')
_CONVOLUTION = 'convolution'


def make_conv(dtype: jnp.dtype, branch_conv: str) -> Callable[..., nn.Module]:
    """Returns a constructor of convolutions `conv(features, kernel_size, stride=1, groups=1,
    use_bias=False, name=...)`.

    The padding is symmetric, (k - 1) / 2 on each side, like PyTorch's; Flax's 'SAME' pads (0, 1) at
    stride 2 and shifts the features by a pixel.

    Args:
      dtype: of the computation; parameters are float32, or float64 when `dtype` is.
      branch_conv: a key of `BRANCH_CONVOLUTIONS`.
    """

    def named(*arguments: Any, **options: Any) -> jax.Array:
        convolve = BRANCH_CONVOLUTIONS[branch_conv]
        return checkpoint_name(convolve(*arguments, **options), _CONVOLUTION)

    def conv(
        features: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        use_bias: bool = False,
        **names,
    ):
        padding = (kernel_size - 1) // 2
        return nn.Conv(
            features,
            (kernel_size, kernel_size),
            strides=stride,
            padding=((padding, padding), (padding, padding)),
            feature_group_count=groups,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=parameter_dtype(dtype),
            kernel_init=conv_kernel_init,
            conv_general_dilated=named,
            **names,
        )

    return conv


def remat(block: Callable[..., nn.Module], mode: str) -> Callable[..., nn.Module]:
    """Rematerialises a block: its backward pass recomputes what was not stored (Chen et al. 2016).

    Args:
      block: a module class, or a partial of one.
      mode: 'none' stores everything; 'convolutions' stores the block's input and the outputs of its
        convolutions (Pleiss et al. 2017, for DenseNets); 'blocks' stores only its input.
    """
    if mode == 'none':
        return block
    if isinstance(block, functools.partial):
        return functools.partial(remat(block.func, mode), **block.keywords)
    policy = jax.checkpoint_policies.save_only_these_names(_CONVOLUTION)
    return nn.remat(block, policy=policy if mode == 'convolutions' else None)


class BatchNorm(nn.BatchNorm):
    """Flax's batch normalisation, with the batch's variance from x minus the running mean.

    Flax's E[x^2] - E[x]^2 takes one pass over x and one all-reduce, but cancels where the mean is
    large. The running mean is near it by then; subtracting it changes only the rounding.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., C] to the same shape, each channel normalised."""
        if self.use_running_average or self.is_initializing():
            return super().__call__(x)
        axes = tuple(range(x.ndim - 1))
        running = {name: self.get_variable('batch_stats', name) for name in ('mean', 'var')}
        x = x.astype(parameter_dtype(x.dtype)) - jnp.expand_dims(running['mean'], axes)
        moments = [x.mean(axes), jnp.square(x).mean(axes)]
        # Stacked, they take one all-reduce; apart, fewer operations in the backward pass. On CPU
        # these would round differently from earlier runs.
        if self.axis_name is not None or not convolution.runs_on_tpu():
            moments = jnp.stack(moments)
        if self.axis_name is not None:
            moments = lax.pmean(moments, self.axis_name)
        mean, var = moments[0], jnp.maximum(moments[1] - jnp.square(moments[0]), 0)
        new, old = 1 - self.momentum, self.momentum
        self.put_variable('batch_stats', 'mean', running['mean'] + new * mean)
        self.put_variable('batch_stats', 'var', old * running['var'] + new * var)
        # Fewer operations, in the backward pass too, than (x - mean) * factor + bias.
        factor = self.get_variable('params', 'scale') * lax.rsqrt(var + self.epsilon)
        offset = self.get_variable('params', 'bias') - mean * factor
        y = x * jnp.expand_dims(factor, axes) + jnp.expand_dims(offset, axes)
        return y.astype(self.dtype)


def make_norm(dtype: jnp.dtype, axis_name: str | None, train: bool) -> Callable[..., nn.Module]:
    """Returns a constructor `norm(name=...)` of batch normalisations with PyTorch's epsilon and
    momentum.

    Args:
      dtype: of the output; the statistics are at least float32.
      axis_name: the mesh axis over which to average the statistics, or None for each replica's own.
      train: whether to use (and update running statistics by) the batch's statistics.
    """
    return functools.partial(
        BatchNorm,
        use_running_average=not train,
        momentum=0.9,
        epsilon=EPSILON,
        dtype=dtype,
        param_dtype=parameter_dtype(dtype),
        axis_name=axis_name,
    )


class Linear(nn.Module):
    """A linear layer with PyTorch's default initialisation of kernel and bias.

    Attributes:
      features: size of the output.
      dtype: of the computation.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., D] to [..., features]."""
        limit = x.shape[-1] ** -0.5

        def bias_init(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -limit, limit)

        param_dtype = parameter_dtype(self.dtype)
        kernel = self.param('kernel', linear_kernel_init, (x.shape[-1], self.features), param_dtype)
        bias = self.param('bias', bias_init, (self.features,), param_dtype)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        return x @ kernel + jnp.expand_dims(bias, range(x.ndim - 1))


class SqueezeExcitation(nn.Module):
    """Scales each channel by a weight in (0, 1) (Hu et al. 2018, section 3): pooling -> linear ->
    ReLU -> linear -> sigmoid.

    The linear layers have biases; without them SE-ResNet-18 would have 2,040 parameters fewer.

    Attributes:
      reduction: the factor by which the hidden layer is narrower than the input.
    """

    reduction: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, D] to the same shape."""
        channels = x.shape[-1]
        squeezed = x.mean(axis=(1, 2), keepdims=True)
        hidden = Linear(channels // self.reduction, dtype=x.dtype, name='fc1')(squeezed)
        weights = Linear(channels, dtype=x.dtype, name='fc2')(nn.relu(hidden))
        return x * nn.sigmoid(weights)


def parameter_dtype(dtype: Any) -> Any:
    """Returns the dtype of parameters and statistics for a computation in `dtype`: at least
    float32.
    """
    return jnp.promote_types(dtype, jnp.float32)
