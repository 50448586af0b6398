"""Trains and evaluates a recipe.

    python -m one_jax.main --config=configs/cifar100_resnet32.py --workdir=DIR

Run again with the same workdir, it resumes where it stopped.
"""

import sys
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from one_jax import train
from one_jax.reporting import tables
from one_jax.runtime import cli, environment, processes
from one_jax.runtime.interrupt import Interrupted

CONFIG = config_flags.DEFINE_config_file('config', None, 'The recipe, e.g. configs/X.py[:options].')
WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run; default: runs/<config>.')
# For a run of several processes: docs/clusters.md.
DISTRIBUTED = flags.DEFINE_boolean(
    'distributed', None, 'Whether this is one of several processes; default: as the cluster says.'
)
COORDINATOR = flags.DEFINE_string('coordinator_address', None, 'host:port of process 0.')
NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'Number of processes of the run.')
PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Number of this process, from 0.')
CONNECT_TIMEOUT = flags.DEFINE_integer(
    'connect_timeout', 300, 'Seconds until all processes must have connected.', 5, 86_400
)
HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
    'heartbeat_timeout', 100, 'Seconds until a silent process counts as lost.', 5, 86_400
)


def default_workdir(config_flag: str) -> Path:
    """Returns `runs/<config name and options>` for the value of --config."""
    path, _, options = config_flag.partition(':')
    return Path('runs', '_'.join([Path(path).stem, *filter(None, options.split(','))]))


@processes.ending_when_lost()
def main() -> None:
    """Trains, and prints the table of the result."""
    directory = Path(WORKDIR.value or default_workdir(flags.FLAGS['config'].config_filename))
    processes.initialize(
        COORDINATOR.value,
        NUM_PROCESSES.value,
        PROCESS_ID.value,
        DISTRIBUTED.value,
        CONNECT_TIMEOUT.value,
        HEARTBEAT_TIMEOUT.value,
    )
    with processes.agreement(CONNECT_TIMEOUT.value) as facts:
        workdir = str(directory.absolute())
        facts['command'] = {'num_processes': processes.count(), 'workdir': workdir}
        facts['version of the code'] = environment.versions
    if processes.is_first():
        count = processes.count()
        hosts = f' in {count} processes' if count > 1 else ''
        device = environment.device_name()
        print(f'{jax.device_count()} x {device}{hosts}, JAX {jax.__version__}; {directory}')
    try:
        result = train.train_and_evaluate(CONFIG.value, directory)
    except Interrupted as interrupted:
        print(f'stopped by {interrupted}, saved; the same command resumes', file=sys.stderr)
        sys.exit(128 + interrupted.signal_number)
    if processes.is_first():
        print(tables.run_table(result))


if __name__ == '__main__':
    cli.run(main, config='configs/X.py')
