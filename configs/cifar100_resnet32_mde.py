"""ResNet-32 on CIFAR-100 with MDE as reconstructed.

Source: Li et al., "Online Knowledge Distillation via Multi-Branch Diversity Enhancement", ACCV
    2020. As reconstructed: the paper's abstract and overview figure fix what the fusion and the
    diversification act on; their layers and constants are ours. Trained by the recipe of ONE's
    paper, but for the weight decay.
Recipe: 300 epochs of SGD, Nesterov momentum 0.9, batch 128, rate 0.1 (x0.1 at 50 % and 75 %),
    weight decay 5e-4; pad 4, crop, flip; OKDDip's three peers and leader above two shared stages,
    with fusion by attention and diversified classifiers (side class, norm fro2, weight 1e-4);
    T = 3; ramp over 80 of 300 epochs. 472,756 parameters deployed (1,566,688 in training).
Expect: no published number that we could check. Not run here: there is no CIFAR-100 on our machine.
Prepare: python -m one_jax.prepare cifar100
Run: python -m one_jax.main --config=configs/cifar100_resnet32_mde.py \\
    --workdir=runs/cifar100_resnet32_mde
Variants: `:plain` the network alone; `:smoke` a few steps of a small network of its family on
    generated images; `:paper` the constant reported for the diversification (side feature, norm
    fro, weight 5e-8); --config.method.fusion=selective or none.
"""

from one_jax import recipes


def get_config(options: str = ''):
    """The recipe with the comma-separated `options` applied."""
    return recipes.published('resnet32', 'cifar100', options, 'mde')
