"""Runs a command in a fork of this process, and judges its exit, its output and its files.

Importing JAX, TensorFlow and PyTorch takes longer than most cases: it is done once, here, before
the first fork. Only a child starts a backend.
"""

import dataclasses
import os
import resource
import runpy
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax  # noqa: F401
import orbax.checkpoint  # noqa: F401
import tensorboardX  # noqa: F401
import tensorflow_datasets  # noqa: F401
from PIL import Image

from one_jax import config, train
from one_jax.data import jpeg, prepared  # noqa: F401
from one_jax.reporting import curves, runs  # noqa: F401
from one_jax.students import evaluation, importing  # noqa: F401
from one_jax.training import export  # noqa: F401

TIMEOUT = 120
# What a command may allocate: more is an error of Python, which is found, not of the machine.
_MEMORY = 12 * 2**30
# Made by the code in malformed files, if anything runs it.
CANARY = Path(tempfile.gettempdir(), f'one_jax_canary_{os.getpid()}')
# Printed by `main` where it would compile: the input was accepted.
COMPILES = 'the train step would be compiled now'
_NOBODY = 65534
# Written by every start; names the process.
_LOCK = '.lock'

Check = Callable[[str], bool]


@dataclasses.dataclass(frozen=True)
class Case:
    """A malformed input and what a command must make of it.

    Attributes:
      kind: of the input; a row of the table.
      name: of the case.
      command: module of one_jax and arguments, with {input}, {output} and the names of `Bases`.
      make: writes the input into the new folder {input}.
      accepts: None if the command must end with one line of error; otherwise whether its output
        is right, which must end with status 0.
      names: what the error must name; '' leaves it open.
      compiles: whether `main` compiles and trains; otherwise it stops before.
      writes: whether an accepted command may write into the input: a workdir.
      unprivileged: whether the superuser would notice nothing.
    """

    kind: str
    name: str
    command: Sequence[str]
    make: Callable[[Path], None] = lambda folder: None
    accepts: Check | None = None
    names: str = ''
    compiles: bool = False
    writes: bool = False
    unprivileged: bool = False


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command ended: exit status (None: it hung), standard output and standard error."""

    status: int | None
    output: str
    errors: str


def shows(*texts: str) -> Check:
    """Returns a check that all `texts` are in the output."""
    return lambda output: all(text in output for text in texts)


def run_case(case: Case, folder: Path, bases: Mapping[str, Path]) -> str:
    """Makes the input in `folder`, runs the command, and returns what is wrong, or ''.

    The folder stays if something is wrong.
    """
    folder.mkdir()
    own_input, output = folder / 'input', folder / 'output'
    own_input.mkdir()
    case.make(own_input)
    places = {**bases, 'input': own_input, 'output': output}
    before = snapshot(own_input)
    outcome = run(fill(case.command, places), folder, case.compiles, case.unprivileged)
    problem = judge(case, outcome, fill((case.names,), places)[0])
    changed = sorted({name for name, _ in before.items() ^ snapshot(own_input).items()})
    if not problem and changed and not (case.writes and case.accepts):
        problem = f'changed its input: {changed[:5]}'
    if CANARY.exists():
        CANARY.unlink()
        problem = f'ran code of its input; {problem}'
    if not problem and case.accepts is None and not case.compiles and any(snapshot(output)):
        problem = f'refused, but wrote {sorted(snapshot(output))[:5]}'
    return problem


def fill(command: Sequence[str], places: Mapping[str, Path]) -> list[str]:
    """Replaces {name} by the path of that name; other braces stay as they are."""
    for name, path in places.items():
        command = [argument.replace(f'{{{name}}}', str(path)) for argument in command]
    return list(command)


def judge(case: Case, outcome: Outcome, named: str) -> str:
    """Returns what is wrong with an outcome, or ''; an error must contain `named`."""
    lines = outcome.errors.splitlines()
    if outcome.status is None:
        return f'hang: still running after {TIMEOUT} s'
    if 'Traceback' in outcome.errors:
        return f'traceback: {lines[-1]}'
    if outcome.status not in (0, 1, 2):
        return f'exit status {outcome.status}: {outcome.errors[-200:]!r}'
    if case.accepts is not None:
        if outcome.status:
            return f'refused an input that is documented: {outcome.errors[-300:]!r}'
        right = case.accepts(outcome.output)
        return '' if right else f'wrong output: {outcome.output[-300:]!r}'
    if outcome.status == 0:
        return f'silent acceptance: {outcome.output[-200:]!r}'
    if len(lines) != 1 or not lines[0].startswith('error: '):
        return f'not one line of error but {len(lines)}: {outcome.errors[:300]!r}'
    if named not in outcome.errors:
        return f'refused for another reason, {named!r} is not named: {outcome.errors[:300]!r}'
    return ''


def snapshot(folder: Path) -> dict[str, object]:
    """Returns what lies below a folder: the bytes of files, the targets of links, the kinds."""
    found = {}
    for parent, folders, names in os.walk(folder):
        for name in {*folders, *names} - {_LOCK}:
            path = os.path.join(parent, name)
            mode = os.lstat(path).st_mode
            content: object = stat.S_IFMT(mode)
            if stat.S_ISLNK(mode):
                content = os.readlink(path)
            elif stat.S_ISREG(mode):
                content = Path(path).read_bytes()
            found[os.path.relpath(path, folder)] = content
    return found


def run(
    command: Sequence[str], folder: Path, compile_steps: bool = True, unprivileged: bool = False
) -> Outcome:
    """Runs `python -m one_jax.COMMAND ARGUMENTS...` in a fork; its output goes into `folder`."""
    streams = [folder / 'stdout', folder / 'stderr']
    sys.stdout.flush()
    sys.stderr.flush()
    if unprivileged:
        folder.chmod(0o777)
    child = os.fork()
    if child == 0:
        status = 70
        try:
            status = _run_in_child(command, streams, compile_steps, unprivileged)
        finally:
            os._exit(status)
    status = _wait(child)
    return Outcome(status, *(path.read_text(errors='replace') for path in streams))


def _wait(child: int) -> int | None:
    """Returns the exit status of a child, None if it took too long."""
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _run_in_child(
    command: Sequence[str], streams: Sequence[Path], compile_steps: bool, unprivileged: bool
) -> int:
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout = open(1, 'w', closefd=False)  # noqa: SIM115
    sys.stderr = open(2, 'w', closefd=False, errors='backslashreplace')  # noqa: SIM115
    used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
    if unprivileged and os.geteuid() == 0:
        os.seteuid(_NOBODY)
    if not compile_steps:
        train.CompiledStep = _stop_before_compiling
    module, *arguments = command
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(f'one_jax.{module}', run_name='__main__', alter_sys=True)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except _Reached:
        print(COMPILES)
        status = 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


class _Reached(BaseException):
    """`main` is about to compile."""


def _stop_before_compiling(*_: object) -> None:
    raise _Reached


def start() -> None:
    """Imports what is imported late, so that no child does it."""
    jpeg.import_tensorflow()
    config.default_config()
    Image.init()
    try:
        import torch
    except ImportError:
        return
    # Threads do not survive a fork.
    torch.set_num_threads(1)
