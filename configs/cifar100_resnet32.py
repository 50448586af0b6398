"""ResNet-32 on CIFAR-100 with ONE (three branches above two shared stages) or any other method.

Source: Lan, Zhu, Gong, "Knowledge Distillation by On-the-Fly Native Ensemble", NeurIPS 2018, and
    the authors' code. Images are padded by 4 pixels, cropped and flipped. Every method is trained
    by this recipe and has its own paper's changes, such as a weight decay of 5e-4 for OKDDip and
    MDE. one_jax/methods/ names the papers, and what was reconstructed in ekd, mde and boc_kd.
Prepare: python -m one_jax.prepare cifar100
Run: python -m one_jax.main --config=configs/cifar100_resnet32.py
Options: a method, e.g. `:okddip`; `:mde,paper`, the constants reported for MDE; `:plain`, the
    network alone; `:smoke`, four steps of ResNet-8 on generated images.
Expected: top-1 in % from re-runs by others; none was run here for lack of CIFAR-100. Parameters
    deployed are 472,756, except for joint_average and ekd, which deploy their ensemble.

    option           top-1                          parameters in training
    (none), ONE      73.4 to 74.3                   1,193,189
    :plain           69.8 to 71.1                     472,756
    :cl_ilr          72.3; 74.6 (plain: 71.1)       1,193,084
    :dml             73.7; 75.1 (plain: 71.1)         945,512
    :kdcl            73.8                             945,512
    :okddip          73.3; 74.2 (plain: 71.1)       1,554,272
    :mde             no number we could check       1,566,688
    :boc_kd          no number we could check       1,059,762
    :independent     a control, no number           1,193,084
    :joint_average   a control, no number           1,193,084
    :kd, :meal       no number we could check         472,756

Teachers of kd, meal and ekd are exported students of the same data, for example:
    python -m one_jax.main --config=configs/cifar100_resnet32.py:plain \\
        --config.model.name=resnet110 --workdir=runs/cifar100_resnet110
    python -m one_jax.export --workdir=runs/cifar100_resnet110 --output=teachers/resnet110
    python -m one_jax.main --config=configs/cifar100_resnet32.py:kd \\
        --config.method.teachers=teachers/resnet110
    Give several as --config.method.teachers=DIR,DIR; configs/cifar100_resnet20.py has three.
"""

from configs import common
from one_jax.config import default_config


def get_config(options: str = ''):
    """Returns the recipe with the comma-separated `options` applied."""
    config = default_config()
    config.model.name = 'resnet32'
    config.data.name = 'cifar100'
    config.data.batch_size = 128
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 1e-4
    config.optimizer.schedule = 'step'
    config.optimizer.milestones = (0.5, 0.75)
    config.train.epochs = 300
    return common.apply_options(config, options, smoke={'model.name': 'resnet8'})
