"""ResNet-8 on 5,000 MNIST digits with MDE as reconstructed.

Source: Li et al., "Online Knowledge Distillation via Multi-Branch Diversity Enhancement", ACCV
    2020. As reconstructed: the paper's abstract and overview figure fix what the fusion and the
    diversification act on; their layers and constants are ours. Trained by the recipe of the demo.
Recipe: 12 epochs of SGD, Nesterov momentum 0.9, batch 100, rate 0.1 to 0 by a cosine, weight decay
    5e-4; pad 2 and crop, no flip; OKDDip's three peers and leader above two shared stages, with
    fusion by attention and diversified classifiers (side class, norm fro2, weight 1e-4); T = 3;
    ramp over 27 % of the run. 78,042 parameters deployed (266,616 in training).
Expect: docs/methods.md has the table of `make methods`, made with `:few`, the machine and the
    seeds.
Run: python -m one_jax.main --config=configs/mnist5k_resnet8_mde.py \\
    --workdir=runs/mnist5k_resnet8_mde
Variants: `:few` 50 training images of each class, 300 steps; `:plain` the network alone; `:smoke`
    four steps on generated images; `:paper` the constant reported for the diversification (side
    feature, norm fro, weight 5e-8); --config.method.fusion=selective or none.
"""

from one_jax import recipes


def get_config(options: str = ''):
    """The recipe with the comma-separated `options` applied."""
    return recipes.mnist5k(options, 'mde')
