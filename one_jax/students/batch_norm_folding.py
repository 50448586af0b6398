"""Folds batch normalisations into the convolutions before them, for deployment.

At evaluation a batch normalisation is scale * (x - mean) / sqrt(var + epsilon) + bias, the same
linear map at every pixel, so the convolution before it can apply it with another kernel and a bias.
That is impossible if an activation or a sum stands between the two, as in pre-activation networks.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from one_jax.errors import require

Path = tuple[str, ...]
Context = nn.module.InterceptorContext


@dataclasses.dataclass(frozen=True)
class FoldedNetwork:
    """A drop-in replacement for `network` with the variables of `fold`."""

    network: nn.Module

    def init(self, key: jax.Array, images: jax.Array, train: bool) -> dict[str, Any]:
        """Returns random variables; see `nn.Module.init`."""
        return fold(self.network, self.network.init(key, images, train=train), images)

    def apply(self, variables: Mapping[str, Any], images: jax.Array, train: bool) -> Any:
        """Returns the network's outputs; see `nn.Module.apply`."""
        with nn.intercept_methods(_call_folded):
            return self.network.apply(variables, images, train=train)


def fold(network: nn.Module, variables: Mapping[str, Any], images: Any) -> dict[str, Any]:
    """Returns variables of `FoldedNetwork(network)` that compute the same at evaluation.

    They lack the normalisations, and have a `bias` in every convolution before one. Branches may be
    stacked. Only the shape of `images` [B, H, W, 3] is used. Raises `ConfigError` if a batch
    normalisation does not follow a convolution.
    """
    pairs = _find_pairs(network, variables, images)
    params = traverse_util.flatten_dict(variables['params'])
    statistics = traverse_util.flatten_dict(variables['batch_stats'])
    for norm, (conv, epsilon) in pairs.items():
        scale = params.pop((*norm, 'scale')) / jnp.sqrt(statistics.pop((*norm, 'var')) + epsilon)
        shift = params.pop((*norm, 'bias')) - statistics.pop((*norm, 'mean')) * scale
        # Stacked branches have their axis in front: [K, h, w, in, out], [K, out].
        params[*conv, 'kernel'] = params[*conv, 'kernel'] * scale[..., None, None, None, :]
        params[*conv, 'bias'] = shift + scale * params.get((*conv, 'bias'), jnp.zeros_like(scale))
    trees = {'params': params, 'batch_stats': statistics}
    return {name: traverse_util.unflatten_dict(tree) for name, tree in trees.items()}


def _find_pairs(
    network: nn.Module, variables: Mapping[str, Any], images: Any
) -> dict[Path, tuple[Path, float]]:
    """Runs any network on abstract values; finds each normalisation's convolution and epsilon."""
    made_by: dict[int, tuple[Any, Path]] = {}
    pairs: dict[Path, tuple[Path, float]] = {}

    def watch(call: Callable, args: Any, kwargs: Any, context: Context) -> Any:
        module, output = context.module, call(*args, **kwargs)
        if isinstance(module, nn.Conv):
            # Keeping the value keeps its id unique.
            made_by[id(output)] = output, module.path
        # The aggregator's normalisation, over K numbers per image, is not folded.
        elif isinstance(module, nn.BatchNorm) and module.path[0] != 'aggregator':
            _, conv = made_by.get(id(args[0]), (None, None))
            # The output of a convolution in another module may have other uses too, as the stem's
            # of a pre-activation network has.
            follows = conv is not None and conv[:-1] == module.path[:-1]
            allowed = (
                f'False: {".".join(module.path)} follows no convolution, as in all pre-activation '
                'networks (wide ResNets, DenseNets); export without it'
            )
            require(follows, 'fold_batch_norm', True, allowed)
            pairs[module.path] = conv, module.epsilon
        return output

    with nn.intercept_methods(watch):
        jax.eval_shape(lambda v, x: network.apply(v, x, train=False), variables, images)
    return pairs


def _call_folded(call: Callable, args: Any, kwargs: Any, context: Context) -> Any:
    """Calls a layer of a `FoldedNetwork`."""
    module = context.module
    if isinstance(module, nn.BatchNorm) and not module.has_variable('params', 'scale'):
        return args[0]
    output = call(*args, **kwargs)
    # Convolutions of the aggregator are not folded.
    folded = isinstance(module, nn.Conv) and module.has_variable('params', 'bias')
    if folded and not module.use_bias:
        bias = jnp.asarray(module.get_variable('params', 'bias'), output.dtype)
        output += bias.reshape((1,) * (output.ndim - 1) + (-1,))
    return output
