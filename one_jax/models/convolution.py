"""Convolutions under `vmap` over branches: dense ones on CPU, a joint one on TPU."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend import core
from jax.interpreters import ad, batching, mlir


def runs_on_tpu() -> bool:
    """Whether what is traced, inside `shard_map`, is for a mesh of TPUs.

    This process may have none and only compile for them. Without a mesh the answer is False.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.platform == 'tpu'


def _unroll_under_vmap(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Turns `vmap` of `function` into one call for each entry of the mapped axis, at any depth."""
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


# The identity; on CPU also a barrier to fusion. For a kernel gradient XLA's CPU compiler transposes
# both operands and fuses all elementwise operations behind them into the transposition: in a
# residual network, every earlier block of the stage, again for each convolution. It drops
# `lax.optimization_barrier` before it fuses; a function that may not be inlined stays, without a
# copy. `python -m benchmarks.heads --forms=dense,fused` measures the gain. Our primitive, unlike
# `lax.platform_dependent`, adds nothing to programs for other platforms.
_computed_once = core.Primitive('computed_once')
_computed_once.def_impl(lambda x: x)
_computed_once.def_abstract_eval(lambda x: x)
mlir.register_lowering(_computed_once, lambda context, x: [x])
mlir.register_lowering(
    _computed_once, mlir.lower_fun(_not_inlined, multiple_results=False), platform='cpu'
)


@functools.cache
def _dense_convolution(**options: Any) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns a convolution of (lhs, rhs) that stays dense under vmap and grad.

    A `custom_vmap` function has no reverse mode, so the derivative is defined here, and each of the
    three convolutions (forward, input gradient, kernel gradient) unrolls on its own.
    """
    convolve = functools.partial(lax.conv_general_dilated, **options)

    @_unroll_under_vmap
    def forward(lhs, rhs):
        return convolve(lhs, rhs)

    # jax.vjp also traces the forward convolution; its value is unused, so XLA drops it.
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
    """`lax.conv_general_dilated` that `vmap` turns into several dense convolutions.

    XLA lowers a vmap over both operands to one grouped convolution, which is much slower on CPU.
    Derivatives are of first order only.
    """
    options = _hashable(window_strides=window_strides, padding=padding, **options)
    return _dense_convolution(**options)(lhs, rhs)


def _hashable(padding: str | Sequence[tuple[int, int]], **options: Any) -> dict[str, Any]:
    if not isinstance(padding, str):
        padding = tuple(map(tuple, padding))
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    return {'padding': padding, **options}


def _joint_convolution(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] = (1, 1),
    rhs_dilation: Sequence[int] = (1, 1),
    dimension_numbers: Any = None,
    **options: Any,
) -> jax.Array:
    """The convolutions of K branches as one, with the branches as another spatial dimension.

    Along it, one position of the window meets a branch's maps, and the others meet zeros, which
    XLA's TPU compiler skips: it lowers grouped convolutions like this. Here, maps that the branches
    share are not copied, kernels keep their layout, and batch normalisation is fused into every
    convolution. `python -m benchmarks.tpu_compile --forms=auto,grouped,dense` compares the cycles.

    Args:
      lhs: maps [K, B, H, W, C], or [B, H, W, C] that the branches share.
      rhs: kernels [K, h, w, C, D].
      dimension_numbers: are these.

    Returns:
      [K, B, H', W', D].
    """
    count = len(rhs)
    if lhs.ndim == rhs.ndim:
        stride, pads, dilation = max(count - 1, 1), (0, 0), count
    else:
        lhs, rhs = lhs[None], rhs[::-1]
        stride, pads, dilation = 1, (count - 1, count - 1), 1
    return lax.conv_general_dilated(
        lhs,
        rhs,
        (stride, *window_strides),
        (pads, *padding),
        (dilation, *lhs_dilation),
        (1, *rhs_dilation),
        ('DNHWC', 'DHWIO', 'DNHWC'),
        **options,
    )


# A convolution that `vmap` over kernels turns into `_joint_convolution`; a `custom_vmap` function
# would have no reverse mode.
_joined = core.Primitive('joined_convolution')
_joined.def_impl(lax.conv_general_dilated)
_joined.def_abstract_eval(
    lambda lhs, rhs, **options: jax.make_jaxpr(
        functools.partial(lax.conv_general_dilated, **options)
    )(lhs, rhs).out_avals[0]
)
mlir.register_lowering(_joined, mlir.lower_fun(lax.conv_general_dilated, multiple_results=False))


def _joined_jvp(operands, tangents, **options):
    tangents = map(ad.instantiate_zeros, tangents)
    convolve = functools.partial(lax.conv_general_dilated, **options)
    return jax.jvp(convolve, operands, tuple(tangents))


def _joined_batch(operands, axes, **options):
    lhs, rhs = (
        x if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(operands, axes, strict=True)
    )
    if axes[1] is not None:
        return _joint_convolution(lhs, rhs, **options), 0
    # JAX takes maps of several branches for a larger batch.
    return jax.vmap(functools.partial(lax.conv_general_dilated, **options), (0, None))(lhs, rhs), 0


ad.primitive_jvps[_joined] = _joined_jvp
batching.primitive_batchers[_joined] = _joined_batch


def joint_conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """`lax.conv_general_dilated` that `vmap` turns into one convolution, the fastest on TPU."""
    options = _hashable(window_strides=window_strides, padding=padding, **options)
    return _joined.bind(lhs, rhs, **options)


def conv_general_dilated(*arguments: Any, **options: Any) -> jax.Array:
    """`lax.conv_general_dilated` with the faster `vmap` for the platform of the mesh."""
    convolve = joint_conv_general_dilated if runs_on_tpu() else dense_conv_general_dilated
    return convolve(*arguments, **options)
