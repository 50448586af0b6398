"""ResNet-20 on a folder of your own images with ONE.

Source: a general recipe of this project's for small images.
Recipe: 100 epochs of SGD, Nesterov momentum 0.9, batch 64, rate 0.1 to 0 by a cosine after 2 epochs
    of warm-up, weight decay 5e-4; images of 32x32; three branches above two shared stages; T = 3.
    Crops and flips are for you to choose: --config.data.augment=pad_crop_flip.
Expect: depends on your images. Classes, mean and standard deviation are found in the folder.
Run: python -m one_jax.main --config=configs/image_folder.py --config.data.root=DIR
    where DIR holds train/<class>/*.png or *.jpg, and test/<class>/ likewise if you have test images
Variants: `:plain` the network alone; `:smoke` a few steps of ResNet-8 on generated images.
"""

from one_jax import config as config_lib


def get_config(options: str = ''):
    """The recipe with the comma-separated `options` applied."""
    config = config_lib.default_config()
    config.model.name = 'resnet20'
    config.data.name = 'image_folder'
    config.data.image_size = 32
    config.data.batch_size = 64
    config.optimizer.weight_decay = 5e-4
    config.optimizer.schedule = 'cosine'
    config.optimizer.warmup_epochs = 2.0
    config.train.epochs = 100
    return config_lib.apply_options(config, options, smoke={'model.name': 'resnet8'})
