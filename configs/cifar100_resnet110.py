"""The ONE paper's ResNet-110 on CIFAR-100 with ONE: three branches above two shared stages.

Source: Lan, Zhu, Gong, "Knowledge Distillation by On-the-Fly Native Ensemble", NeurIPS 2018. Images
    are padded by 4 pixels, cropped and flipped. The released code's network has 18 bottleneck
    blocks a stage, which makes 164 layers. For He's ResNet-110 set --config.model.name=resnet110,
    for OKDDip's resnet110_bottleneck12.
Authors' code (Lan1991Xu/ONE_NeurIPS2018): network, initialisation, data, first rate, decay and ramp
    are the same. `:authors` takes from it also what differs: plain momentum (here Nesterov's, as in
    the paper); rates that drop after epochs 151 and 225 of 300 (here 150 and 225); a last batch of
    80 images in every epoch, 391 steps (here dropped, 390); an initial scale of the gate's batch
    norm drawn from U(0, 1) (here 1); and 1e-7 added to the teacher's probabilities (here 0). Then
    still differ: random numbers; running variances, which PyTorch multiplies by n / (n - 1); and
    the result, which is the last epoch's here and the best on the test images there.
Prepare: python -m one_jax.prepare cifar100
Run: python -m one_jax.main --config=configs/cifar100_resnet110.py
Parameters: 1,727,284 deployed, 4,363,653 in training.
Expected: published top-1 is 74.67 % for the plain network and 78.38 % for ONE (error 25.33 and
    21.62 %). Not run here for lack of CIFAR-100.
Options: any method, e.g. `:okddip`; `:authors`, with ONE or `:plain`, see above; `:plain`, the
    network alone; `:smoke`, four steps of an 11-layer network on generated images.
"""

from configs import common
from one_jax.config import default_config


def get_config(options: str = ''):
    """Returns the recipe with the comma-separated `options` applied."""
    config = default_config()
    config.model.name = 'resnet110_bottleneck'
    config.data.name = 'cifar100'
    config.data.batch_size = 128
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 1e-4
    config.optimizer.schedule = 'step'
    config.optimizer.milestones = (0.5, 0.75)
    config.train.epochs = 300
    authors = {**common.AUTHORS, 'optimizer.milestones': (151 / 300, 225 / 300)}
    smoke = {'model.name': 'resnet11_bottleneck'}
    return common.apply_options(config, options, smoke=smoke, authors=authors)
