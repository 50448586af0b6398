"""ResNet-32 on CIFAR-10 with ONE.

Source: Lan, Zhu, Gong, "Knowledge Distillation by On-the-Fly Native Ensemble", NeurIPS 2018, and
    the authors' released code.
Recipe: that of cifar100_resnet32.py. 466,906 parameters deployed (1,175,639 in training).
Expect: re-runs by others report a plain top-1 of 92.5 to 93.5 % and 93.6 to 94.2 % for a branch of
    ONE. Not run here: there is no CIFAR-10 on our machine.
Run: python -m one_jax.main --config=configs/cifar10_resnet32.py --workdir=runs/cifar10_resnet32
Variants: `:plain` the network alone; `:smoke` four steps of ResNet-8 on generated images.
"""

from one_jax import config as config_lib


def get_config(options: str = ''):
    """The recipe with the comma-separated `options` applied."""
    config = config_lib.default_config()
    config.data.name = 'cifar10'
    return config_lib.apply_options(config, options, smoke={'model.name': 'resnet8'})
