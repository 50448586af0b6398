"""ResNeXt-29 8x64d on CIFAR-100 with ONE.

Source: Lan, Zhu, Gong, "Knowledge Distillation by On-the-Fly Native Ensemble", NeurIPS 2018, and
    the authors' released code.
Recipe: 300 epochs of SGD, Nesterov momentum 0.9, batch 128, rate 0.1 (x0.1 at 50 % and 75 %),
    weight decay 1e-4; pad 4, crop, flip; three branches above two shared stages; T = 3; the
    distillation ramps up over 80 epochs. 34,518,948 parameters deployed (87,219,829 in training).
Expect: no published number that we could check. Not run here: there is no CIFAR-100 on our machine.
Prepare: python -m one_jax.prepare cifar100
Run: python -m one_jax.main --config=configs/cifar100_resnext29.py --workdir=runs/cifar100_resnext29
Variants: `:plain` the network alone; `:smoke` a few steps of a small network of its family on
    generated images.
"""

from one_jax import recipes


def get_config(options: str = ''):
    """The recipe with the comma-separated `options` applied."""
    return recipes.published('resnext29_8x64d', 'cifar100', options)
