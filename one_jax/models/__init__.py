"""Networks by name.

CIFAR ResNets are named by depth: `resnet8`, `resnet14`, `resnet20`, `resnet32`, ..., any 6n + 2
except 50 and 152: `resnet18`, `resnet34` and `resnet50` are ImageNet's, and so is 152.
The literature calls three different networks "ResNet-110":

- `resnet110`: basic blocks, n = 18 (He et al.);
- `resnet110_bottleneck`: bottleneck blocks, n = 18, 164 layers deep: the ONE authors' code;
- `resnet110_bottleneck12`: bottleneck blocks, n = 12, 110 layers deep: OKDDip and its descendants.

Other networks, each described in its file:

- for 32x32: `resnext29_8x64d`, `densenet190_40`, `densenet40_12`, `wrn16_2`, `wrn40_2`, `wrn20_8`,
  `wrn20_8_bottleneck`, `vgg16`;
- for 224x224: `resnet18`, `resnet34`, `resnet50`, `resnext50_32x4d`, `seresnet18`;
- for tests and smoke runs, compiled in seconds: `resnet8`, `resnet11_bottleneck`, `resnext11_2x8d`,
  `densenet16_4`, `wrn10_1`, `vgg6_tiny`, `resnet10_tiny`, `resnet14_tiny`, `resnext14_tiny`,
  `seresnet10_tiny`.

`resnet32@0.6` is `resnet32` with 60 % of the channels in its stages, rounded down, and the same
stem. This works for ResNets without groups, wide ResNets and VGG.

To add a network see docs/add_a_network.md.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from one_jax.errors import ConfigError, require
from one_jax.models import densenet, resnet_cifar, resnet_imagenet, vgg, wide_resnet
from one_jax.models.backbone import Backbone
from one_jax.models.multibranch import MultiBranch

NETWORKS: dict[str, Callable[..., Backbone]] = {
    **resnet_cifar.NETWORKS,
    **densenet.NETWORKS,
    **wide_resnet.NETWORKS,
    **vgg.NETWORKS,
    **resnet_imagenet.NETWORKS,
}


def network(name: str) -> Callable[..., Backbone]:
    """Returns the constructor of the network `name`, which requires `num_classes`.

    Raises:
      ConfigError: there is no network of that name.
    """
    if name in NETWORKS:
        return NETWORKS[name]
    if scaled := re.fullmatch(r'([^@]+)@(0\.\d+|1)', name):
        constructor, ratio = network(scaled[1]), float(scaled[2])
        allowed = 'a ResNet without groups, wide ResNet or VGG'
        require(constructor(num_classes=2).can_scale, 'model.name', name, allowed)
        require(ratio > 0, 'model.name', name, 'a width above 0 and at most 1: resnet32@0.6')
        return functools.partial(constructor, width_ratio=ratio)
    depth = re.fullmatch(r'resnet([1-9]\d*)', name)
    # 152 has the form 6n + 2 too, but the field reads it as ImageNet's.
    if depth and 8 <= int(depth[1]) <= 1202 and int(depth[1]) % 6 == 2 and int(depth[1]) != 152:
        return resnet_cifar.cifar_resnet(int(depth[1]))
    known = ', '.join(NETWORKS)
    allowed = f'one of {known}, or resnetN with N = 6n + 2: resnet8, resnet20, ..., resnet1202'
    raise ConfigError('model.name', name, allowed)


def has_blocks(name: str) -> bool:
    """Returns whether the network `name` consists of blocks, which `model.remat` requires."""
    return network(name)(num_classes=2).has_blocks


def make_backbone(
    name: str,
    num_classes: int,
    dtype: Any = jnp.float32,
    norm_axis_name: str | None = None,
    branch_conv: str = 'dense',
    remat: str = 'none',
) -> Callable[..., Backbone]:
    """Returns a constructor of segments of the network `name`; the arguments are `Backbone`'s."""
    return functools.partial(
        network(name),
        num_classes=num_classes,
        dtype=jnp.dtype(dtype),
        norm_axis_name=norm_axis_name,
        branch_conv=branch_conv,
        remat=remat,
    )


def make_multibranch(
    model_config: Any,
    num_classes: int,
    method: Any = None,
    norm_axis_name: str | None = None,
) -> MultiBranch:
    """Makes the network to train.

    Args:
      model_config: the group `model` of a resolved config.
      num_classes: C.
      method: a `methods.Method`, for its branches and aggregator; None for identical branches.
      norm_axis_name: mesh axis of synchronised batch normalisation, or None.
    """
    dtype = jnp.dtype(model_config.dtype)
    names = method.branch_networks if method else (model_config.name,) * model_config.num_branches
    make_aggregator = method.make_aggregator if method else None
    if make_aggregator is not None:
        make_aggregator = functools.partial(
            make_aggregator, dtype=dtype, norm_axis_name=norm_axis_name
        )
    options = (dtype, norm_axis_name, model_config.branch_conv, model_config.remat)
    distinct = names[:1] if len(set(names)) == 1 else names
    return MultiBranch(
        make_backbones=tuple(make_backbone(name, num_classes, *options) for name in distinct),
        num_branches=len(names),
        share_stages=model_config.share_stages,
        share_stem=method.shares_stem if method else False,
        make_aggregator=make_aggregator,
        trunk_gradient=method.trunk_gradient if method else 1.0,
    )
