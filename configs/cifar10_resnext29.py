"""ResNeXt-29 8x64d on CIFAR-10 with ONE: three branches above two shared stages.

Source: Lan, Zhu, Gong, "Knowledge Distillation by On-the-Fly Native Ensemble", NeurIPS 2018. Images
    are padded by 4 pixels, cropped and flipped. The authors' released code lacks this network: the
    recipe follows the paper.
Prepare: python -m one_jax.prepare cifar10
Run: python -m one_jax.main --config=configs/cifar10_resnext29.py
Parameters: 34,426,698 deployed, 86,943,079 in training.
Expected: no published number that we could check. Not run here for lack of CIFAR-10.
Options: any method but boc_kd, e.g. `:okddip`; `:plain`, the network alone; `:smoke`, four steps of
    ResNeXt-11 2x8d on generated images.
"""

from configs import common
from one_jax.config import default_config


def get_config(options: str = ''):
    """Returns the recipe with the comma-separated `options` applied."""
    config = default_config()
    config.model.name = 'resnext29_8x64d'
    config.data.name = 'cifar10'
    config.data.batch_size = 128
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 1e-4
    config.optimizer.schedule = 'step'
    config.optimizer.milestones = (0.5, 0.75)
    config.train.epochs = 300
    return common.apply_options(config, options, smoke={'model.name': 'resnext11_2x8d'})
