"""The files of a run, and the lock that gives its directory to one process."""

import contextlib
import errno
import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from one_jax import config as config_lib
from one_jax.errors import UserError
from one_jax.runtime import files

CONFIG, RESULT, CURVES, CHECKPOINTS = 'config.json', 'result.json', 'curves.png', 'checkpoints'
LOCK = '.lock'
# File systems without locks (some cloud buckets): there the user must take care.
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def check(workdir: Path, config: Any) -> None:
    """Checks that a run of `config` may write to `workdir`; leaves no trace.

    Raises:
      UserError: the workdir cannot be written, or holds a run of another config or other files.
    """
    existing = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    with _reporting_unwritable(workdir), tempfile.TemporaryFile(dir=existing):
        pass
    if (workdir / CONFIG).exists():
        stored = config_lib.stored_config(files.read_json(workdir / CONFIG))
        if different := config_lib.differences(stored, config):
            raise UserError(
                f'workdir={str(workdir)!r} holds a run of another config; give another --workdir. '
                f'They differ in {"; ".join(different)}'
            )
    elif workdir.exists() and not all(map(_is_left_by_a_start, workdir.iterdir())):
        raise UserError(
            f'workdir={str(workdir)!r} is not empty and holds no {CONFIG}: '
            'give the directory of a run, or an empty or a new one'
        )


def _is_left_by_a_start(file: Path) -> bool:
    """Whether a run that was killed before it had a config.json may have left this file."""
    return file.name == LOCK or file.name.startswith(f'.{CONFIG}.')


def read_config(workdir: Path) -> Any:
    """Reads the resolved config of the run in `workdir`.

    Raises:
      UserError: there is no run.
    """
    if not (workdir / CONFIG).is_file():
        raise UserError(f'workdir={str(workdir)!r} holds no run: there is no {CONFIG} in it')
    return config_lib.stored_config(files.read_json(workdir / CONFIG))


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[None]:
    """Keeps other processes out of `workdir`, which is created if it does not exist.

    The system releases the lock when the process ends, however it ends; the file stays, without
    meaning. It works across machines if the shared file system supports locks (NFS 4, Lustre).

    Raises:
      UserError: another process holds the workdir, or it cannot be written.
    """
    with _reporting_unwritable(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / LOCK).open('a+')
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or 'another process'
            raise UserError(
                f'workdir={str(workdir)!r} is in use by {holder}: wait for it, or give another '
                '--workdir'
            ) from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        with _reporting_unwritable(workdir):
            file.truncate(0)
            # Not through Python's buffer, which would be written again, and fail, on closing.
            os.write(file.fileno(), _own_name().encode())
        yield


def require(workdir: Path) -> None:
    """Checks that the workdir this process holds is still there.

    Raises:
      UserError: it was removed, moved or replaced.
    """
    try:
        holder = (workdir / LOCK).read_text()
    except OSError:
        holder = ''
    if holder != _own_name():
        raise UserError(
            f'workdir={str(workdir)!r} was removed, moved or replaced while the run was writing to '
            'it: nothing more is written there; restore it or give another --workdir, and run again'
        )


@contextlib.contextmanager
def _reporting_unwritable(workdir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f'workdir={str(workdir)!r} cannot be written ({error.strerror}): give another --workdir'
        ) from None


def _own_name() -> str:
    return f'process {os.getpid()} on {socket.gethostname()}\n'
