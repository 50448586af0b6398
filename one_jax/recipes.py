"""The published training recipes, which the files in configs/ share."""

from typing import Any

from ml_collections import config_dict

from one_jax import config as config_lib

# What a data set changes in the default, which is the recipe for CIFAR (Lan et al. 2018, section
# 4.1, and the authors' code).
_DATA_FIELDS: dict[str, dict[str, Any]] = {
    'cifar10': {},
    'cifar100': {},
    'cinic10': {},
    'svhn': {'train.epochs': 40},
    'imagenet2012': {
        'data.batch_size': 256,
        'data.eval_batch_size': 256,
        'optimizer.milestones': (1 / 3, 2 / 3),
        'train.epochs': 90,
        'train.log_every': 100,
    },
}
# In the `:smoke` variant a small network of the same family stands in: it compiles in seconds.
_SMOKE_NETWORKS = {
    'resnet32': 'resnet8',
    'resnet110_bottleneck': 'resnet11_bottleneck',
    'resnext29_8x64d': 'resnext11_2x8d',
    'densenet190_40': 'densenet16_4',
    'resnet18': 'resnet10_tiny',
    'resnext50_32x4d': 'resnext14_tiny',
    'seresnet18': 'seresnet10_tiny',
}
# Batches of a few large images.
_IMAGENET_SMOKE = {
    'data.generated_examples': 16,
    'data.batch_size': 8,
    'data.eval_batch_size': 8,
    'train.steps': 2,
    'train.log_every': 1,
}


def published(network: str, data: str, options: str = '') -> config_dict.ConfigDict:
    """ONE as published, on one of the paper's networks and data sets or on CINIC-10.

    Args:
      network: a name of `one_jax.models`.
      data: a name of the table above.
      options: comma-separated; 'plain' and 'smoke', see `config.apply_options`.
    """
    config = config_lib.default_config()
    config.model.name = network
    config.data.name = data
    config.update_from_flattened_dict(_DATA_FIELDS[data])
    smoke = _IMAGENET_SMOKE if data == 'imagenet2012' else {}
    smoke = {**smoke, 'model.name': _SMOKE_NETWORKS[network]}
    return config_lib.apply_options(config, options, smoke=smoke)
