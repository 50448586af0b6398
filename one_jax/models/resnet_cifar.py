"""CIFAR ResNets (He et al. 2016, section 4.2), and what the distillation papers call ResNet-110.

Post-activation blocks; the projection shortcut ("type B": 1x1 convolution and batch normalisation)
wherever the stride or the number of channels changes. That choice reproduces the costs printed in
the ONE paper.
"""

from collections.abc import Callable, Sequence

import jax
from flax import linen as nn

from one_jax.models.backbone import Backbone


def _shortcut(x: jax.Array, shape: Sequence[int], stride: int, conv: Callable, norm: Callable):
    """The identity where it fits `shape`, else a projection to it."""
    if x.shape == shape:
        return x
    return norm(name='downsample_1')(conv(shape[-1], 1, stride, name='downsample_0')(x))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, the first with the stride."""

    width: int
    stride: int
    conv: Callable
    norm: Callable

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, width]."""
        y = self.conv(self.width, 3, self.stride, name='conv1')(x)
        y = nn.relu(self.norm(name='bn1')(y))
        y = self.conv(self.width, 3, name='conv2')(y)
        y = self.norm(name='bn2')(y)
        return nn.relu(y + _shortcut(x, y.shape, self.stride, self.conv, self.norm))


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions to four times the width; the stride is on the 3x3."""

    width: int
    stride: int
    conv: Callable
    norm: Callable

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, 4 * width]."""
        y = nn.relu(self.norm(name='bn1')(self.conv(self.width, 1, name='conv1')(x)))
        y = self.conv(self.width, 3, self.stride, name='conv2')(y)
        y = nn.relu(self.norm(name='bn2')(y))
        y = self.norm(name='bn3')(self.conv(4 * self.width, 1, name='conv3')(y))
        return nn.relu(y + _shortcut(x, y.shape, self.stride, self.conv, self.norm))


class CifarResNet(Backbone):
    """Three stages of `blocks_per_stage` blocks, of width 16, 32 and 64, the last two with stride
    2.

    Attributes:
      blocks_per_stage: n; depth is 6n + 2 with basic blocks, 9n + 2 with bottlenecks.
      block: `BasicBlock` or `BottleneckBlock`.
    """

    blocks_per_stage: int = 5
    block: type[nn.Module] = BasicBlock

    @property
    def num_stages(self) -> int:
        return 3

    def stem(self, x: jax.Array, conv: Callable, norm: Callable) -> jax.Array:
        return nn.relu(norm(name='bn1')(conv(16, 3, name='conv1')(x)))

    def stage(self, x: jax.Array, number: int, conv: Callable, norm: Callable) -> jax.Array:
        for index in range(self.blocks_per_stage):
            stride = 2 if number > 1 and index == 0 else 1
            width = 16 * 2 ** (number - 1)
            name = f'layer{number}_{index}'
            x = self.block(width, stride, conv, norm, name=name)(x)
        return x
