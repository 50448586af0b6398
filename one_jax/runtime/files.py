"""Files: JSON read with checks and written completely or not at all; errors of a full disk."""

import contextlib
import errno
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from one_jax.errors import UserError, explain, require_kinds
from one_jax.fields import Kind

# Of the names of temporary files and folders.
_TEMPORARY = '.one_jax'
# Of lists and objects in JSON.
_MAX_DEPTH = 16
# Errors of a file system that accepts no more data.
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ESTALE)


def read_json(path: Path, kinds: Mapping[str, Kind] | None = None) -> dict[str, Any]:
    """Reads the object in a JSON file.

    Args:
      path: of the file.
      kinds: what its fields must be; others, and fields that are missing, are not checked.

    Raises:
      UserError: there is no such file, it cannot be read, it holds something else than one object
        (with numbers that are finite, and every name once), or a field of another kind.
    """
    with explain(f'{str(path)!r} cannot be read', OSError, ValueError):
        # Reading a pipe or a device might never end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError('not a regular file')
        content = path.read_bytes()
    with explain(f'{str(path)!r} is damaged: not JSON', ValueError, RecursionError):
        content = json.loads(
            content,
            parse_float=_finite,
            parse_constant=_finite,
            object_pairs_hook=_unique,
        )
    with explain(f'{str(path)!r} is damaged', UserError):
        if not (isinstance(content, dict) and _is_shallow(content)):
            raise UserError(f'not an object with fields, at most {_MAX_DEPTH} in each other')
        require_kinds(content, kinds or {})
    return content


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f'the number {number}')
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(content := dict(pairs)) < len(pairs):
        raise ValueError('a name twice in an object')
    return content


def _is_shallow(value: Any, depth: int = _MAX_DEPTH) -> bool:
    """Whether lists and objects are nested so few times that all code can follow them."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth > 0 and all(_is_shallow(part, depth - 1) for part in parts)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file completely or not at all; NaN and infinity become null."""
    write(path, json.dumps(jsonable(content), indent=2, allow_nan=False).encode() + b'\n')


def write(path: Path, content: bytes) -> None:
    """Writes a file completely or not at all, through a temporary one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        with temporary.open('xb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def temporary_beside(path: Path) -> Path:
    """Returns a new name for a file or folder that is renamed to `path` when it is complete."""
    return path.with_name(f'.{path.name}.{secrets.token_hex(4)}{_TEMPORARY}')


def temporaries(path: Path) -> list[Path]:
    """Lists what `temporary_beside(path)` has named: some may be in use by another process."""
    name = re.compile(rf'\.{re.escape(path.name)}\.[0-9a-f]{{8}}{re.escape(_TEMPORARY)}')
    return [found for found in path.parent.iterdir() if name.fullmatch(found.name)]


def jsonable(value: Any) -> Any:
    """Replaces NaN and infinity, which JSON lacks, by None in nested lists and dictionaries."""
    if isinstance(value, Mapping):
        return {name: jsonable(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def reporting_failed_writes(message: str) -> Iterator[None]:
    """A block that writes files.

    Args:
      message: of the error, with a field `{reason}`.

    Raises:
      UserError: the disk is full, was removed or became read-only.
    """
    try:
        yield
    except UserError:  # A ValueError, and clear already.
        raise
    except (OSError, ValueError) as error:
        # TensorStore raises ValueError, with the system's message at the end of a long line.
        reasons = [os.strerror(number) for number in _CANNOT_WRITE]
        found = [reason for reason in reasons if reason in str(error)]
        if not found:
            raise
        raise UserError(message.replace('{reason}', found[0])) from error


def require_room(directory: Path, size: int) -> None:
    """Raises OSError if fewer than `size` bytes are free in `directory`."""
    disk = shutil.disk_usage(directory)
    # Some network file systems report zeros.
    if disk.total and disk.free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
