"""Batch normalisations made part of the convolutions before them, for deployment.

At evaluation a batch normalisation is scale * (x - mean) / sqrt(var + epsilon) + bias, the same
linear map at every pixel: a convolution before it takes it in as another kernel and a bias. Where
an activation or a sum stands between them, as in pre-activation networks, that cannot be done.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from one_jax.errors import UserError

Path = tuple[str, ...]
# The aggregator's normalisation, over K numbers an image, stays.
_AGGREGATOR = 'aggregator'


@dataclasses.dataclass(frozen=True)
class FoldedNetwork:
    """A network without the batch normalisations that were folded; used as the network itself.

    Its variables are those of `network` without the normalisations, and with a `bias` in every
    convolution that took one in.

    Attributes:
      network: called as `network(images, train)`.
    """

    network: nn.Module

    def init(self, key: jax.Array, images: jax.Array, train: bool) -> dict[str, Any]:
        """Random variables; the arguments are those of `nn.Module.init`."""
        return fold(self.network, self.network.init(key, images, train=train), images)

    def apply(self, variables: Mapping[str, Any], images: jax.Array, train: bool) -> Any:
        """The network's outputs; the arguments are those of `nn.Module.apply`."""
        with nn.intercept_methods(_call_folded):
            return self.network.apply(variables, images, train=train)


def fold(network: nn.Module, variables: Mapping[str, Any], images: Any) -> dict[str, Any]:
    """The variables of `FoldedNetwork(network)` that compute what `variables` do at evaluation.

    Args:
      network: called as `network(images, train)`; with stacked branches or not.
      variables: `{'params': ..., 'batch_stats': ...}`.
      images: an array or a `ShapeDtypeStruct` [B, H, W, 3]; nothing is computed of it.

    Raises:
      UserError: a batch normalisation does not follow a convolution.
    """
    pairs = _find_pairs(network, variables, images)
    params = traverse_util.flatten_dict(variables['params'])
    statistics = traverse_util.flatten_dict(variables['batch_stats'])
    for norm, (conv, epsilon) in pairs.items():
        scale = params.pop((*norm, 'scale')) / jnp.sqrt(statistics.pop((*norm, 'var')) + epsilon)
        shift = params.pop((*norm, 'bias')) - statistics.pop((*norm, 'mean')) * scale
        # Of stacked branches, the axis of the branches comes first: [K, h, w, in, out], [K, out].
        params[*conv, 'kernel'] = params[*conv, 'kernel'] * scale[..., None, None, None, :]
        params[*conv, 'bias'] = shift + scale * params.get((*conv, 'bias'), jnp.zeros_like(scale))
    return {
        'params': traverse_util.unflatten_dict(params),
        'batch_stats': traverse_util.unflatten_dict(statistics),
    }


def _find_pairs(
    network: nn.Module, variables: Mapping[str, Any], images: Any
) -> dict[Path, tuple[Path, float]]:
    """For each batch normalisation, the convolution that makes its input, and its epsilon.

    Found by running the network on abstract values, so it holds for any network.
    """
    made_by: dict[int, tuple[Any, Path]] = {}
    pairs: dict[Path, tuple[Path, float]] = {}

    def watch(call: Callable, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module, output = context.module, call(*args, **kwargs)
        if isinstance(module, nn.Conv):
            # The value is kept as well, so that its id is no other's.
            made_by[id(output)] = output, module.path
        elif isinstance(module, nn.BatchNorm) and module.path[0] != _AGGREGATOR:
            _, conv = made_by.get(id(args[0]), (None, None))
            # One from elsewhere may have its output used by others too, as a pre-activation
            # network's stem has.
            if conv is None or conv[:-1] != module.path[:-1]:
                raise UserError(
                    f'fold_batch_norm=True is not allowed: the batch normalisation '
                    f'{".".join(module.path)} follows no convolution, as in all pre-activation '
                    'networks (wide ResNets, DenseNets): export without it'
                )
            pairs[module.path] = conv, module.epsilon
        return output

    with nn.intercept_methods(watch):
        jax.eval_shape(lambda v, x: network.apply(v, x, train=False), variables, images)
    return pairs


def _call_folded(
    call: Callable, args: Any, kwargs: Any, context: nn.module.InterceptorContext
) -> Any:
    """How the layers of a `FoldedNetwork` are called."""
    module = context.module
    if isinstance(module, nn.BatchNorm) and not module.has_variable('params', 'scale'):
        return args[0]
    output = call(*args, **kwargs)
    # A convolution of the aggregator has taken in no normalisation.
    folded = isinstance(module, nn.Conv) and module.has_variable('params', 'bias')
    if folded and not module.use_bias:
        bias = jnp.asarray(module.get_variable('params', 'bias'), output.dtype)
        output += bias.reshape((1,) * (output.ndim - 1) + (-1,))
    return output
