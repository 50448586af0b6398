"""Plans a run: the memory that its train step needs, by the compiler; trains nothing.

python -m one_jax.plan --config=configs/X.py [--devices=8]
"""

import jax
from absl import flags
from ml_collections import config_flags

from one_jax.runtime import cli
from one_jax.training.compiled_step import plan_memory


def main() -> None:
    """Prints the memory per device for the config that the flags name."""
    print(plan_memory(flags.FLAGS.config, flags.FLAGS.devices or jax.device_count()))


if __name__ == '__main__':
    config_flags.DEFINE_config_file('config', None, 'The recipe, e.g. configs/X.py[:options].')
    flags.DEFINE_integer(
        'devices', None, "Devices that share the batch; default: this machine's.", lower_bound=1
    )
    cli.run(main, config='configs/X.py')
