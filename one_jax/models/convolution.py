"""Convolutions that stay dense under `vmap` over branches."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend import core
from jax.interpreters import mlir


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
    hashable = {
        name: tuple(value) if isinstance(value, list) else value for name, value in options.items()
    }
    if not isinstance(padding, str):
        padding = tuple(map(tuple, padding))
    convolution = _dense_convolution(
        window_strides=tuple(window_strides), padding=padding, **hashable
    )
    return convolution(lhs, rhs)
