"""ResNet-32 on CIFAR-100 with DML.

Source: Zhang, Xiang, Hospedales, Lu, "Deep Mutual Learning", CVPR 2018. Trained here by the recipe
    of ONE's paper, like all methods.
Recipe: 300 epochs of SGD, Nesterov momentum 0.9, batch 128, rate 0.1 (x0.1 at 50 % and 75 %),
    weight decay 1e-4; pad 4, crop, flip; two whole networks, each taught by the other, from one
    forward pass; T = 1, weight 1, no ramp. 472,756 parameters deployed (945,512 in training).
Expect: re-runs by others report a top-1 of 73.7 and 75.1 %, and 71.1 % plain in the latter source.
    Not run here: there is no CIFAR-100 on our machine.
Prepare: python -m one_jax.prepare cifar100
Run: python -m one_jax.main --config=configs/cifar100_resnet32_dml.py \\
    --workdir=runs/cifar100_resnet32_dml
Variants: `:plain` the network alone; `:smoke` a few steps of a small network of its family on
    generated images.
"""

from one_jax import recipes


def get_config(options: str = ''):
    """The recipe with the comma-separated `options` applied."""
    return recipes.published('resnet32', 'cifar100', options, 'dml')
