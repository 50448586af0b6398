"""ResNet-32 on CIFAR-100 with KDCL.

Source: Guo et al., "Online Knowledge Distillation via Collaborative Learning", CVPR 2020. Trained
    here by the recipe of ONE's paper, like all methods.
Recipe: 300 epochs of SGD, Nesterov momentum 0.9, batch 128, rate 0.1 (x0.1 at 50 % and 75 %),
    weight decay 1e-4; pad 4, crop, flip; two whole networks, each with crops of its own; the target
    is the least of the logits relative to that of the label (min_logit); T = 2, weight 1, no ramp.
    472,756 parameters deployed (945,512 in training).
Expect: re-runs by others report a top-1 of 73.8 % (one source). Not run here: there is no CIFAR-100
    on our machine.
Prepare: python -m one_jax.prepare cifar100
Run: python -m one_jax.main --config=configs/cifar100_resnet32_kdcl.py \\
    --workdir=runs/cifar100_resnet32_kdcl
Variants: `:plain` the network alone; `:smoke` a few steps of a small network of its family on
    generated images; --config.method.teacher=naive, linear, min_logit or general (which wants
    --config.data.validation_fraction=0.1).
"""

from one_jax import recipes


def get_config(options: str = ''):
    """The recipe with the comma-separated `options` applied."""
    return recipes.published('resnet32', 'cifar100', options, 'kdcl')
