"""How much memory is available, before anything is read."""

import os
from pathlib import Path

import jax

_MEMINFO = Path('/proc/meminfo')
# Limit and usage of the container (cgroup) of this process, if it runs in one.
_CGROUP = Path('/sys/fs/cgroup')


def available_bytes() -> int | None:
    """Returns the memory that can be used without swapping; None where the system hides it."""
    limits = [_system_bytes(), _container_bytes()]
    return min((limit for limit in limits if limit is not None), default=None)


def readable_size(size: int) -> str:
    """Formats a number of bytes: '1.90 GB', '2.0 MB'."""
    return f'{size / 1e9:.2f} GB' if size >= 1e8 else f'{size / 1e6:.1f} MB'


def _system_bytes() -> int | None:
    try:
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith('MemAvailable:'):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    # Not Linux: the total memory still catches what can never fit.
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
    # The page cache counts as used, but can be reclaimed.
    return max(int(limit) - used + int(statistics.get('inactive_file', 0)), 0)


def program_bytes(compiled: jax.stages.Compiled) -> int | None:
    """What a compiled program takes on one device, arguments included; None if it is not known."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    return (
        analysis.argument_size_in_bytes
        # Results that do not take over the buffer of an argument.
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
        + analysis.generated_code_size_in_bytes
    )


def device_bytes(device: jax.Device) -> int | None:
    """What `device` has for this process; None if it does not report that.

    An accelerator reports what JAX may use, which XLA_PYTHON_CLIENT_MEM_FRACTION changes. The CPU
    devices of one process share what the system has left.
    """
    statistics = device.memory_stats() or {}
    if 'bytes_limit' in statistics:
        return statistics['bytes_limit']
    free = available_bytes() if device.platform == 'cpu' else None
    return None if free is None else free // jax.local_device_count()
