"""DenseNet-BC for CIFAR (Huang et al. 2017): each layer appends k channels to its input.

Three blocks of (L - 4) / 6 bottleneck layers; between them a transition halves channels and size. A
stage is a block with the transition after it; the third has none. Parameters are named `conv1`,
`dense1.0`, ..., `trans1`, ..., `bn`, `fc`, as in a common PyTorch version for CIFAR.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from one_jax.models.backbone import Backbone
from one_jax.models.layers import remat


class DenseLayer(nn.Module):
    """BN-ReLU-1x1 to four times the growth, BN-ReLU-3x3 to the growth, appended to the input.

    Attributes:
      growth: k.
      conv, norm: see `layers.make_conv` and `layers.make_norm`.
    """

    growth: int
    conv: Callable
    norm: Callable

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, H, W, C + growth], the input's channels first."""
        y = nn.relu(self.norm(name='bn1')(x))
        y = self.conv(4 * self.growth, 1, name='conv1')(y)
        y = nn.relu(self.norm(name='bn2')(y))
        y = self.conv(self.growth, 3, name='conv2')(y)
        return jnp.concatenate([x, y], axis=-1)


class Transition(nn.Module):
    """BN-ReLU-1x1 to half the channels, then 2x2 average pooling."""

    conv: Callable
    norm: Callable

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, H // 2, W // 2, C // 2]."""
        y = nn.relu(self.norm(name='bn1')(x))
        y = self.conv(x.shape[-1] // 2, 1, name='conv1')(y)
        return nn.avg_pool(y, (2, 2), strides=(2, 2))


class DenseNet(Backbone):
    """DenseNet-BC of three stages.

    Attributes:
      layers_per_block: (L - 4) / 6; each has two convolutions.
      growth: k.
    """

    layers_per_block: int = 6
    growth: int = 12

    @property
    def num_stages(self) -> int:
        return 3

    def stem(self, x: jax.Array, conv: Callable, norm: Callable) -> jax.Array:
        return conv(2 * self.growth, 3, name='conv1')(x)

    def stage(self, x: jax.Array, number: int, conv: Callable, norm: Callable) -> jax.Array:
        layer = remat(DenseLayer, self.remat)
        for index in range(self.layers_per_block):
            x = layer(self.growth, conv, norm, name=f'dense{number}_{index}')(x)
        if number < self.num_stages:
            x = Transition(conv, norm, name=f'trans{number}')(x)
        return x

    def last_maps(self, x: jax.Array, norm: Callable) -> jax.Array:
        return nn.relu(norm(name='bn')(x))


NETWORKS: dict[str, Callable[..., Backbone]] = {
    'densenet190_40': functools.partial(DenseNet, layers_per_block=31, growth=40),
    'densenet40_12': functools.partial(DenseNet, layers_per_block=6, growth=12),
    # For tests and smoke runs.
    'densenet16_4': functools.partial(DenseNet, layers_per_block=2, growth=4),
}
