"""The files of a run, and the lock that gives its directory to one process."""

import contextlib
import errno
import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from one_jax import config as config_lib
from one_jax.errors import UserError, explain
from one_jax.runtime import files, processes, records

CONFIG, RESULT, CURVES, CHECKPOINTS = 'config.json', 'result.json', 'curves.png', 'checkpoints'
# The fingerprint of the data and the exported students with which the run began.
DATA = 'data.json'
LOCK = '.lock'
# Orbax takes the paths of checkpoints for patterns in some places.
_PATTERN_CHARACTERS = '*?[\\'
# File systems without locks (some cloud buckets): there the user must take care.
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def check(workdir: Path, config: Any, fingerprint: Mapping[str, Any] | None = None) -> None:
    """Checks that a run of `config` may write to `workdir`; leaves no trace.

    Args:
      workdir: the directory.
      config: resolved.
      fingerprint: of the data and the exported students, if they are known already.

    Raises:
      UserError: the workdir cannot be written, has a path that checkpoints cannot have, or holds a
        run of another config, a run on other data, or other files.
    """
    _check_path(workdir)
    with _reporting_unwritable(workdir):
        existing = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    if (workdir / CONFIG).exists():
        different = config_lib.differences(read_config(workdir), config)
        _require_same(workdir, 'a run of another config', different)
        if fingerprint is not None:
            _check_data(workdir, fingerprint)
    elif workdir.exists() and not all(map(_is_left_by_a_start, workdir.iterdir())):
        raise UserError(
            f'workdir={str(workdir)!r} is not empty and holds no {CONFIG}: '
            'give the directory of a run, or an empty or a new one'
        )


def _check_path(workdir: Path) -> None:
    path = str(workdir.absolute())
    # Python decodes bytes that are not UTF-8 so.
    if any(c in _PATTERN_CHARACTERS or '\udc80' <= c <= '\udcff' for c in path):
        raise UserError(
            f'workdir={path!r} is not allowed: checkpoints cannot be read back from a path with '
            f'one of {" ".join(_PATTERN_CHARACTERS)} or that is not UTF-8; rename it, or give '
            'another --workdir'
        )


def check_checkpoint(
    workdir: Path,
    config: Any,
    progress: Mapping[str, Any],
    fingerprint: Mapping[str, Any] | None = None,
) -> None:
    """Checks that a checkpoint in `workdir` is of a run of `config`, on data of `fingerprint`.

    Args:
      workdir: the directory.
      config: resolved.
      progress: of the checkpoint; earlier versions recorded no more than the teachers.
      fingerprint: if data and students matter.

    Raises:
      UserError: it is of another run.
    """
    stored, different = progress.get('config'), []
    if stored:
        different += config_lib.differences(config_lib.stored_config(stored), config)
    if fingerprint is not None and not (before := progress.get('fingerprint')):
        field = 'method.teachers'
        teachers = enumerate(progress.get('teachers', ()))
        before = {f'{field}[{index}]': teacher['sha256'] for index, teacher in teachers}
        fingerprint = {name: fingerprint[name] for name in fingerprint if name.startswith(field)}
    if fingerprint is not None:
        different += _differences(before, fingerprint)
    _require_same(workdir, 'a checkpoint of another config, data or teacher', different)


def _check_data(workdir: Path, fingerprint: Mapping[str, Any]) -> None:
    if (workdir / DATA).exists():
        different = _differences(files.read_json(workdir / DATA), fingerprint)
        _require_same(workdir, 'a run on other data or with another teacher', different)
    elif processes.is_first():
        print(
            f'workdir={str(workdir)!r} has no {DATA}, as in earlier versions: whether the run '
            'began on the same data is not known'
        )


def _differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describes in what two fingerprints differ."""
    lines = []
    for name in dict.fromkeys([*stored, *now]):
        old, new = stored.get(name, 'none'), now.get(name, 'none')
        if old != new and isinstance(old, list) and isinstance(new, list):
            # The first few names that only one of them has.
            old, new = ([x for x in a if x not in b][:5] for a, b in ((old, new), (new, old)))
            only = f'only in the workdir {old}, only now {new}'
            lines.append(f'{name}: {only if old or new else "in another order"}')
        elif old != new:
            lines.append(f'{name}: {old} in the workdir, {new} now')
    return lines


def _require_same(workdir: Path, held: str, different: list[str]) -> None:
    if different:
        raise UserError(
            f'workdir={str(workdir)!r} holds {held}; give another --workdir. They differ in '
            f'{"; ".join(different)}'
        )


def _is_left_by_a_start(file: Path) -> bool:
    """Whether a run that was killed before it had a config.json may have left this file."""
    # Earlier versions named their temporary files so.
    return file.name in (LOCK, DATA) or file.name.startswith((f'.{CONFIG}.', f'.{DATA}.'))


def read_config(workdir: Path) -> Any:
    """Reads the resolved config of the run in `workdir`.

    Raises:
      UserError: there is no run, or an exported student, or its config is damaged.
    """
    _check_path(workdir)
    # Unlike `Path.exists`, this returns False for a name that is too long.
    if not os.path.exists(workdir / CONFIG):
        raise UserError(f'workdir={str(workdir)!r} holds no run: there is no {CONFIG} in it')
    content = files.read_json(workdir / CONFIG)
    if 'label_names' in content:
        raise UserError(
            f'workdir={str(workdir)!r} is an exported student, not a run: give the directory of a '
            'run, or --student where the command has it'
        )
    with explain(f'{str(workdir / CONFIG)!r} is damaged', UserError):
        return config_lib.stored_config(content)


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[None]:
    """Keeps other processes out of `workdir`, which is created if it does not exist.

    The system releases the lock when the process ends, however it ends; the file stays, without
    meaning. It works across machines if the shared file system supports locks (NFS 4, Lustre).
    Temporary files that killed processes left are removed.

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
        else:
            for name in (CONFIG, RESULT, DATA, records.FILE_NAME):
                for litter in files.temporaries(workdir / name):
                    litter.unlink()
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
