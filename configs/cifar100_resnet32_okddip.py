"""ResNet-32 on CIFAR-100 with OKDDip.

Source: Chen, Mei, Wang, Feng, Chen, "Online Knowledge Distillation with Diverse Peers", AAAI 2020.
    Trained here by the recipe of ONE's paper, but for the weight decay.
Recipe: 300 epochs of SGD, Nesterov momentum 0.9, batch 128, rate 0.1 (x0.1 at 50 % and 75 %),
    weight decay 5e-4; pad 4, crop, flip; three peers and a leader above two shared stages; a peer
    learns from its attention mixture of the peers, the leader, which is deployed, from their mean;
    T = 3; ramp over 80 of 300 epochs. 472,756 parameters deployed (1,554,272 in training).
Expect: re-runs by others report a top-1 of 73.3 and 74.2 %, and 71.1 % plain in the latter source.
    Not run here: there is no CIFAR-100 on our machine.
Prepare: python -m one_jax.prepare cifar100
Run: python -m one_jax.main --config=configs/cifar100_resnet32_okddip.py \\
    --workdir=runs/cifar100_resnet32_okddip
Variants: `:plain` the network alone; `:smoke` a few steps of a small network of its family on
    generated images; --config.model.share_stages=0 whole networks; --config.method.leader=False
    peers alone; --config.method.detach_targets=True.
"""

from one_jax import recipes


def get_config(options: str = ''):
    """The recipe with the comma-separated `options` applied."""
    return recipes.published('resnet32', 'cifar100', options, 'okddip')
