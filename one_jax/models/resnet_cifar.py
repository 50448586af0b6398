"""The CIFAR ResNets (He et al. 2016, section 4.2), of basic blocks and of bottlenecks."""

import functools
from collections.abc import Callable

import jax
from flax import linen as nn

from one_jax.models.backbone import Backbone
from one_jax.models.resnet import BottleneckBlock, ResNet


class CifarResNet(ResNet):
    """Three stages behind one 3x3 convolution, as wide as stage 1, for images of about 32x32."""

    stage_sizes: tuple[int, ...] = (5, 5, 5)
    width: int = 16

    def stem(self, x: jax.Array, conv: Callable, norm: Callable) -> jax.Array:
        return nn.relu(norm(name='bn1')(conv(self.width, 3, name='conv1')(x)))


def cifar_resnet(depth: int) -> Callable[..., Backbone]:
    """The constructor of the CIFAR ResNet of basic blocks that is `depth` = 6n + 2 layers deep."""
    return functools.partial(CifarResNet, stage_sizes=((depth - 2) // 6,) * 3)


_bottleneck = functools.partial(CifarResNet, block=BottleneckBlock)

NETWORKS: dict[str, Callable[..., Backbone]] = {
    # The smallest with bottlenecks, for tests.
    'resnet11_bottleneck': functools.partial(_bottleneck, stage_sizes=(1, 1, 1)),
    'resnet110_bottleneck': functools.partial(_bottleneck, stage_sizes=(18, 18, 18)),
    'resnet110_bottleneck12': functools.partial(_bottleneck, stage_sizes=(12, 12, 12)),
}
