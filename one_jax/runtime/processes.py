"""Several processes of one run: how they connect, agree and take turns.

All of it is JAX's own distributed runtime. With one process these functions do nothing.
"""

import atexit
import contextlib
import ctypes
import faulthandler
import itertools
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from one_jax.errors import UserError, require

Facts = Mapping[str, Any] | Callable[[], Mapping[str, Any]]
# Set by the launcher in each process of a job of several; TPU's has the hosts of the slice.
_SIZES = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')
_TPU_HOSTS = 'TPU_WORKER_HOSTNAMES'
# Process 0 may prepare a data set while the others wait. If it dies, they do not wait.
_DAY = 86_400
_SIGNAL_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)
_state = multihost_utils.distributed.global_state
_numbers = itertools.count()
# What JAX's preemption service does on SIGTERM; the handler of SIGABRT, which must not be freed.
_preempt: Callable[[int], None] | None = None
_aborted: Callable[[int], None] | None = None
_FATAL = re.compile(
    r'distributed service detected fatal errors.*?absl::Status: (.*?)(\n\n|\nThe tasks|$)', re.S
)
_NOT_FOUND = (
    'the processes of the run do not find each other ({}): one is missing, or was started twice or '
    'with other flags; see docs/clusters.md, or give --distributed=false for a single process'
)
_LOST = (
    'this process lost the others ({}): see their messages; the same command in all of them resumes'
)
# Which of them to print; none when this process ends anyway.
_messages = [_NOT_FOUND]


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    distributed: bool | None = None,
    connect_timeout: int = 300,
    heartbeat_timeout: int = 100,
) -> None:
    """Connects to the other processes of the run; call it before anything else of JAX.

    If this process does not find the others, or loses them later, it ends with one line and
    status 1.

    Args:
      coordinator_address: 'host:port' of process 0. With the next two, the cluster is not queried.
      num_processes: how many processes there are.
      process_id: the number of this one, from 0.
      distributed: whether the run has several processes, as the cluster's environment describes
        them; None: only if a TPU slice of several hosts, `srun` or `mpirun` started this process.
      connect_timeout: seconds until all processes must have connected.
      heartbeat_timeout: seconds until a process that does not answer counts as lost.

    Raises:
      UserError: some of the three flags are missing, the cluster's environment is not understood.
    """
    given = {
        'coordinator_address': coordinator_address,
        'num_processes': num_processes,
        'process_id': process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if not missing:
        require(num_processes >= 1, 'num_processes', num_processes, 'at least 1')
        allowed = f'0 to {num_processes - 1}'
        require(0 <= process_id < num_processes, 'process_id', process_id, allowed)
        allowed = 'host:port of process 0, with a port of 1 to 65535'
        port = re.fullmatch(r'.+:(\d{1,5})', coordinator_address)
        valid = port is not None and 0 < int(port[1]) < 65536
        require(valid, 'coordinator_address', coordinator_address, allowed)
    else:
        together = '--coordinator_address, --num_processes and --process_id go together'
        require(len(missing) == 3, missing[0], None, together)
        if not (_is_one_of_many() if distributed is None else distributed):
            return
    _handle_aborts()
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            initialization_timeout=connect_timeout,
            heartbeat_timeout_seconds=heartbeat_timeout,
            shutdown_timeout_seconds=heartbeat_timeout,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(_NOT_FOUND.format(_first_sentence(str(error)))) from error
    _take_sigterm_back()
    _messages[0] = _LOST


def _is_one_of_many() -> bool:
    if ',' in os.environ.get(_TPU_HOSTS, ''):
        return True
    return any(os.environ.get(name, '1') not in ('', '1') for name in _SIZES)


def count() -> int:
    """Returns the number of processes, before JAX has found its devices too."""
    return _state.num_processes


def is_first() -> bool:
    """Whether this is process 0, which writes the files."""
    return _state.process_id == 0


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
    if count() > 1:
        multihost_utils.sync_global_devices(f'one_jax:{name}')


def from_first(value: int) -> int:
    """Returns process 0's integer in all processes."""
    if count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


@contextlib.contextmanager
def agreement(timeout: int = _DAY) -> Iterator[dict[str, Facts]]:
    """A block after which either all processes continue, or all raise.

    Yields a dictionary to fill with what must be equal in all processes: by a name such as
    'config', a mapping or a function that returns one (called only with several processes).
    `timeout` is how many seconds to wait for the slowest process.

    Raises:
      UserError: the block raised one, here or in another process; a fact differs between
        processes, with the first line that does; or a process did not arrive.
    """
    facts: dict[str, Facts] = {}
    error, own = None, {}
    try:
        yield facts
        if count() > 1:
            own = {name: _as_lines(fact) for name, fact in facts.items()}
    except UserError as raised:
        error = raised
    if count() > 1:
        verdict = _verdict(None if error else own, timeout)
        error = error or (UserError(verdict) if verdict else None)
    if error is not None:
        raise error


def _as_lines(fact: Facts) -> str:
    fact = fact() if callable(fact) else fact
    return '\n'.join(f'{name}={value!r}' for name, value in sorted(fact.items()))


def _verdict(own: dict[str, str] | None, timeout: int) -> str:
    """Returns process 0's judgement of the facts of all processes: an error message, or ''.

    Through the key-value store of JAX's coordinator: collectives require that all agree.
    """
    client, key = _state.client, f'one_jax/agreement/{next(_numbers)}'
    client.key_value_set(f'{key}/{_state.process_id}', json.dumps(own))
    if is_first():
        everyone = []
        try:
            for process in range(count()):
                text = client.blocking_key_value_get(f'{key}/{process}', 1000 * timeout)
                everyone.append(json.loads(text))
            verdict = _difference(everyone)
        except jax.errors.JaxRuntimeError:
            verdict = f'process {len(everyone)} has not started within {timeout} s: see its message'
        client.key_value_set(f'{key}/verdict', json.dumps(verdict))
    # Process 0 waits for each of the others.
    wait = 1000 * (timeout * count() + 60)
    return json.loads(client.blocking_key_value_get(f'{key}/verdict', wait))


def _difference(everyone: Sequence[dict[str, str] | None]) -> str:
    """Returns in what the facts of the processes differ, or which process has none; '' if equal."""
    if None in everyone:
        return f'process {everyone.index(None)} cannot start: see its own message'
    for process, facts in enumerate(everyone):
        for name, text in everyone[0].items():
            ours, theirs = text.splitlines(), facts.get(name, '').splitlines()
            if ours != theirs:
                mine = next((line for line in ours if line not in theirs), 'nothing')
                other = next((line for line in theirs if line not in ours), 'nothing')
                return (
                    f'process {process} has another {name} than process 0 ({other} and not {mine}):'
                    ' start all processes with the same command, data and version of one_jax'
                )
    return ''


def request_stop() -> None:
    """Asks all processes to stop after a step that none has passed: see `stop_agreed`."""
    if _preempt is not None:
        _preempt(signal.SIGTERM)


def stop_agreed(step: int, stop: bool) -> bool:
    """Whether to stop after `step`: in a single process `stop`, whether a signal arrived.

    Of several, the one that gets the signal informs the others through JAX's preemption service,
    which picks a step that none has passed.
    """
    if count() == 1:
        return stop
    return multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def ending_when_lost() -> Iterator[None]:
    """A block in which an error of JAX ends one of several processes with one line and status 1.

    What one process does not survive appears in the others as errors of any kind.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if count() == 1:
            raise
        _end(str(error))


def _first_sentence(text: str) -> str:
    return ' '.join(text.split()).partition('. ')[0][:300]


def _end(reason: str) -> None:
    line = f'error: {_messages[0].format(_first_sentence(reason))}\n'
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), line.encode(errors='backslashreplace'))
    os._exit(1)  # JAX would wait for the others.


def _handle_aborts() -> None:
    """From now on, this process ends with one line and status 1 when JAX's client gives up.

    The client calls abort() if it cannot connect or loses the others, after many lines by C++ on
    stderr. These go to a file instead, from which the reason is taken; Python keeps stderr. Any
    other abort() shows what is in the file.
    """
    global _aborted
    log = tempfile.TemporaryFile()  # noqa: SIM115
    sys.stderr = os.fdopen(os.dup(2), 'w', buffering=1, errors='backslashreplace')
    logging.get_absl_handler().python_handler.stream = sys.stderr
    # Orbax warns of what `stop_agreed` returns.
    logging.get_absl_logger().addFilter(lambda x: 'preemption sync point' not in x.getMessage())
    os.dup2(log.fileno(), 2)

    @_SIGNAL_HANDLER
    def aborted(number: int) -> None:
        if not _messages:
            os._exit(1)
        text = os.pread(log.fileno(), 2**20, 0).decode(errors='replace')
        if fatal := _FATAL.search(text):
            _end(fatal[1])
        sys.stderr.write(text)
        faulthandler.dump_traceback(sys.stderr)
        os._exit(128 + number)

    _aborted = aborted
    atexit.register(_messages.clear)
    _set_handler(signal.SIGABRT, ctypes.cast(aborted, ctypes.c_void_p))


def _take_sigterm_back() -> None:
    """Replaces the handler of JAX's preemption service by Python's, and keeps it to be called."""
    global _preempt
    _preempt = _SIGNAL_HANDLER(_set_handler(signal.SIGTERM, None))
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def _set_handler(number: int, handler: ctypes.c_void_p | None) -> int:
    """Sets the handler of a signal in C (None: the default), and returns the previous one."""
    function = ctypes.CDLL(None).signal
    function.argtypes, function.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    return function(number, handler)
