"""The cost of a network: parameters, and FLOPs of the traced forward pass."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.extend import core


def count_parameters(params: Any) -> int:
    """Counts the scalars in a parameter tree of arrays or `ShapeDtypeStruct`s."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _equation_flops(equation: core.JaxprEqn) -> int:
    """Returns the FLOPs of a convolution or matrix product, 2 per multiply-add; else 0."""
    output = equation.outvars[0].aval
    if equation.primitive.name == 'conv_general_dilated':
        kernel = equation.invars[1].aval.shape
        out_channels = kernel[equation.params['dimension_numbers'].rhs_spec[0]]
        # The kernel's input channels are those of one group.
        return 2 * math.prod(output.shape) * math.prod(kernel) // out_channels
    if equation.primitive.name == 'dot_general':
        (contracted, _), _ = equation.params['dimension_numbers']
        lhs = equation.invars[0].aval.shape
        return 2 * math.prod(output.shape) * math.prod(lhs[axis] for axis in contracted)
    return 0


def count_jaxpr_flops(jaxpr: core.Jaxpr) -> int:
    """Counts the FLOPs of convolutions and matrix products in a jaxpr and the jaxprs it calls.

    Each called jaxpr counts once, so loops are not multiplied by their length.
    """
    flops = 0
    for equation in jaxpr.eqns:
        flops += _equation_flops(equation)
        for called in core.jaxprs_in_params(equation.params):
            flops += count_jaxpr_flops(called)
    return flops


def forward_cost(network: nn.Module, image_shape: tuple[int, int, int]) -> tuple[int, int]:
    """Counts the cost of one image's forward pass by abstract evaluation.

    Args:
      network: called as `network(images, train)`.
      image_shape: (H, W, 3).

    Returns:
      The number of parameters, and the FLOPs of convolutions and linear layers at 2 per
      multiply-add, the unit of the ONE paper's cost columns (there in 1e8).
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(
        lambda key, x: network.init(key, x, train=False), jax.random.key(0), images
    )
    jaxpr = jax.make_jaxpr(lambda v, x: network.apply(v, x, train=False))(variables, images)
    return count_parameters(variables['params']), count_jaxpr_flops(jaxpr.jaxpr)
