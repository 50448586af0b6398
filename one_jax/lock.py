"""A workdir belongs to one running process: a second one that starts on it is refused."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from one_jax.errors import UserError

FILE_NAME = '.lock'
# File systems that know no locks (some cloud buckets): the user must take care.
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[None]:
    """Keeps other processes out of `workdir`, which is made if need be.

    The system ends the lock with the process, however it ends; the file stays, and means nothing by
    itself. Across machines it works where the shared file system passes locks on (NFS 4, Lustre).

    Raises:
      UserError: a run is alive there, or the directory cannot be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / FILE_NAME).open('a+')
    except OSError as error:
        raise _unwritable(workdir, error) from None
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
        try:
            file.truncate(0)
            # Past Python's buffer, which would be written once more, and fail, when it is closed.
            os.write(file.fileno(), _own_name().encode())
        except OSError as error:
            raise _unwritable(workdir, error) from None
        yield


def require(workdir: Path) -> None:
    """Makes sure that what this process holds is still there.

    Raises:
      UserError: `workdir` was removed or moved, or is another process's by now.
    """
    try:
        holder = (workdir / FILE_NAME).read_text()
    except OSError:
        holder = ''
    if holder != _own_name():
        raise UserError(
            f'workdir={str(workdir)!r} was removed, moved or replaced while the run was writing to '
            'it: nothing more is written there; put it back or give another --workdir, and run '
            'again'
        )


def _own_name() -> str:
    return f'process {os.getpid()} on {socket.gethostname()}\n'


def _unwritable(workdir: Path, error: OSError) -> UserError:
    return UserError(
        f'workdir={str(workdir)!r} cannot be written ({error.strerror}): give another --workdir'
    )
