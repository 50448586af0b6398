"""ResNet-32 on CIFAR-100 with knowledge distillation from frozen teachers.

Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015. Trained here by
    the recipe of ONE's paper, like all methods.
Recipe: 300 epochs of SGD, Nesterov momentum 0.9, batch 128, rate 0.1 (x0.1 at 50 % and 75 %),
    weight decay 1e-4; pad 4, crop, flip; one network that learns from the labels and from the mean
    logits of its frozen teachers; T = 4, weight 1, no ramp. 472,756 parameters deployed (472,756 in
    training).
Expect: no published number that we could check. Not run here: there is no CIFAR-100 on our machine.
Prepare: python -m one_jax.prepare cifar100
Teachers: any exported students of the same data; a larger network, say:
    python -m one_jax.main --config=configs/cifar100_resnet32.py:plain \\
        --config.model.name=resnet110 --workdir=runs/cifar100_resnet110
    python -m one_jax.export --workdir=runs/cifar100_resnet110 --output=teachers/resnet110
Run: python -m one_jax.main --config=configs/cifar100_resnet32_kd.py \\
    --config.method.teachers=teachers/resnet110 --workdir=runs/cifar100_resnet32_kd
Variants: `:plain` the network alone; `:smoke` a few steps of a small network of its family on
    generated images; several teachers are averaged: --config.method.teachers=DIR,DIR; a teacher
    like the student is self-distillation.
"""

from one_jax import recipes


def get_config(options: str = ''):
    """The recipe with the comma-separated `options` applied."""
    return recipes.published('resnet32', 'cifar100', options, 'kd')
