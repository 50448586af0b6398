"""ResNet-32 on CIFAR-100: branches whose average is trained, a control.

Source: the jointly trained average of Allen-Zhu and Li, "Towards Understanding Ensemble, Knowledge
    Distillation and Self-Distillation in Deep Learning", ICLR 2023; here its networks are branches.
Recipe: 300 epochs of SGD, Nesterov momentum 0.9, batch 128, rate 0.1 (x0.1 at 50 % and 75 %),
    weight decay 1e-4; pad 4, crop, flip; three branches above two shared stages, and one
    cross-entropy: that of the mean of their logits, the ensemble that is deployed. 1,193,084
    parameters deployed (1,193,084 in training).
Expect: no published number that we could check. Not run here: there is no CIFAR-100 on our machine.
Prepare: python -m one_jax.prepare cifar100
Run: python -m one_jax.main --config=configs/cifar100_resnet32_joint_average.py \\
    --workdir=runs/cifar100_resnet32_joint_average
Variants: `:plain` the network alone; `:smoke` a few steps of a small network of its family on
    generated images.
"""

from one_jax import recipes


def get_config(options: str = ''):
    """The recipe with the comma-separated `options` applied."""
    return recipes.published('resnet32', 'cifar100', options, 'joint_average')
