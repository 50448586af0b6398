"""Several processes of one run: how they connect, agree and take turns.

All of it is JAX's own distributed runtime. With one process these functions do nothing.
"""

import contextlib
import hashlib
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from one_jax.errors import UserError, require

Facts = Mapping[str, Any] | Callable[[], Mapping[str, Any]]
# Set by the launcher in each process of a job of several; TPU's has the hosts of the slice.
_SIZES = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')
_TPU_HOSTS = 'TPU_WORKER_HOSTNAMES'


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    distributed: bool | None = None,
) -> None:
    """Connects to the other processes of the run; call it before anything else of JAX.

    Args:
      coordinator_address: 'host:port' of process 0. With the next two, the cluster is not queried.
      num_processes: how many processes there are.
      process_id: the number of this one, from 0.
      distributed: whether the run has several processes, as the cluster's environment describes
        them; None: only if a TPU slice of several hosts, `srun` or `mpirun` started this process.

    Raises:
      UserError: some of the three flags are missing, or the other processes cannot be reached.
    """
    given = {
        'coordinator_address': coordinator_address,
        'num_processes': num_processes,
        'process_id': process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if not missing:
        allowed = f'0 to {num_processes - 1}'
        require(0 <= process_id < num_processes, 'process_id', process_id, allowed)
    else:
        together = '--coordinator_address, --num_processes and --process_id go together'
        require(len(missing) == 3, missing[0], None, together)
        if not (_is_one_of_many() if distributed is None else distributed):
            return
    try:
        jax.distributed.initialize(coordinator_address, num_processes, process_id)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().partition('\n')[0]
        raise UserError(
            f'the processes of the run do not find each other ({reason}): see docs/clusters.md, '
            'or give --distributed=false for a single process'
        ) from error


def _is_one_of_many() -> bool:
    if ',' in os.environ.get(_TPU_HOSTS, ''):
        return True
    return any(os.environ.get(name, '1') not in ('', '1') for name in _SIZES)


def is_first() -> bool:
    """Whether this is process 0, which writes the files."""
    return jax.process_index() == 0


@contextlib.contextmanager
def first_alone(name: str) -> Iterator[None]:
    """A block that process 0 finishes before the others begin; `name` is equal in all."""
    if not is_first():
        wait_for_all(name)
    try:
        yield
    finally:
        if is_first():
            wait_for_all(name)


def wait_for_all(name: str) -> None:
    """Returns when all processes have reached the point `name`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f'one_jax:{name}')


def from_first(value: int) -> int:
    """Returns process 0's integer in all processes."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


@contextlib.contextmanager
def agreement() -> Iterator[dict[str, Facts]]:
    """A block after which either all processes continue, or all raise.

    Yields a dictionary to fill with what must be equal in all processes: by a name such as
    'config', a mapping or a function that returns one (called only with several processes).

    Raises:
      UserError: the block raised one, here or in another process; or a fact differs between
        processes, with the first line that does.
    """
    facts: dict[str, Facts] = {}
    error = None
    try:
        yield facts
    except UserError as raised:
        error = raised
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.int32(error is not None))
        if error is None and failed.any():
            error = UserError(f'process {int(failed.argmax())} cannot start: see its own message')
    if error is not None:
        raise error
    if jax.process_count() > 1:
        _compare({name: _as_lines(fact) for name, fact in facts.items()})


def _as_lines(fact: Facts) -> str:
    fact = fact() if callable(fact) else fact
    return '\n'.join(f'{name}={value!r}' for name, value in sorted(fact.items()))


def _compare(facts: Mapping[str, str]) -> None:
    """Raises `UserError` if a fact is not the same text in all processes."""
    digests = [hashlib.sha256(text.encode()).digest()[:16] for text in facts.values()]
    own = np.frombuffer(b''.join(digests), np.uint32).reshape(len(facts), 4)
    everyone = multihost_utils.process_allgather(own, tiled=False)
    for index, name in enumerate(facts):
        different = (everyone[:, index] != everyone[0, index]).any(axis=1)
        if different.any():
            process = int(different.argmax())
            ours, theirs = _lines_apart(facts[name], process)
            raise UserError(
                f'process {process} has another {name} than process 0 ({theirs} and not {ours}): '
                'start all processes with the same command, data and version of one_jax'
            )


def _lines_apart(text: str, process: int) -> tuple[str, str]:
    """Returns the first line that only process 0 has, and the first that only `process` has."""
    size = multihost_utils.process_allgather(np.int32(len(text.encode()))).max()
    padded = np.frombuffer(text.encode().ljust(size), np.uint8)
    texts = multihost_utils.process_allgather(padded)
    first, other = (bytes(texts[index]).decode().rstrip().splitlines() for index in (0, process))
    ours = next((line for line in first if line not in other), 'nothing')
    return ours, next((line for line in other if line not in first), 'nothing')


def stop_signals() -> tuple[int, ...]:
    """The signals that a run handles itself; with several processes, JAX handles SIGTERM."""
    return (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()


def stop_agreed(step: int, stop: bool) -> bool:
    """Whether to stop after `step`: in a single process `stop`, whether a signal arrived.

    Of several, the one that gets SIGTERM informs the others through JAX's preemption service, which
    picks a step that none has passed.
    """
    if jax.process_count() == 1:
        return stop
    return multihost_utils.reached_preemption_sync_point(step)
