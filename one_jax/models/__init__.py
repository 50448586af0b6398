"""Networks by name.

CIFAR ResNets are named by their depth, `resnet8`, `resnet14`, `resnet20`, `resnet32`, ..., any 6n +
2 save 50 and 152: `resnet18`, `resnet34` and `resnet50` are ImageNet's, and so would 152 be.
Three different networks are called "ResNet-110" in the literature:

- `resnet110`: basic blocks, n = 18 (He et al.);
- `resnet110_bottleneck`: bottleneck blocks, n = 18, 164 layers deep: the ONE authors' code;
- `resnet110_bottleneck12`: bottleneck blocks, n = 12, 110 layers deep: OKDDip and its descendants.

The others, each described where it is defined:

- for 32x32: `resnext29_8x64d`, `densenet190_40`, `densenet40_12`, `wrn16_2`, `wrn40_2`, `wrn20_8`,
  `wrn20_8_bottleneck`, `vgg16`;
- for 224x224: `resnet18`, `resnet34`, `resnet50`, `resnext50_32x4d`, `seresnet18`;
- for tests and smoke runs, compiled in seconds: `resnet8`, `resnet11_bottleneck`, `resnext11_2x8d`,
  `densenet16_4`, `wrn10_1`, `vgg6_tiny`, `resnet10_tiny`, `resnet14_tiny`, `resnext14_tiny`,
  `seresnet10_tiny`.

`resnet32@0.6` is `resnet32` with its stages' channels at 60 %, rounded; the stem stays as it is.
ResNets without groups, wide ResNets and VGG can be scaled so.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from one_jax.errors import ConfigError
from one_jax.models import (
    densenet,
    resnet,
    resnet_cifar,
    resnet_imagenet,
    resnext_cifar,
    vgg,
    wide_resnet,
)
from one_jax.models.backbone import Backbone
from one_jax.models.multibranch import MultiBranch

NETWORKS: dict[str, Callable[..., Backbone]] = {
    **resnet_cifar.NETWORKS,
    **resnext_cifar.NETWORKS,
    **densenet.NETWORKS,
    **wide_resnet.NETWORKS,
    **vgg.NETWORKS,
    **resnet_imagenet.NETWORKS,
}


def network(name: str) -> Callable[..., Backbone]:
    """The constructor of the network called `name`; it wants `num_classes`.

    Raises:
      ConfigError: there is no network of that name.
    """
    if name in NETWORKS:
        return NETWORKS[name]
    if scaled := re.fullmatch(r'([^@]+)@(0\.\d+|1)', name):
        return _scaled(network(scaled[1]), name, float(scaled[2]))
    depth = re.fullmatch(r'resnet([1-9]\d*)', name)
    # 152 is of the form too, but the field reads it as ImageNet's.
    if depth and 8 <= int(depth[1]) <= 1202 and int(depth[1]) % 6 == 2 and int(depth[1]) != 152:
        return resnet_cifar.cifar_resnet(int(depth[1]))
    known = ', '.join(NETWORKS)
    allowed = f'one of {known}, or resnetN with N = 6n + 2: resnet8, resnet20, ..., resnet1202'
    raise ConfigError('model.name', name, allowed)


def _scaled(constructor: Callable[..., Backbone], name: str, ratio: float) -> Callable:
    example = constructor(num_classes=2)
    grouped = getattr(getattr(example, 'block', None), 'keywords', {}).get('groups', 1) > 1
    if grouped or not isinstance(example, resnet.ResNet | wide_resnet.WideResNet | vgg.VGG):
        raise ConfigError('model.name', name, 'a ResNet without groups, wide ResNet or VGG')
    if not ratio > 0:
        raise ConfigError('model.name', name, 'a width above 0 and at most 1, as in resnet32@0.6')
    return functools.partial(constructor, width_ratio=ratio)


def has_blocks(name: str) -> bool:
    """Whether the network `name` is of blocks, which `model.keep_activations` is about."""
    return not isinstance(network(name)(num_classes=2), vgg.VGG)


def make_backbone(
    name: str,
    num_classes: int,
    dtype: Any = jnp.float32,
    norm_axis_name: str | None = None,
    branch_conv: str = 'dense',
    keep_activations: str = 'all',
) -> Callable[..., Backbone]:
    """A constructor of segments of the network `name`; the arguments are `Backbone`'s."""
    return functools.partial(
        network(name),
        num_classes=num_classes,
        dtype=jnp.dtype(dtype),
        norm_axis_name=norm_axis_name,
        branch_conv=branch_conv,
        keep_activations=keep_activations,
    )


def make_network(
    model_config: Any,
    num_classes: int,
    method: Any = None,
    norm_axis_name: str | None = None,
) -> MultiBranch:
    """The network that is trained, from the group `model` of a resolved configuration.

    Args:
      model_config: `name`, `num_branches`, `share_stages`, `dtype`, `branch_conv`,
        `keep_activations`.
      num_classes: of the data set.
      method: a `methods.Method`, for its members and its aggregator; None for the members of
        `model_config` alone.
      norm_axis_name: mesh axis of synchronised batch normalisation, or None.
    """
    dtype = jnp.dtype(model_config.dtype)
    names = method.members if method else (model_config.name,) * model_config.num_branches
    make_aggregator = method.make_aggregator if method else None
    if make_aggregator is not None:
        make_aggregator = functools.partial(
            make_aggregator, dtype=dtype, norm_axis_name=norm_axis_name
        )
    return MultiBranch(
        make_backbones=tuple(
            make_backbone(
                name,
                num_classes,
                dtype,
                norm_axis_name,
                model_config.branch_conv,
                model_config.keep_activations,
            )
            for name in (names[:1] if len(set(names)) == 1 else names)
        ),
        num_branches=len(names),
        share_stages=model_config.share_stages,
        share_stem=method.shares_stem if method else False,
        make_aggregator=make_aggregator,
        trunk_gradient=method.trunk_gradient if method else 1.0,
    )
