"""ResNet-8 on 5,000 MNIST digits with BOC-KD, as reconstructed in part.

Source: Walawalkar, Shen, Savvides, "Online Ensemble Model Compression using Knowledge
    Distillation", ECCV 2020. As reconstructed in part: the networks, the terms and their weights
    follow the paper; how the adapters look and how the squared error is averaged is ours. Trained
    by the recipe of the demo.
Recipe: 12 epochs of SGD, Nesterov momentum 0.9, batch 100, rate 0.1 to 0 by a cosine, weight decay
    5e-4; pad 2 and crop, no flip; five networks of 100, 80, 60, 40 and 20 % of the width with one
    stem; weights 0.7 of the cross-entropies, 0.15 of the features, 0.15 of the distillation; T = 2;
    the whole network is deployed, and any other exported with --branch=N. 78,042 parameters
    deployed (185,472 in training).
Expect: docs/methods.md has the table of `make methods`, made with `:few`, the machine and the
    seeds.
Run: python -m one_jax.main --config=configs/mnist5k_resnet8_boc_kd.py \\
    --workdir=runs/mnist5k_resnet8_boc_kd
Variants: `:few` 50 training images of each class, 300 steps; `:plain` the network alone; `:smoke`
    four steps on generated images.
"""

from one_jax import recipes


def get_config(options: str = ''):
    """The recipe with the comma-separated `options` applied."""
    return recipes.mnist5k(options, 'boc_kd')
