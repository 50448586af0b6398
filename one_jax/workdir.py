"""The files of a run beside its checkpoints: config.json, result.json; and whose workdir it is."""

import contextlib
import errno
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import one_jax
from one_jax import config as config_lib
from one_jax import lock, metrics
from one_jax.errors import UserError

CONFIG, RESULT, CURVES, CHECKPOINTS = 'config.json', 'result.json', 'curves.png', 'checkpoints'
# What a file system says that takes no more.
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ESTALE)


def check(workdir: Path, config: Any) -> None:
    """Makes sure that a run of `config` may write to `workdir`; leaves no trace.

    Raises:
      UserError: the workdir cannot be written, or holds a run of another config, or something else.
    """
    existing = workdir
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(
            f'workdir={str(workdir)!r} cannot be written ({error.strerror}): give another --workdir'
        ) from None
    if (workdir / CONFIG).exists():
        different = config_lib.differences(read_json(workdir / CONFIG), config.to_dict())
        if different:
            raise UserError(
                f'workdir={str(workdir)!r} holds a run of another config; give another --workdir. '
                f'They differ in {"; ".join(different)}'
            )
    elif workdir.exists() and not all(map(_is_of_a_start, workdir.iterdir())):
        raise UserError(
            f'workdir={str(workdir)!r} is not empty and holds no {CONFIG}: '
            'give the directory of a run, or an empty or a new one'
        )


def _is_of_a_start(file: Path) -> bool:
    """Whether a run that was killed before it had a config.json may have left this file."""
    return file.name == lock.FILE_NAME or file.name.startswith(f'.{CONFIG}.')


@contextlib.contextmanager
def reporting_failed_writes(workdir: Path) -> Iterator[None]:
    """A block that writes to `workdir`.

    Raises:
      UserError: the disk is full, went away, or was made read-only.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        raise UserError(
            f'workdir={str(workdir)!r} cannot be written any more ({error.strerror}); its '
            'checkpoints are untouched: make room, and the same command goes on'
        ) from error


def read_config(workdir: Path) -> Any:
    """The config of the run in `workdir`, locked.

    Raises:
      UserError: there is no run.
    """
    if not (workdir / CONFIG).is_file():
        raise UserError(f'workdir={str(workdir)!r} holds no run: there is no {CONFIG} in it')
    return config_lib.stored_config(read_json(workdir / CONFIG))


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
      UserError: it is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f'{str(path)!r} is damaged: not JSON ({error})') from None


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file whole or not at all; what JSON has not, NaN and infinity, becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    try:
        with os.fdopen(handle, 'w') as file:
            json.dump(metrics.jsonable(content), file, indent=2, allow_nan=False)
            file.write('\n')
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    packages = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
    return {
        'one_jax': one_jax.__version__,
        'python': platform.python_version(),
        **{package: metadata.version(package) for package in packages},
    }


def device_name() -> str:
    """The accelerator, or the processor's architecture and core count."""
    device = jax.devices()[0]
    if device.platform == 'cpu':
        return f'cpu ({platform.machine()}, {os.cpu_count()} cores)'
    return device.device_kind
