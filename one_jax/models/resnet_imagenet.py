"""ResNets, ResNeXts and SE-ResNets for images of about 224x224, as torchvision defines them.

A 7x7 convolution with stride 2 and a 3x3 max-pool with stride 2, then four stages. Parameter names
and initialisation are torchvision's (a block's last batch normalisation does not start at zero).
SE-ResNet-18, which torchvision lacks, is ResNet-18 with a squeeze-and-excitation in every block,
before the addition.
"""

import functools
from collections.abc import Callable

import jax
from flax import linen as nn

from one_jax.models.backbone import Backbone
from one_jax.models.resnet import BasicBlock, BottleneckBlock, ResNet


class ImageNetResNet(ResNet):
    """Four stages, at 1/4 to 1/32 of the image's height and width."""

    def stem(self, x: jax.Array, conv: Callable, norm: Callable) -> jax.Array:
        x = norm(name='bn1')(conv(self.width, 7, 2, name='conv1')(x))
        # The maximum and ReLU commute, and a quarter of the pixels is left.
        return nn.relu(nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1))))


_tiny = functools.partial(ImageNetResNet, stage_sizes=(1, 1, 1, 1), width=8)

NETWORKS: dict[str, Callable[..., Backbone]] = {
    'resnet18': functools.partial(ImageNetResNet, stage_sizes=(2, 2, 2, 2)),
    'resnet34': functools.partial(ImageNetResNet, stage_sizes=(3, 4, 6, 3)),
    'resnet50': functools.partial(ImageNetResNet, stage_sizes=(3, 4, 6, 3), block=BottleneckBlock),
    'resnext50_32x4d': functools.partial(
        ImageNetResNet,
        stage_sizes=(3, 4, 6, 3),
        block=functools.partial(BottleneckBlock, inner_ratio=2, groups=32),
    ),
    'seresnet18': functools.partial(
        ImageNetResNet,
        stage_sizes=(2, 2, 2, 2),
        block=functools.partial(BasicBlock, se_reduction=16),
    ),
    # For tests and smoke runs: one block a stage, and an eighth of the width.
    'resnet10_tiny': _tiny,
    'resnet14_tiny': functools.partial(_tiny, block=BottleneckBlock),
    'resnext14_tiny': functools.partial(
        _tiny, block=functools.partial(BottleneckBlock, inner_ratio=2, groups=4)
    ),
    'seresnet10_tiny': functools.partial(
        _tiny, block=functools.partial(BasicBlock, se_reduction=4)
    ),
}
