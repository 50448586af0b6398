"""ResNet-8 on 5,000 MNIST digits with KDCL.

Source: Guo et al., "Online Knowledge Distillation via Collaborative Learning", CVPR 2020. Trained
    here by the recipe of the demo, like all methods.
Recipe: 12 epochs of SGD, Nesterov momentum 0.9, batch 100, rate 0.1 to 0 by a cosine, weight decay
    5e-4; pad 2 and crop, no flip; two whole networks, each with crops of its own; the target is the
    least of the logits relative to that of the label (min_logit); T = 2, weight 1, no ramp. 78,042
    parameters deployed (156,084 in training).
Expect: docs/methods.md has the table of `make methods`, made with `:few`, the machine and the
    seeds.
Run: python -m one_jax.main --config=configs/mnist5k_resnet8_kdcl.py \\
    --workdir=runs/mnist5k_resnet8_kdcl
Variants: `:few` 50 training images of each class, 300 steps; `:plain` the network alone; `:smoke`
    four steps on generated images; --config.method.teacher=naive, linear, min_logit or general
    (which wants --config.data.validation_fraction=0.1).
"""

from one_jax import recipes


def get_config(options: str = ''):
    """The recipe with the comma-separated `options` applied."""
    return recipes.mnist5k(options, 'kdcl')
