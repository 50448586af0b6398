"""ResNet-32 on CIFAR-100 with ONE (three branches above two shared stages) or any other method.

Source: Lan, Zhu, Gong, "Knowledge Distillation by On-the-Fly Native Ensemble", NeurIPS 2018. Images
    are padded by 4 pixels, cropped and flipped. Every method is trained by this recipe and has its
    own paper's changes, such as a weight decay of 5e-4 for OKDDip and MDE. one_jax/methods/ names
    the papers, and what was reconstructed in ekd, mde and boc_kd.
Authors' code (Lan1991Xu/ONE_NeurIPS2018): network, initialisation, data, first rate, decay and ramp
    are the same. `:authors` takes from it also what differs: plain momentum (here Nesterov's, as in
    the paper); rates that drop after epochs 151 and 225 of 300 (here 150 and 225); a last batch of
    80 images in every epoch, 391 steps (here dropped, 390); an initial scale of the gate's batch
    norm drawn from U(0, 1) (here 1); and 1e-7 added to the teacher's probabilities (here 0). Then
    still differ: random numbers; running variances, which PyTorch multiplies by n / (n - 1); and
    the result, which is the last epoch's here and the best on the test images there.
Prepare: python -m one_jax.prepare cifar100
Run: python -m one_jax.main --config=configs/cifar100_resnet32.py
Options: a method, e.g. `:okddip`; `:mde,paper`, the constants reported for MDE; `:authors`, with
    ONE or `:plain`, see above; `:plain`, the network alone; `:smoke`, four steps of ResNet-8 on
    generated images.
Expected: top-1 in % from re-runs by others; none was run here for lack of CIFAR-100. Parameters
    deployed are 472,756, except for joint_average and ekd, which deploy their ensemble.

    option           top-1                                  parameters in training
    (none), ONE      73.4 to 74.3 [a]                       1,193,189
    :plain           69.8 to 71.1 [b]                         472,756
    :cl_ilr          72.3; 74.6 (plain: 71.1) [a, c]        1,193,084
    :dml             73.7; 75.1 (plain: 71.1) [a, c]          945,512
    :kdcl            73.8                                     945,512
    :okddip          73.3; 74.2 (plain: 71.1) [a]           1,554,272
    :mde             no number we could check               1,566,688
    :boc_kd          no number we could check               1,041,430
    :independent     a control, no number                   1,193,084
    :joint_average   a control, no number                   1,193,084
    :kd, :meal       no number we could check                 472,756

    Not with this recipe's settings, but with:
    [a] four branches or networks and decay 5e-4: --config.model.num_branches=4
        --config.optimizer.weight_decay=5e-4 (OKDDip has both by default);
    [b] decay 5e-4;
    [c] a temperature of 2: --config.method.temperature=2.

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
    authors = {**common.AUTHORS, 'optimizer.milestones': (151 / 300, 225 / 300)}
    smoke = {'model.name': 'resnet8'}
    return common.apply_options(config, options, smoke=smoke, authors=authors)
