"""ResNet-8 on 5,000 MNIST digits with OKDDip.

Source: Chen, Mei, Wang, Feng, Chen, "Online Knowledge Distillation with Diverse Peers", AAAI 2020.
    Trained here by the recipe of the demo, like all methods.
Recipe: 12 epochs of SGD, Nesterov momentum 0.9, batch 100, rate 0.1 to 0 by a cosine, weight decay
    5e-4; pad 2 and crop, no flip; three peers and a leader above two shared stages; a peer learns
    from its attention mixture of the peers, the leader, which is deployed, from their mean; T = 3;
    ramp over 27 % of the run. 78,042 parameters deployed (254,200 in training).
Expect: docs/methods.md has the table of `make methods`, made with `:few`, the machine and the
    seeds.
Run: python -m one_jax.main --config=configs/mnist5k_resnet8_okddip.py \\
    --workdir=runs/mnist5k_resnet8_okddip
Variants: `:few` 50 training images of each class, 300 steps; `:plain` the network alone; `:smoke`
    four steps on generated images; --config.model.share_stages=0 whole networks;
    --config.method.leader=False peers alone; --config.method.detach_targets=True.
"""

from one_jax import recipes


def get_config(options: str = ''):
    """The recipe with the comma-separated `options` applied."""
    return recipes.mnist5k(options, 'okddip')
