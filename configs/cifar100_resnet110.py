"""The ONE paper's ResNet-110 (bottlenecks, really 164 layers) on CIFAR-100 with ONE.

Source: Lan, Zhu, Gong, "Knowledge Distillation by On-the-Fly Native Ensemble", NeurIPS 2018, and
    the authors' released code, whose "ResNet-110" has 18 bottleneck blocks a stage. For He's
    network set --config.model.name=resnet110, for OKDDip's resnet110_bottleneck12.
Recipe: that of cifar100_resnet32.py. 1,727,284 parameters deployed (4,363,653 in training).
Expect: published top-1: plain 74.67 %, ONE 78.38 % (error 25.33 -> 21.62). Not run here: there is
    no CIFAR-100 on our machine.
Run: python -m one_jax.main --config=configs/cifar100_resnet110.py --workdir=runs/cifar100_resnet110
Variants: `:plain` the network alone; `:smoke` four steps of one block a stage on generated images.
"""

from one_jax import config as config_lib


def get_config(options: str = ''):
    """The recipe with the comma-separated `options` applied."""
    config = config_lib.default_config()
    config.model.name = 'resnet110_bottleneck'
    return config_lib.apply_options(config, options, smoke={'model.name': 'resnet11_bottleneck'})
