"""ResNet-20 on a folder of your own images with ONE: three branches above two shared stages.

Source: a general recipe of this project for small images.
Run: python -m one_jax.main --config=configs/image_folder.py --config.data.root=DIR
    where DIR holds train/<class>/*.png or *.jpg, and test/<class>/ if you have test images.
    Classes, mean and standard deviation are read from the folder.
Expected: depends on your images. Nothing is augmented unless you choose a fitting augmentation,
    such as --config.data.augment=pad_crop_flip.
Options: any method, e.g. `:okddip`; `:plain`, the network alone; `:smoke`, four steps of ResNet-8
    on generated images.
"""

from configs import common
from one_jax.config import default_config


def get_config(options: str = ''):
    """Returns the recipe with the comma-separated `options` applied."""
    config = default_config()
    config.model.name = 'resnet20'
    config.data.name = 'image_folder'
    config.data.image_size = 32
    config.data.batch_size = 64
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 5e-4
    config.optimizer.schedule = 'cosine'
    config.optimizer.warmup_epochs = 2.0
    config.train.epochs = 100
    return common.apply_options(config, options, smoke={'model.name': 'resnet8'})
