"""ResNet-32 on CIFAR-100 with MEAL V2, without its discriminator.

Source: Shen, Savvides, "MEAL V2: Boosting Vanilla ResNet-50 to 80%+ Top-1 Accuracy on ImageNet
    without Tricks", 2020. Trained here by the recipe of ONE's paper, like all methods.
Recipe: 300 epochs of SGD, Nesterov momentum 0.9, batch 128, rate 0.1 (x0.1 at 50 % and 75 %),
    weight decay 1e-4; pad 4, crop, flip; one network that learns the mean of its frozen teachers'
    probabilities and no labels. 472,756 parameters deployed (472,756 in training).
Expect: no published number that we could check. Not run here: there is no CIFAR-100 on our machine.
Prepare: python -m one_jax.prepare cifar100
Teachers: any exported students of the same data; three networks, say:
    python -m one_jax.main --config=configs/cifar100_resnet32.py:plain \\
        --config.model.name=resnet110 --workdir=runs/cifar100_resnet110
    python -m one_jax.main --config=configs/cifar100_densenet190.py:plain \\
        --workdir=runs/cifar100_densenet190
    python -m one_jax.main --config=configs/cifar100_resnet32.py:plain --config.model.name=vgg16 \\
        --workdir=runs/cifar100_vgg16
    for name in resnet110 densenet190 vgg16; do python -m one_jax.export \\
        --workdir=runs/cifar100_$name --output=teachers/$name; done
Run: python -m one_jax.main --config=configs/cifar100_resnet32_meal.py \\
    --config.method.teachers=teachers/resnet110,teachers/densenet190,teachers/vgg16 \\
    --workdir=runs/cifar100_resnet32_meal
Variants: `:plain` the network alone; `:smoke` a few steps of a small network of its family on
    generated images.
"""

from one_jax import recipes


def get_config(options: str = ''):
    """The recipe with the comma-separated `options` applied."""
    return recipes.published('resnet32', 'cifar100', options, 'meal')
