"""Whether a data set fits into memory, asked before a byte of it is read."""

import os
from pathlib import Path

from one_jax.errors import UserError

_MEMINFO = Path('/proc/meminfo')
# Limit and use of the container (cgroup) this process runs in, where there is one.
_CGROUP = Path('/sys/fs/cgroup')


def available_bytes() -> int | None:
    """Memory that can be taken without swapping; None where the system does not tell."""
    limits = [_system_bytes(), _container_bytes()]
    return min((limit for limit in limits if limit is not None), default=None)


def check(name: str, num_images: int, image_shape: tuple[int, ...], advice: str = '') -> None:
    """Refuses a data set that is larger than the memory there is.

    Args:
      name: value of `data.name`, for the message.
      num_images: to be held in memory at a time, copies included.
      image_shape: (H, W, C), one byte a value.
      advice: what else the user may do, as the end of a sentence that lists remedies.

    Raises:
      UserError: with both sizes.
    """
    height, width, channels = image_shape
    # Label, and the order of an epoch, beside each image.
    needed = num_images * (height * width * channels + 12)
    available = available_bytes()
    if available is not None and needed > available:
        raise UserError(
            f'data.name={name!r} needs {readable_size(needed)} of memory ({num_images} images of '
            f'{height}x{width}), but {readable_size(available)} are available: free some, or use a '
            f'machine with more{advice}'
        )


def readable_size(size: int) -> str:
    """A number of bytes for a person to read: '1.90 GB', '2.0 MB'."""
    return f'{size / 1e9:.2f} GB' if size >= 1e8 else f'{size / 1e6:.1f} MB'


def _system_bytes() -> int | None:
    try:
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith('MemAvailable:'):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    # Not Linux: all the memory there is, which still catches what can never fit.
    try:
        return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    except (ValueError, OSError):
        return None


def _container_bytes() -> int | None:
    try:
        limit = (_CGROUP / 'memory.max').read_text().strip()
        if limit == 'max':
            return None
        used = int((_CGROUP / 'memory.current').read_text())
        statistics = dict(
            line.split() for line in (_CGROUP / 'memory.stat').read_text().splitlines()
        )
    except (OSError, ValueError):
        return None
    # Cached files count as used, but make way.
    return max(int(limit) - used + int(statistics.get('inactive_file', 0)), 0)
