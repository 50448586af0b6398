"""Residual blocks and stages (He et al. 2016), which the CIFAR and ImageNet ResNets share.

Post-activation blocks with projection shortcuts ("type B": 1x1 convolution and batch normalisation)
wherever the stride or the number of channels changes, as in torchvision. On CIFAR this reproduces
the costs printed in the ONE paper.
"""

from collections.abc import Callable, Sequence

import jax
from flax import linen as nn

from one_jax.models.backbone import Backbone
from one_jax.models.layers import SqueezeExcitation, remat


def _shortcut(x: jax.Array, shape: Sequence[int], stride: int, conv: Callable, norm: Callable):
    """Returns `x` if it has `shape`, else a projection to it."""
    if x.shape == shape:
        return x
    return norm(name='downsample_1')(conv(shape[-1], 1, stride, name='downsample_0')(x))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the first has the stride.

    Attributes:
      width: channels of both.
      stride: 1 or 2.
      conv, norm: see `layers.make_conv` and `layers.make_norm`.
      se_reduction: of a squeeze-and-excitation before the addition, or None.
    """

    width: int
    stride: int
    conv: Callable
    norm: Callable
    se_reduction: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, width]."""
        y = self.conv(self.width, 3, self.stride, name='conv1')(x)
        y = nn.relu(self.norm(name='bn1')(y))
        y = self.conv(self.width, 3, name='conv2')(y)
        y = self.norm(name='bn2')(y)
        if self.se_reduction is not None:
            y = SqueezeExcitation(self.se_reduction, name='se')(y)
        return nn.relu(y + _shortcut(x, y.shape, self.stride, self.conv, self.norm))


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions to four times the width; the stride is on the 3x3.

    Attributes:
      width: a quarter of the output's channels.
      stride: 1 or 2.
      conv, norm: see `layers.make_conv` and `layers.make_norm`.
      inner_ratio: channels of the 3x3 convolution over `width`.
      groups: of the 3x3 convolution.
    """

    width: int
    stride: int
    conv: Callable
    norm: Callable
    inner_ratio: int = 1
    groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, 4 * width]."""
        inner = self.inner_ratio * self.width
        y = nn.relu(self.norm(name='bn1')(self.conv(inner, 1, name='conv1')(x)))
        y = self.conv(inner, 3, self.stride, self.groups, name='conv2')(y)
        y = nn.relu(self.norm(name='bn2')(y))
        y = self.norm(name='bn3')(self.conv(4 * self.width, 1, name='conv3')(y))
        return nn.relu(y + _shortcut(x, y.shape, self.stride, self.conv, self.norm))


class ResNet(Backbone):
    """Stages of residual blocks; the width doubles and the stride is 2 from the second stage on.

    Attributes:
      stage_sizes: the number of blocks in each stage.
      width: of the blocks in stage 1.
      block: `BasicBlock` or `BottleneckBlock`, called with (width, stride, conv, norm, name=...).
    """

    stage_sizes: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64
    block: Callable[..., nn.Module] = BasicBlock

    @property
    def num_stages(self) -> int:
        return len(self.stage_sizes)

    @property
    def can_scale(self) -> bool:
        """Whether there are no groups, which would have to divide the width."""
        return getattr(self.block, 'keywords', {}).get('groups', 1) == 1

    def stage(self, x: jax.Array, number: int, conv: Callable, norm: Callable) -> jax.Array:
        block = remat(self.block, self.remat)
        for index in range(self.stage_sizes[number - 1]):
            stride = 2 if number > 1 and index == 0 else 1
            width = self.scaled(self.width * 2 ** (number - 1))
            x = block(width, stride, conv, norm, name=f'layer{number}_{index}')(x)
        return x
