"""ResNet-32 on CIFAR-10 with ONE: three branches above two shared stages.

Source: Lan, Zhu, Gong, "Knowledge Distillation by On-the-Fly Native Ensemble", NeurIPS 2018. Images
    are padded by 4 pixels, cropped and flipped.
Authors' code (Lan1991Xu/ONE_NeurIPS2018): network, initialisation, data, first rate, decay and ramp
    are the same. `:authors` takes from it also what differs: plain momentum (here Nesterov's, as in
    the paper); rates that drop after epochs 151 and 225 of 300 (here 150 and 225); a last batch of
    80 images in every epoch, 391 steps (here dropped, 390); an initial scale of the gate's batch
    norm drawn from U(0, 1) (here 1); and 1e-7 added to the teacher's probabilities (here 0). Then
    still differ: random numbers; running variances, which PyTorch multiplies by n / (n - 1); and
    the result, which is the last epoch's here and the best on the test images there. Its scripts
    are for CIFAR-100; this takes the same values.
Prepare: python -m one_jax.prepare cifar10
Run: python -m one_jax.main --config=configs/cifar10_resnet32.py
Parameters: 466,906 deployed, 1,175,639 in training.
Expected: others' re-runs report 92.5 to 93.5 % top-1 for the plain network and 93.6 to 94.2 % for a
    branch of ONE, with decay 5e-4 and four branches, unlike this recipe:
    --config.model.num_branches=4 --config.optimizer.weight_decay=5e-4. Not run here for lack of
    CIFAR-10.
Options: any method, e.g. `:okddip`; `:authors`, with ONE or `:plain`, see above; `:plain`, the
    network alone; `:smoke`, four steps of ResNet-8 on generated images.
"""

from configs import common
from one_jax.config import default_config


def get_config(options: str = ''):
    """Returns the recipe with the comma-separated `options` applied."""
    config = default_config()
    config.model.name = 'resnet32'
    config.data.name = 'cifar10'
    config.data.batch_size = 128
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 1e-4
    config.optimizer.schedule = 'step'
    config.optimizer.milestones = (0.5, 0.75)
    config.train.epochs = 300
    authors = {**common.AUTHORS, 'optimizer.milestones': (151 / 300, 225 / 300)}
    smoke = {'model.name': 'resnet8'}
    return common.apply_options(config, options, smoke=smoke, authors=authors)
