"""Trains and evaluates a recipe.

    python -m one_jax.main --config=configs/cifar100_resnet32.py --workdir=DIR

Run again with the same workdir, it goes on where it stopped.
"""

import sys
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from one_jax import command, processes, report, seeds, train, workdir
from one_jax.errors import UserError
from one_jax.interrupt import Interrupted

CONFIG = config_flags.DEFINE_config_file('config', None, 'The recipe, e.g. configs/X.py[:options].')
WORKDIR = flags.DEFINE_string('workdir', None, 'Where the run is kept; runs/<config> by default.')
# A run of several processes: docs/clusters.md.
DISTRIBUTED = flags.DEFINE_boolean(
    'distributed', None, 'One of several processes; by default, as the cluster tells.'
)
COORDINATOR = flags.DEFINE_string('coordinator_address', None, 'host:port of process 0.')
NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'How many processes the run has.')
PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Which of them this one is, from 0.')


def default_workdir(config_flag: str) -> Path:
    """`runs/<config name and options>` for what --config says."""
    path, _, options = config_flag.partition(':')
    return Path('runs', '_'.join([Path(path).stem, *filter(None, options.split(','))]))


def main() -> None:
    """Logs what it runs on, trains, and prints the table of the result."""
    config = CONFIG.value
    if config is None:
        raise UserError('give --config=configs/X.py')
    directory = Path(WORKDIR.value or default_workdir(flags.FLAGS['config'].config_filename))
    processes.initialize(
        COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, DISTRIBUTED.value
    )
    if processes.is_first():
        hosts = f' in {jax.process_count()} processes' if jax.process_count() > 1 else ''
        print(
            f'{jax.device_count()} x {workdir.device_name()}{hosts}, JAX {jax.__version__}; '
            f'{directory}'
        )
    try:
        if config.seeds:
            train.train_seeds(config, directory)
            runs = [directory / seeds.folder(seed) for seed in config.seeds]
            table = report.runs_table(report.read_runs(runs)) if processes.is_first() else ''
        else:
            table = report.run_table(train.train_and_evaluate(config, directory))
    except Interrupted as interrupted:
        print(f'stopped by {interrupted}, saved; the same command goes on', file=sys.stderr)
        sys.exit(128 + interrupted.signal_number)
    if processes.is_first():
        print(table)


if __name__ == '__main__':
    command.run(main)
