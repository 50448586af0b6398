"""Wide ResNets for CIFAR (Zagoruyko & Komodakis 2016): pre-activation blocks, k times as wide.

Three stages of n blocks of width 16k, 32k and 64k. Where the channels change, both paths share the
block's first BN-ReLU, and the shortcut is a 1x1 convolution without batch normalisation. The last
stage is followed by BN-ReLU. Unlike the authors', the classifier's bias does not start at zero.

The authors count the shortcuts' convolutions, so their depths are 6n + 4: WRN-16-2 has n = 2 and
WRN-40-2 n = 6. "WRN-20-8" in the distillation papers does not have that form; it can mean two
networks:

- `wrn20_8`: the wide ResNet with n = 3, counted like a ResNet, 6n + 2; WRN-22-8 for its authors;
- `wrn20_8_bottleneck`: `wide_resnet20_8` in code that descends from OKDDip's: without
  pre-activation, a CIFAR ResNet of 2-2-2 bottlenecks (9n + 2 layers) with 3x3 convolutions eight
  times as wide.
"""

import functools
from collections.abc import Callable

import jax
from flax import linen as nn

from one_jax.models.backbone import Backbone
from one_jax.models.layers import remat
from one_jax.models.resnet import BottleneckBlock
from one_jax.models.resnet_cifar import CifarResNet


class PreActivationBlock(nn.Module):
    """BN-ReLU-3x3 twice; the first has the stride.

    Attributes:
      width: channels of both convolutions.
      stride: 1 or 2.
      conv, norm: see `layers.make_conv` and `layers.make_norm`.
    """

    width: int
    stride: int
    conv: Callable
    norm: Callable

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, width]."""
        y = nn.relu(self.norm(name='bn1')(x))
        if x.shape[-1] != self.width:
            x = self.conv(self.width, 1, self.stride, name='shortcut')(y)
        y = self.conv(self.width, 3, self.stride, name='conv1')(y)
        y = nn.relu(self.norm(name='bn2')(y))
        return x + self.conv(self.width, 3, name='conv2')(y)


class WideResNet(Backbone):
    """Three stages, the last two with stride 2.

    Attributes:
      blocks_per_stage: n.
      widening: k.
    """

    blocks_per_stage: int = 2
    widening: int = 2

    can_scale = True

    @property
    def num_stages(self) -> int:
        return 3

    def stem(self, x: jax.Array, conv: Callable, norm: Callable) -> jax.Array:
        return conv(16, 3, name='conv1')(x)

    def stage(self, x: jax.Array, number: int, conv: Callable, norm: Callable) -> jax.Array:
        block = remat(PreActivationBlock, self.remat)
        for index in range(self.blocks_per_stage):
            stride = 2 if number > 1 and index == 0 else 1
            width = self.scaled(self.widening * 16 * 2 ** (number - 1))
            x = block(width, stride, conv, norm, name=f'layer{number}_{index}')(x)
        return x

    def last_maps(self, x: jax.Array, norm: Callable) -> jax.Array:
        return nn.relu(norm(name='bn1')(x))


NETWORKS: dict[str, Callable[..., Backbone]] = {
    'wrn16_2': functools.partial(WideResNet, blocks_per_stage=2, widening=2),
    'wrn40_2': functools.partial(WideResNet, blocks_per_stage=6, widening=2),
    'wrn20_8': functools.partial(WideResNet, blocks_per_stage=3, widening=8),
    'wrn20_8_bottleneck': functools.partial(
        CifarResNet,
        stage_sizes=(2, 2, 2),
        block=functools.partial(BottleneckBlock, inner_ratio=8),
    ),
    # For tests and smoke runs.
    'wrn10_1': functools.partial(WideResNet, blocks_per_stage=1, widening=1),
}
