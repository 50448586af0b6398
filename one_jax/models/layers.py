"""Convolution, batch normalisation and linear layers with PyTorch's conventions.

The published networks were defined in PyTorch, so their initialisation, padding and epsilon are
part of the method. Flax's own defaults differ in all three.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend import core
from jax.interpreters import mlir

# He et al. 2015, fan out, not truncated: N(0, 2 / (k * k * C_out)).
conv_kernel_init = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
# PyTorch's default for a linear layer: U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)).
linear_kernel_init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')

# How convolutions behave under vmap over branches:
# 'dense': one convolution for each branch.
# 'grouped': one grouped convolution, which is what XLA makes of a vmap.
# 'gemm': on small maps a product of patches and kernel, batched over branches; elsewhere 'dense'.
# 'auto': the form for the platform. It is 'dense' everywhere: on CPU by benchmarks/heads.py, on
# GPU and TPU because nothing else has been measured there.
BRANCH_CONVOLUTIONS = ('auto', 'dense', 'grouped', 'gemm')
# What a block keeps for its backward pass, see `rematerialised`.
KEPT_ACTIVATIONS = ('all', 'convolutions', 'blocks')
_CONVOLUTION = 'convolution'
# The largest maps 'gemm' takes: the patches of a 3x3 kernel are nine times the input.
GEMM_POSITIONS = 8 * 8


def _unroll_under_vmap(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Makes `vmap` of `function` one call for each entry of the mapped axis, at any depth."""
    function = jax.custom_batching.custom_vmap(function)

    @function.def_vmap
    def one_call_per_entry(axis_size, in_batched, *arguments):
        outputs = [
            function(
                *(x[i] if batched else x for x, batched in zip(arguments, in_batched, strict=True))
            )
            for i in range(axis_size)
        ]
        return jnp.stack(outputs), True

    return function


def _not_inlined(x: jax.Array) -> jax.Array:
    with set_xla_metadata(inlineable='false'):
        return jax.jit(lambda x: x)(x)


# The identity, and for XLA's CPU compiler a wall that fusion does not cross. To make the operands
# of a kernel gradient it transposes both, and fuses into that all elementwise operations they come
# from: in a residual network every block of the stage so far, for each convolution anew and with
# strided reads. `lax.optimization_barrier` is no help: that compiler drops it
# before it fuses. A function that may not be inlined stays, and is not a copy. The primitive is our
# own, and not `lax.platform_dependent`, so that nothing at all is lowered for other platforms.
_computed_once = core.Primitive('computed_once')
_computed_once.def_impl(lambda x: x)
_computed_once.def_abstract_eval(lambda x: x)
mlir.register_lowering(_computed_once, lambda context, x: [x])
mlir.register_lowering(
    _computed_once, mlir.lower_fun(_not_inlined, multiple_results=False), platform='cpu'
)


@functools.cache
def _dense_convolution(**options: Any) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A convolution of (lhs, rhs) with static `options` that stays dense under vmap and grad.

    A `custom_vmap` function alone has no reverse mode, so the derivative is given here, and each of
    the three convolutions (forward, input gradient, kernel gradient) unrolls by itself.
    """
    convolve = functools.partial(lax.conv_general_dilated, **options)

    @_unroll_under_vmap
    def forward(lhs, rhs):
        return convolve(lhs, rhs)

    # jax.vjp also traces the forward convolution; nothing uses its value, so XLA drops it.
    @_unroll_under_vmap
    def lhs_gradient(lhs, rhs, cotangent):
        return jax.vjp(lambda x: convolve(x, rhs), lhs)[1](cotangent)[0]

    @_unroll_under_vmap
    def rhs_gradient(lhs, rhs, cotangent):
        lhs, cotangent = _computed_once.bind(lhs), _computed_once.bind(cotangent)
        return jax.vjp(lambda kernel: convolve(lhs, kernel), rhs)[1](cotangent)[0]

    @jax.custom_vjp
    def convolution(lhs, rhs):
        return forward(lhs, rhs)

    def convolution_forward(lhs, rhs):
        return forward(lhs, rhs), (lhs, rhs)

    def convolution_backward(residuals, cotangent):
        return lhs_gradient(*residuals, cotangent), rhs_gradient(*residuals, cotangent)

    convolution.defvjp(convolution_forward, convolution_backward)
    return convolution


def dense_conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """`lax.conv_general_dilated` that under `vmap` is several dense convolutions, not a grouped
    one.

    XLA lowers a vmap over both operands to a convolution with `feature_group_count` = the number of
    entries; on CPU that form is much slower than separate convolutions.

    Args:
      lhs: images [B, H, W, C].
      rhs: kernel [h, w, C / groups, D].
      window_strides: the stride along each spatial axis.
      padding: 'SAME', 'VALID' or the (low, high) pair of each spatial axis.
      **options: the other keywords of `lax.conv_general_dilated`.

    Returns:
      The output [B, H', W', D], with derivatives of first order.
    """
    hashable = {
        name: tuple(value) if isinstance(value, list) else value for name, value in options.items()
    }
    if not isinstance(padding, str):
        padding = tuple(map(tuple, padding))
    convolution = _dense_convolution(
        window_strides=tuple(window_strides), padding=padding, **hashable
    )
    return convolution(lhs, rhs)


def gemm_conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """`lax.conv_general_dilated` as a product of patches and kernel, a batched one under `vmap`.

    Only for outputs of at most `GEMM_POSITIONS` positions, without groups and dilation and with
    explicit padding; elsewhere it is `dense_conv_general_dilated`, whose arguments these are.
    """
    dilated = any(
        factor != 1
        for name in ('lhs_dilation', 'rhs_dilation')
        for factor in options.get(name) or ()
    )
    grouped = options.get('feature_group_count', 1) * options.get('batch_group_count', 1) > 1
    if isinstance(padding, str) or dilated or grouped:
        return dense_conv_general_dilated(lhs, rhs, window_strides, padding, **options)
    size = [
        (length + low + high - kernel) // stride + 1
        for length, (low, high), kernel, stride in zip(
            lhs.shape[1:3], padding, rhs.shape[:2], window_strides, strict=True
        )
    ]
    if size[0] * size[1] > GEMM_POSITIONS:
        return dense_conv_general_dilated(lhs, rhs, window_strides, padding, **options)
    padded = jnp.pad(lhs, ((0, 0), *padding, (0, 0)))
    (down, right), (height, width) = window_strides, size
    patches = [
        padded[:, y : y + down * (height - 1) + 1 : down, x : x + right * (width - 1) + 1 : right]
        for y in range(rhs.shape[0])
        for x in range(rhs.shape[1])
    ]
    # Both are ordered by the kernel's row, its column and the input's channel.
    return jnp.concatenate(patches, axis=-1) @ rhs.reshape(-1, rhs.shape[-1])


def make_conv(dtype: jnp.dtype, branch_conv: str) -> Callable[..., nn.Module]:
    """A constructor `conv(features, kernel_size, stride=1, groups=1, use_bias=False, name=...)` of
    convolutions.

    The padding is symmetric, (k - 1) / 2 on each side, as PyTorch's; Flax's 'SAME' pads (0, 1) at
    stride 2 and shifts the features by a pixel.

    Args:
      dtype: of the computation; parameters are float32, or float64 when `dtype` is.
      branch_conv: how `vmap` over branches treats it, one of `BRANCH_CONVOLUTIONS`.
    """
    conv_general_dilated = {
        'auto': dense_conv_general_dilated,
        'dense': dense_conv_general_dilated,
        'grouped': lax.conv_general_dilated,
        'gemm': gemm_conv_general_dilated,
    }[branch_conv]

    def named(*arguments: Any, **options: Any) -> jax.Array:
        return checkpoint_name(conv_general_dilated(*arguments, **options), _CONVOLUTION)

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


def rematerialised(block: Callable[..., nn.Module], keep: str) -> Callable[..., nn.Module]:
    """A block that computes again, in the backward pass, what it did not keep (Chen et al. 2016).

    Args:
      block: a module's class, or a partial of one.
      keep: 'all' for the block as it is; 'convolutions' for its input and what its convolutions
        compute (Pleiss et al. 2017, for DenseNets); 'blocks' for its input alone.
    """
    if keep == 'all':
        return block
    if isinstance(block, functools.partial):
        return functools.partial(rematerialised(block.func, keep), **block.keywords)
    policy = jax.checkpoint_policies.save_only_these_names(_CONVOLUTION)
    return nn.remat(block, policy=policy if keep == 'convolutions' else None)


def make_norm(dtype: jnp.dtype, axis_name: str | None, train: bool) -> Callable[..., nn.Module]:
    """A constructor `norm(name=...)` of batch normalisations with PyTorch's epsilon and momentum.

    Args:
      dtype: of the output; the statistics are float32 at least.
      axis_name: the mesh axis over which statistics are averaged, or None for each replica's own.
      train: whether to normalise by the batch's statistics (and update the running ones).
    """
    return functools.partial(
        nn.BatchNorm,
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
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
    """Scales every channel by a weight in (0, 1) computed from all channels' means (Hu et al. 2018,
    section 3): pooling -> linear -> ReLU -> linear -> sigmoid.

    The linear layers have biases; without them SE-ResNet-18 would be smaller by 2,040 parameters.

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
    """The dtype of parameters and statistics for a computation in `dtype`: float32 at least."""
    return jnp.promote_types(dtype, jnp.float32)
