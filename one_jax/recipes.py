"""The published training recipes, which the files in configs/ share."""

from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from one_jax import config as config_lib
from one_jax.data.table import DATASETS

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
    'resnet20': 'resnet8',
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

# What a method's papers change in the recipe; what is the method's own are its defaults.
_METHOD_FIELDS: dict[str, dict[str, Any]] = {
    'okddip': {'optimizer.weight_decay': 5e-4},
    'mde': {'optimizer.weight_decay': 5e-4},
}
# Options that a method adds to those of every recipe.
_METHOD_OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    'mde': {
        'paper': {
            'method.diversity_side': 'feature',
            'method.diversity_norm': 'fro',
            'method.diversity_weight': 5e-8,
        },
    },
}
# EKD's limited data: images of a class.
_EKD_PER_CLASS = (50, 100)


def published(
    network: str, data: str, options: str = '', method: str = 'one', **fields: Any
) -> config_dict.ConfigDict:
    """A method in the recipe of ONE's paper, on one of its data sets or on CINIC-10.

    Args:
      network: a name of `one_jax.models`.
      data: a name of the table above.
      options: comma-separated; 'plain' and 'smoke', see `config.apply_options`; 'paper' for MDE;
        'per_class_50' and 'per_class_100' for EKD on CIFAR: so few images, as many steps.
      method: a name of `one_jax.methods`; its settings are the method's own defaults.
      **fields: of `config.method`, where they differ from those.
    """
    config = config_lib.default_config()
    config.model.name = network
    config.data.name = data
    config.update_from_flattened_dict(_DATA_FIELDS[data])
    _set_method(config, method, fields)
    smoke = _IMAGENET_SMOKE if data == 'imagenet2012' else {}
    smoke = {**smoke, 'model.name': _SMOKE_NETWORKS[network]}
    variants = dict(_METHOD_OPTIONS.get(method, {}))
    if method == 'ekd':
        variants |= {f'per_class_{n}': _limited(config, n) for n in _EKD_PER_CLASS}
    return config_lib.apply_options(config, options, smoke=smoke, **variants)


def mnist5k(options: str = '', method: str = 'one', **fields: Any) -> config_dict.ConfigDict:
    """A method on ResNet-8 and 5,000 MNIST digits: the recipe of the demo.

    Args:
      options: comma-separated; 'plain' and 'smoke', see `config.apply_options`; 'few' for 50 images
        of each class and 300 steps; 'paper' for MDE.
      method: a name of `one_jax.methods`; its settings are the method's own defaults.
      **fields: of `config.method`, where they differ from those.
    """
    config = config_lib.default_config()
    config.model.name = 'resnet8'
    config.data.name = 'mnist5k'
    config.data.batch_size = 100
    config.optimizer.weight_decay = 5e-4
    config.optimizer.schedule = 'cosine'
    config.train.epochs = 12
    config.train.log_every = 20
    _set_method(config, method, fields)
    few = {
        'data.examples_per_class': 50,
        'train.epochs': 60,
        'train.eval_every_epochs': 4,
        'train.checkpoint_every_epochs': 4,
    }
    return config_lib.apply_options(config, options, few=few, **_METHOD_OPTIONS.get(method, {}))


def _set_method(config: config_dict.ConfigDict, method: str, fields: Mapping[str, Any]) -> None:
    config.method.name = method
    config.update_from_flattened_dict(_METHOD_FIELDS.get(method, {}))
    config.method.update(fields)


def _limited(config: config_dict.ConfigDict, per_class: int) -> dict[str, Any]:
    """So many images of each class, with the steps and evaluations that all of them would take."""
    spec = DATASETS[config.data.name]
    steps_per_epoch = spec.num_train // config.data.batch_size
    limited = per_class * spec.num_classes // config.data.batch_size
    return {
        'data.examples_per_class': per_class,
        'train.steps': config.train.epochs * steps_per_epoch,
        'train.eval_every_epochs': steps_per_epoch // limited,
        'train.checkpoint_every_epochs': steps_per_epoch // limited,
    }
