"""The ONE paper's ResNet-110 on SVHN with ONE: three branches above two shared stages.

Source: Lan, Zhu, Gong, "Knowledge Distillation by On-the-Fly Native Ensemble", NeurIPS 2018. Trains
    on the splits train and extra, without augmentation. 40 epochs are our reading, not checked
    against the paper. The released code's network has 18 bottleneck blocks a stage, which makes 164
    layers. For He's ResNet-110 set --config.model.name=resnet110, for OKDDip's
    resnet110_bottleneck12.
Authors' code (Lan1991Xu/ONE_NeurIPS2018): network, initialisation, data and first rate are the
    same. It has no script for SVHN: epochs, milestones, decay and ramp are those of this recipe.
    `:authors` takes from it what differs: plain momentum (here Nesterov's, as in the paper); a last
    batch of 100 images in every epoch, 4,722 steps (here dropped, 4,721); an initial scale of the
    gate's batch norm drawn from U(0, 1) (here 1); and 1e-7 added to the teacher's probabilities
    (here 0). Then still differ: random numbers; running variances, which PyTorch multiplies by n /
    (n - 1); and the result, which is the last epoch's here and the best on the test images there.
Prepare: python -m one_jax.prepare svhn
Run: python -m one_jax.main --config=configs/svhn_resnet110.py
Parameters: 1,704,154 deployed, 4,294,263 in training.
Expected: no published number that we could check. Not run here for lack of SVHN.
Options: any method, e.g. `:okddip`; `:authors`, with ONE or `:plain`, see above; `:plain`, the
    network alone; `:smoke`, four steps of an 11-layer network on generated images.
"""

from configs import common
from one_jax.config import default_config


def get_config(options: str = ''):
    """Returns the recipe with the comma-separated `options` applied."""
    config = default_config()
    config.model.name = 'resnet110_bottleneck'
    config.data.name = 'svhn'
    config.data.batch_size = 128
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 1e-4
    config.optimizer.schedule = 'step'
    config.optimizer.milestones = (0.5, 0.75)
    config.train.epochs = 40
    smoke = {'model.name': 'resnet11_bottleneck'}
    return common.apply_options(config, options, smoke=smoke, authors=common.AUTHORS)
