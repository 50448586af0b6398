"""ResNet-8 on 5,000 MNIST digits: independent branches, a control.

Source: a control of this project's: the branches of ONE without a teacher. What ONE gains over it
    is the distillation's.
Recipe: 12 epochs of SGD, Nesterov momentum 0.9, batch 100, rate 0.1 to 0 by a cosine, weight decay
    5e-4; pad 2 and crop, no flip; three branches above two shared stages, each with its own
    cross-entropy and nothing else. 78,042 parameters deployed (194,798 in training).
Expect: docs/methods.md has the table of `make methods`, made with `:few`, the machine and the
    seeds.
Run: python -m one_jax.main --config=configs/mnist5k_resnet8_independent.py \\
    --workdir=runs/mnist5k_resnet8_independent
Variants: `:few` 50 training images of each class, 300 steps; `:plain` the network alone; `:smoke`
    four steps on generated images.
"""

from one_jax import recipes


def get_config(options: str = ''):
    """The recipe with the comma-separated `options` applied."""
    return recipes.mnist5k(options, 'independent')
