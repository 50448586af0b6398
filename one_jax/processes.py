"""Several processes of one run: how they find each other, agree, and take turns.

All of it is JAX's own distributed runtime. With one process every function here does nothing.
"""

import contextlib
import hashlib
import os
import signal
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from one_jax.errors import ConfigError, UserError

# Set by the launcher in each process of a job of several; TPU's has the hosts of the slice.
_SIZES = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')
_TPU_HOSTS = 'TPU_WORKER_HOSTNAMES'


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    distributed: bool | None = None,
) -> None:
    """Joins the other processes of the run; before anything else of JAX is used.

    Args:
      coordinator_address: 'host:port' of process 0; with the two other numbers, nothing is asked of
        the cluster.
      num_processes: how many there are.
      process_id: of this one, from 0.
      distributed: whether the run has several processes, as the cluster's environment tells it;
        None: if a TPU slice of several hosts, `srun` or `mpirun` started this process.

    Raises:
      UserError: some of the three flags are missing, or the others are not found.
    """
    given = {
        'coordinator_address': coordinator_address,
        'num_processes': num_processes,
        'process_id': process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) < 3:
        if missing:
            raise UserError(
                f'--{missing[0]} is missing: --coordinator_address, --num_processes and '
                '--process_id go together'
            )
        if not 0 <= process_id < num_processes:
            raise ConfigError('process_id', process_id, f'0 to {num_processes - 1}')
    elif not (_is_one_of_many() if distributed is None else distributed):
        return
    try:
        jax.distributed.initialize(coordinator_address, num_processes, process_id)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().partition('\n')[0]
        raise UserError(
            f'the processes of the run do not find each other ({reason}): see docs/clusters.md, '
            'or give --distributed=false for one process alone'
        ) from error


def _is_one_of_many() -> bool:
    if ',' in os.environ.get(_TPU_HOSTS, ''):
        return True
    return any(os.environ.get(name, '1') not in ('', '1') for name in _SIZES)


def is_first() -> bool:
    """Whether this process writes the records: the only one, or number 0."""
    return jax.process_index() == 0


@contextlib.contextmanager
def first_alone(name: str) -> Iterator[None]:
    """A block that process 0 has finished before the others begin it.

    Args:
      name: of the block, the same in all processes.
    """
    if jax.process_count() == 1:
        yield
        return
    if not is_first():
        multihost_utils.sync_global_devices(f'one_jax:{name}:first')
    yield
    if is_first():
        multihost_utils.sync_global_devices(f'one_jax:{name}:first')


def wait_for_all(name: str) -> None:
    """Returns when all processes have come to the point of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f'one_jax:{name}')


def from_first(value: int) -> int:
    """The integer that process 0 gives, in all processes."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def agree(facts: Mapping[str, str], error: UserError | None = None) -> None:
    """Makes sure that all processes are about to do the same.

    Args:
      facts: by name ('config', 'data', ...), what must be equal everywhere; the names are the same
        in all processes, the lines of each are in any number.
      error: what this process found wrong before; all stop if one has an error.

    Raises:
      UserError: `error`; or another process has one; or they differ, in the named fact, with the
        first line that is not the same.
    """
    if jax.process_count() == 1:
        if error is not None:
            raise error
        return
    digests = [hashlib.sha256(fact.encode()).digest()[:16] for fact in facts.values()]
    own = np.frombuffer(b''.join(digests), np.uint32).reshape(len(facts), 4)
    failed, everyone = multihost_utils.process_allgather(
        (np.int32(error is not None), own), tiled=False
    )
    if error is not None:
        raise error
    if failed.any():
        raise UserError(f'process {int(failed.argmax())} cannot start: its own message says why')
    for index, name in enumerate(facts):
        different = (everyone[:, index] != everyone[0, index]).any(axis=1)
        if different.any():
            process = int(different.argmax())
            ours, theirs = _lines_apart(facts[name], process)
            raise UserError(
                f'process {process} has another {name} than process 0 ({theirs} and not {ours}): '
                'start all processes with the same command, data and version of one_jax'
            )


def _lines_apart(fact: str, process: int) -> tuple[str, str]:
    """The first lines that only process 0, and only another one, has; all processes call this."""
    size = multihost_utils.process_allgather(np.int32(len(fact.encode()))).max()
    padded = np.frombuffer(fact.encode().ljust(size), np.uint8)
    texts = multihost_utils.process_allgather(padded)
    first, other = (bytes(texts[index]).decode().rstrip().splitlines() for index in (0, process))
    ours = next((line for line in first if line not in other), 'nothing')
    return ours, next((line for line in other if line not in first), 'nothing')


def stop_signals() -> tuple[int, ...]:
    """The signals that a run waits for by itself; of several processes, JAX waits for SIGTERM."""
    return (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()


def stop_agreed(step: int, stop: bool) -> bool:
    """Whether to stop after this step: in all processes alike.

    Of several processes, one that gets SIGTERM tells the others through JAX's preemption service,
    which names a step that none has passed yet.

    Args:
      step: completed steps, the same in all processes.
      stop: whether a signal came, for a run of one process.
    """
    if jax.process_count() == 1:
        return stop
    return multihost_utils.reached_preemption_sync_point(step)
