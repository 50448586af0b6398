"""Writing files: JSON completely or not at all, and one clear error for a full disk."""

import contextlib
import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from one_jax.errors import UserError

# Errors of a file system that accepts no more data.
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ESTALE)


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
    """Writes a JSON file through a temporary one; NaN and infinity become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    try:
        with os.fdopen(handle, 'w') as file:
            json.dump(jsonable(content), file, indent=2, allow_nan=False)
            file.write('\n')
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


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
