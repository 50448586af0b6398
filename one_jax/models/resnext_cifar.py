"""CIFAR ResNeXts (Xie et al. 2017, section 5.2): CIFAR ResNets whose 3x3 convolution is grouped.

Three stages of three bottlenecks, 64 channels from the stem, 256, 512 and 1024 from the stages. In
"8x64d" the 3x3 convolution of stage 1 has 8 groups of 64 channels, hence eight times the block's
width; both double with every stage.
"""

import functools
from collections.abc import Callable

from one_jax.models.backbone import Backbone
from one_jax.models.resnet import BottleneckBlock
from one_jax.models.resnet_cifar import CifarResNet

NETWORKS: dict[str, Callable[..., Backbone]] = {
    'resnext29_8x64d': functools.partial(
        CifarResNet,
        stage_sizes=(3, 3, 3),
        width=64,
        block=functools.partial(BottleneckBlock, inner_ratio=8, groups=8),
    ),
    # The smallest, for tests and smoke runs: a block a stage, and a quarter of the width.
    'resnext11_2x8d': functools.partial(
        CifarResNet,
        stage_sizes=(1, 1, 1),
        width=16,
        block=functools.partial(BottleneckBlock, groups=2),
    ),
}
