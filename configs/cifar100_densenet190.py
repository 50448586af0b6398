"""DenseNet-BC (190, 40) on CIFAR-100 with ONE: three branches above two shared stages.

Source: Lan, Zhu, Gong, "Knowledge Distillation by On-the-Fly Native Ensemble", NeurIPS 2018. Images
    are padded by 4 pixels, cropped and flipped. The authors' released code lacks this network: the
    recipe follows the paper.
Prepare: python -m one_jax.prepare cifar100
Run: python -m one_jax.main --config=configs/cifar100_densenet190.py
Parameters: 25,821,620 deployed, 45,430,679 in training.
Expected: no published number that we could check. Not run here for lack of CIFAR-100.
Options: any method but boc_kd, e.g. `:okddip`; `:plain`, the network alone; `:smoke`, four steps of
    DenseNet-BC (16, 4) on generated images.
"""

from configs import common
from one_jax.config import default_config


def get_config(options: str = ''):
    """Returns the recipe with the comma-separated `options` applied."""
    config = default_config()
    config.model.name = 'densenet190_40'
    config.data.name = 'cifar100'
    config.data.batch_size = 128
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 1e-4
    config.optimizer.schedule = 'step'
    config.optimizer.milestones = (0.5, 0.75)
    config.train.epochs = 300
    return common.apply_options(config, options, smoke={'model.name': 'densenet16_4'})
