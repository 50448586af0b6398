"""ResNet-8 on 5,000 MNIST digits with knowledge distillation from frozen teachers.

Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015. Trained here by
    the recipe of the demo, like all methods.
Recipe: 12 epochs of SGD, Nesterov momentum 0.9, batch 100, rate 0.1 to 0 by a cosine, weight decay
    5e-4; pad 2 and crop, no flip; one network that learns from the labels and from the mean logits
    of its frozen teachers; T = 4, weight 1, no ramp. 78,042 parameters deployed (78,042 in
    training).
Expect: docs/methods.md has the table of `make methods`, made with `:few`, the machine and the
    seeds.
Teachers: any exported students of the same data; a larger network, say:
    python -m one_jax.main --config=configs/mnist5k_resnet8.py:plain --config.model.name=resnet20 \\
        --workdir=runs/mnist5k_resnet20
    python -m one_jax.export --workdir=runs/mnist5k_resnet20 --output=teachers/resnet20
Run: python -m one_jax.main --config=configs/mnist5k_resnet8_kd.py \\
    --config.method.teachers=teachers/resnet20 --workdir=runs/mnist5k_resnet8_kd
Variants: `:few` 50 training images of each class, 300 steps; `:plain` the network alone; `:smoke`
    four steps on generated images; several teachers are averaged: --config.method.teachers=DIR,DIR;
    a teacher like the student is self-distillation.
"""

from one_jax import recipes


def get_config(options: str = ''):
    """The recipe with the comma-separated `options` applied."""
    return recipes.mnist5k(options, 'kd')
