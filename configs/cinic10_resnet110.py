"""The ONE paper's ResNet-110 (bottlenecks, really 164 layers) on CINIC-10 with ONE.

Source: Lan, Zhu, Gong, "Knowledge Distillation by On-the-Fly Native Ensemble", NeurIPS 2018, and
    the authors' released code. The paper does not use CINIC-10 (Darlow et al. 2018): this is its
    CIFAR recipe. Their "ResNet-110" has 18 bottleneck blocks a stage. For He's network set
    --config.model.name=resnet110, for OKDDip's resnet110_bottleneck12.
Recipe: 300 epochs of SGD, Nesterov momentum 0.9, batch 128, rate 0.1 (x0.1 at 50 % and 75 %),
    weight decay 1e-4; pad 4, crop, flip; three branches above two shared stages; T = 3; the
    distillation ramps up over 80 epochs. 1,704,154 parameters deployed (4,294,263 in training).
Expect: no published number that we could check. Not run here: there is no CINIC-10 on our machine.
Prepare: python -m one_jax.prepare cinic10
Run: python -m one_jax.main --config=configs/cinic10_resnet110.py --workdir=runs/cinic10_resnet110
Variants: `:plain` the network alone; `:smoke` a few steps of a small network of its family on
    generated images.
"""

from one_jax import recipes


def get_config(options: str = ''):
    """The recipe with the comma-separated `options` applied."""
    return recipes.published('resnet110_bottleneck', 'cinic10', options)
