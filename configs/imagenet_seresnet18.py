"""SE-ResNet-18 (reduction 16) on ImageNet with ONE.

Source: Lan, Zhu, Gong, "Knowledge Distillation by On-the-Fly Native Ensemble", NeurIPS 2018, and
    the authors' released code.
Recipe: 90 epochs (our reading, not checked against the paper) of SGD, Nesterov momentum 0.9, batch
    256, rate 0.1 (x0.1 at epochs 30 and 60), weight decay 1e-4; random-resized crop 224, flip;
    evaluation resizes to 256 and crops 224; the last two of four stages branched in three; T = 3.
    11,778,592 parameters deployed (33,958,969 in training).
Expect: no published number that we could check. Not run here: there is no ImageNet on our machine.
Prepare: python -m one_jax.prepare imagenet2012
Run: python -m one_jax.main --config=configs/imagenet_seresnet18.py \\
    --workdir=runs/imagenet_seresnet18
Variants: `:plain` the network alone; `:smoke` a few steps of a small network of its family on
    generated images.
"""

from one_jax import recipes


def get_config(options: str = ''):
    """The recipe with the comma-separated `options` applied."""
    return recipes.published('seresnet18', 'imagenet2012', options)
