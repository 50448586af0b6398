"""The ONE paper's ResNet-110 on CINIC-10 with ONE: three branches above two shared stages.

Source: Lan, Zhu, Gong, "Knowledge Distillation by On-the-Fly Native Ensemble", NeurIPS 2018. The
    paper does not use CINIC-10 (Darlow et al. 2018); this is its CIFAR recipe. Images are padded by
    4 pixels, cropped and flipped. The released code's network has 18 bottleneck blocks a stage,
    which makes 164 layers. For He's ResNet-110 set --config.model.name=resnet110, for OKDDip's
    resnet110_bottleneck12.
Prepare: python -m one_jax.prepare cinic10
Run: python -m one_jax.main --config=configs/cinic10_resnet110.py
Parameters: 1,704,154 deployed, 4,294,263 in training.
Expected: no published number that we could check. Not run here for lack of CINIC-10.
Options: any method, e.g. `:okddip`; `:plain`, the network alone; `:smoke`, four steps of an
    11-layer network on generated images.
"""

from configs import common
from one_jax.config import default_config


def get_config(options: str = ''):
    """Returns the recipe with the comma-separated `options` applied."""
    config = default_config()
    config.model.name = 'resnet110_bottleneck'
    config.data.name = 'cinic10'
    config.data.batch_size = 128
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 1e-4
    config.optimizer.schedule = 'step'
    config.optimizer.milestones = (0.5, 0.75)
    config.train.epochs = 300
    return common.apply_options(config, options, smoke={'model.name': 'resnet11_bottleneck'})
