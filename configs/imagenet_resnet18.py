"""ResNet-18 on ImageNet with ONE: the last two of four stages in three branches.

Source: Lan, Zhu, Gong, "Knowledge Distillation by On-the-Fly Native Ensemble", NeurIPS 2018. 90
    epochs are our reading, not checked against the paper. Training crops 224x224 at random scales
    and flips; evaluation resizes to 256 and crops the centre. The authors' released code has no
    ImageNet.
Prepare: python -m one_jax.prepare imagenet2012
Run: python -m one_jax.main --config=configs/imagenet_resnet18.py
Parameters: 11,689,512 deployed, 33,702,785 in training.
Expected: published top-1 is 69.52 % for the plain network and 70.55 % for ONE (error 30.48 and
    29.45 %). Not run here for lack of ImageNet.
Options: any method, e.g. `:okddip`; `:plain`, the network alone; `:smoke`, two steps of a small
    network of the same family on generated images.
"""

from configs import common
from one_jax.config import default_config


def get_config(options: str = ''):
    """Returns the recipe with the comma-separated `options` applied."""
    config = default_config()
    config.model.name = 'resnet18'
    config.data.name = 'imagenet2012'
    config.data.batch_size = 256
    config.data.eval_batch_size = 256
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 1e-4
    config.optimizer.schedule = 'step'
    config.optimizer.milestones = (1 / 3, 2 / 3)
    config.train.epochs = 90
    config.train.log_every = 100
    smoke = {
        'model.name': 'resnet10_tiny',
        'data.generated_examples': 16,
        'data.batch_size': 8,
        'data.eval_batch_size': 8,
        'train.steps': 2,
        'train.log_every': 1,
    }
    return common.apply_options(config, options, smoke=smoke)
