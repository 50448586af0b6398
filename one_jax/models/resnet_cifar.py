"""CIFAR ResNets (He et al. 2016, section 4.2) and ResNeXts (Xie et al. 2017, section 5.2)."""

import functools
from collections.abc import Callable

import jax
from flax import linen as nn

from one_jax.models.backbone import Backbone
from one_jax.models.resnet import BottleneckBlock, ResNet


class CifarResNet(ResNet):
    """Three stages after one 3x3 convolution, as wide as stage 1, for images of about 32x32."""

    stage_sizes: tuple[int, ...] = (5, 5, 5)
    width: int = 16

    def stem(self, x: jax.Array, conv: Callable, norm: Callable) -> jax.Array:
        return nn.relu(norm(name='bn1')(conv(self.width, 3, name='conv1')(x)))


def cifar_resnet(depth: int) -> Callable[..., Backbone]:
    """Returns the constructor of the CIFAR ResNet with basic blocks and `depth` = 6n + 2 layers."""
    return functools.partial(CifarResNet, stage_sizes=((depth - 2) // 6,) * 3)


_bottleneck = functools.partial(CifarResNet, block=BottleneckBlock)

NETWORKS: dict[str, Callable[..., Backbone]] = {
    # For tests.
    'resnet11_bottleneck': functools.partial(_bottleneck, stage_sizes=(1, 1, 1)),
    'resnet110_bottleneck': functools.partial(_bottleneck, stage_sizes=(18, 18, 18)),
    'resnet110_bottleneck12': functools.partial(_bottleneck, stage_sizes=(12, 12, 12)),
    # In stage 1 of "8x64d" the 3x3 convolution has 8 groups of 64 channels, eight times the block's
    # width; both double with every stage.
    'resnext29_8x64d': functools.partial(
        CifarResNet,
        stage_sizes=(3, 3, 3),
        width=64,
        block=functools.partial(BottleneckBlock, inner_ratio=8, groups=8),
    ),
    # For tests and smoke runs.
    'resnext11_2x8d': functools.partial(
        _bottleneck, stage_sizes=(1, 1, 1), block=functools.partial(BottleneckBlock, groups=2)
    ),
}
