"""ResNet-20 on CIFAR-10 with EKD as reconstructed.

Source: Asif, Tang, Harrer, "Ensemble Knowledge Distillation for Learning Improved and Efficient
    Networks", ECAI 2020. As reconstructed: the abstract fixes a branched, compact student, teachers
    of different kinds for different branches, and the ensemble deployed; the form of the loss and
    its constants are ours. Trained by the recipe of ONE's paper.
Recipe: 300 epochs of SGD, Nesterov momentum 0.9, batch 128, rate 0.1 (x0.1 at 50 % and 75 %),
    weight decay 1e-4; pad 4, crop, flip; three branches above one shared stage, each taught by one
    frozen teacher, and their mean by the mean of the teachers; T = 10, weights 0.5 of the
    cross-entropies, 0.6 of the distillation, 1 of the squared error in it. 788,462 parameters
    deployed (788,462 in training).
Expect: no published number that we could check. Not run here: there is no CIFAR-10 on our machine.
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
Run: python -m one_jax.main --config=configs/cifar10_resnet20_ekd.py \\
    --config.method.teachers=teachers/resnet110,teachers/densenet190,teachers/vgg16 \\
    --workdir=runs/cifar10_resnet20_ekd
Variants: `:per_class_50` and `:per_class_100` train on so few images of each class, nested subsets,
    with as many steps as on all; `:plain` the network alone; `:smoke` a few steps of a small
    network of its family on generated images; --config.method.pairing=all_to_all or
    ensemble_to_all.
"""

from one_jax import recipes


def get_config(options: str = ''):
    """The recipe with the comma-separated `options` applied."""
    return recipes.published('resnet20', 'cifar10', options, 'ekd')
