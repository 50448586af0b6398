"""DenseNet-BC (190, 40) on SVHN with ONE.

Source: Lan, Zhu, Gong, "Knowledge Distillation by On-the-Fly Native Ensemble", NeurIPS 2018, and
    the authors' released code.
Recipe: train and extra, no augmentation; 40 epochs (our reading, not checked against the paper) of
    SGD, Nesterov momentum 0.9, batch 128, rate 0.1 (x0.1 at 50 % and 75 %), weight decay 1e-4;
    three branches above two shared stages; T = 3. 25,624,430 parameters deployed (44,839,109 in
    training).
Expect: no published number that we could check. Not run here: there is no SVHN on our machine.
Prepare: python -m one_jax.prepare svhn
Run: python -m one_jax.main --config=configs/svhn_densenet190.py --workdir=runs/svhn_densenet190
Variants: `:plain` the network alone; `:smoke` a few steps of a small network of its family on
    generated images.
"""

from one_jax import recipes


def get_config(options: str = ''):
    """The recipe with the comma-separated `options` applied."""
    return recipes.published('densenet190_40', 'svhn', options)
