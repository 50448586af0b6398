"""ResNet-32 on CIFAR-100 with BOC-KD, as reconstructed in part.

Source: Walawalkar, Shen, Savvides, "Online Ensemble Model Compression using Knowledge
    Distillation", ECCV 2020. As reconstructed in part: the networks, the terms and their weights
    follow the paper; how the adapters look and how the squared error is averaged is ours. Trained
    by the recipe of ONE's paper.
Recipe: 300 epochs of SGD, Nesterov momentum 0.9, batch 128, rate 0.1 (x0.1 at 50 % and 75 %),
    weight decay 1e-4; pad 4, crop, flip; five networks of 100, 80, 60, 40 and 20 % of the width
    with one stem; weights 0.7 of the cross-entropies, 0.15 of the features, 0.15 of the
    distillation; T = 2; the whole network is deployed, and any other exported with --branch=N.
    472,756 parameters deployed (1,059,762 in training).
Expect: no published number that we could check. Not run here: there is no CIFAR-100 on our machine.
Prepare: python -m one_jax.prepare cifar100
Run: python -m one_jax.main --config=configs/cifar100_resnet32_boc_kd.py \\
    --workdir=runs/cifar100_resnet32_boc_kd
Variants: `:plain` the network alone; `:smoke` a few steps of a small network of its family on
    generated images.
"""

from one_jax import recipes


def get_config(options: str = ''):
    """The recipe with the comma-separated `options` applied."""
    return recipes.published('resnet32', 'cifar100', options, 'boc_kd')
