"""ResNet-20 on CIFAR-10, with EKD or another method.

Source: the recipe of ONE (Lan, Zhu, Gong, NeurIPS 2018) for the compact student of EKD (Asif, Tang,
    Harrer, "Ensemble Knowledge Distillation for Learning Improved and Efficient Networks", ECAI
    2020), as reconstructed: see one_jax/methods/ekd.py.
Prepare: python -m one_jax.prepare cifar10
Teachers: ResNet-110, DenseNet-BC and VGG-16, trained on all images:
    python -m one_jax.main --config=configs/cifar10_resnet32.py:plain \\
        --config.model.name=resnet110 --workdir=runs/cifar10_resnet110
    python -m one_jax.main --config=configs/cifar10_densenet190.py:plain \\
        --workdir=runs/cifar10_densenet190
    python -m one_jax.main --config=configs/cifar10_resnet32.py:plain --config.model.name=vgg16 \\
        --workdir=runs/cifar10_vgg16
    for name in resnet110 densenet190 vgg16; do python -m one_jax.export \\
        --workdir=runs/cifar10_$name --output=teachers/$name; done
Run: python -m one_jax.main --config=configs/cifar10_resnet20.py:ekd \\
    --config.method.teachers=teachers/resnet110,teachers/densenet190,teachers/vgg16
Parameters with EKD: 788,462, the deployed ensemble of three branches.
Expected: no published number that we could check. Not run here for lack of CIFAR-10.
Options: any method; `:per_class_50` and `:per_class_100`, so many training images of each class
    (nested subsets) and as many steps as on all of them; `:plain`; `:smoke`, four steps of ResNet-8
    on generated images.
"""

from configs import common
from one_jax.config import default_config


def get_config(options: str = ''):
    """Returns the recipe with the comma-separated `options` applied."""
    config = default_config()
    config.model.name = 'resnet20'
    config.data.name = 'cifar10'
    config.data.batch_size = 128
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 1e-4
    config.optimizer.schedule = 'step'
    config.optimizer.milestones = (0.5, 0.75)
    config.train.epochs = 300
    return common.apply_options(
        config,
        options,
        smoke={'model.name': 'resnet8'},
        per_class_50=_few_images(50, epochs=130),
        per_class_100=_few_images(100, epochs=55),
    )


def _few_images(per_class: int, epochs: int):
    """Keeps the steps of 300 epochs on all images; evaluates as often, every so many epochs."""
    return {
        'data.examples_per_class': per_class,
        'train.steps': 300 * (50_000 // 128),
        'train.eval_every_epochs': epochs,
        'train.checkpoint_every_epochs': epochs,
    }
