"""The scalars of the train steps on their way from the device to the host."""

import collections
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

# Compiled calls that may be under way before the host waits: enough to keep the device busy, few
# enough that a signal is soon obeyed.
MAX_CALLS_IN_FLIGHT = 4


class Readback:
    """Hands the scalars over in the order of the steps, without letting the device wait for it.

    What is on the device is read when it is there, and at the latest when somebody needs it: a
    record is written while the steps after it are computed.

    Args:
      take: called with the number of completed steps before a call, and its scalars.
      record: called with the step of a record, when all scalars before it were taken.
    """

    def __init__(
        self, take: Callable[[int, dict[str, np.ndarray]], None], record: Callable[[int], None]
    ):
        self._take, self._record = take, record
        # Calls (step, count, scalars), and steps of records (step, 0, None), in their order.
        self._queue: collections.deque[tuple[int, int, Any]] = collections.deque()

    def add(self, step: int, count: int, scalars: dict[str, jax.Array]) -> None:
        """Notes a call that was made: `count` steps after `step`.

        Args:
          step: completed before.
          count: how many of the first rows of the scalars are steps.
          scalars: [n, ...] each, on the device.
        """
        for values in scalars.values():
            values.copy_to_host_async()
        self._queue.append((step, count, scalars))
        calls = [scalars for _, _, scalars in self._queue if scalars is not None]
        if len(calls) > MAX_CALLS_IN_FLIGHT:
            jax.block_until_ready(calls[-1 - MAX_CALLS_IN_FLIGHT])

    def mark_record(self, step: int) -> None:
        """Notes that a record is due after `step`; the records before it are written now."""
        self.read(keep=self._behind_last_record())
        self._queue.append((step, 0, None))

    def read_ready(self) -> None:
        """Hands over what the device has done by now.

        Not for several processes: they would differ in when they notice what is wrong.
        """
        ready = 0
        for _, _, scalars in self._queue:
            # One of them tells of all: they are of one program.
            if scalars is not None and not next(iter(scalars.values())).is_ready():
                break
            ready += 1
        self.read(keep=len(self._queue) - ready)

    def read(self, keep: int = 0) -> None:
        """Waits for the device, and hands over all but the `keep` newest entries."""
        while len(self._queue) > keep:
            step, count, scalars = self._queue.popleft()
            if scalars is None:
                self._record(step)
            else:
                rows = jax.device_get(scalars)
                self._take(step, {name: values[:count] for name, values in rows.items()})

    def _behind_last_record(self) -> int:
        """How many of the newest entries no record is due for."""
        for behind, (_, _, scalars) in enumerate(reversed(self._queue)):
            if scalars is None:
                return behind
        return len(self._queue)
