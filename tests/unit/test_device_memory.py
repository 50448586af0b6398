"""The memory of a train step as its compiler reports it; see tests/training for compiled ones."""

import jax

from one_jax.runtime import memory
from one_jax.training.compiled_step import Memory


def test_memory_prints_the_parts_that_are_not_zero():
    parts = Memory(2 * 10**9, 10**9, 10**6, 0, 9 * 10**9, 10**9)
    assert parts.needed == 12_001_000_000
    assert parts.is_too_large
    assert str(parts) == (
        'memory per device: 12.00 GB (state 2.00 GB, teachers 1.00 GB, batch 1.0 MB, '
        'temporaries 9.00 GB) of 1.00 GB'
    )


def test_memory_of_an_evaluation_takes_the_place_of_a_steps():
    parts = Memory(2 * 10**9, 0, 10**6, 0, 9 * 10**9, 10**10, evaluation=8 * 10**9)
    assert parts.needed == 11_001_000_000
    assert ', temporaries 9.00 GB, or evaluation 8.00 GB) of 10.00 GB' in str(parts)
    larger = Memory(2 * 10**9, 0, 10**6, 0, 10**9, 10**10, evaluation=9 * 10**9)
    assert (larger.needed, larger.is_too_large) == (11 * 10**9, True)


def test_memory_that_is_unknown_is_reported_and_never_too_large():
    assert not Memory(10**9, 0, 0, 10**6, 0, None).is_too_large
    unmeasured = Memory(10**9, 0, 10**6, 10**7, None, 2 * 10**9)
    assert not unmeasured.is_too_large
    assert str(unmeasured) == (
        'memory per device: 1.01 GB (state 1.00 GB, data set 10.0 MB, batch 1.0 MB) '
        'and temporaries that the compiler does not report of 2.00 GB'
    )


class Device:
    """A device that reports `statistics`."""

    platform = 'gpu'

    def __init__(self, statistics):
        self._statistics = statistics

    def memory_stats(self):
        return self._statistics


def test_device_bytes_are_the_allocators_limit_or_a_share_of_the_system():
    assert memory.device_bytes(Device({'bytes_limit': 80_000})) == 80_000
    assert memory.device_bytes(Device({'bytes_in_use': 1})) is None
    assert memory.device_bytes(Device(None)) is None
    # Four CPU devices share the memory of the system.
    assert 0 < memory.device_bytes(jax.devices()[0]) <= memory.available_bytes() / 3
