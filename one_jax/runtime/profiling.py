"""A trace of some steps by `jax.profiler`: docs/performance.md explains how to read it."""

from pathlib import Path
from typing import Any, Self

import jax

FOLDER = 'profile'
# Calls before the trace: it is not to show compilation and first allocations.
FIRST_CALLS = 3


class Profiler:
    """Traces whole calls of the train step; a context manager.

    Args:
      directory: the workdir; the trace goes to its folder `profile`.
      num_steps: steps to trace, at least; 0 traces nothing.
      step: completed steps.
    """

    def __init__(self, directory: Path, num_steps: int, step: int):
        self._folder, self._num_steps, self._step = directory / FOLDER, num_steps, step
        self._calls, self._traces = 0, False
        self._state: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def advance(self, step: int, state: Any) -> None:
        """To be called after every call of the train step."""
        if not self._num_steps:
            return
        self._calls += 1
        self._state, self._step = state, step
        if self._calls == FIRST_CALLS:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._traces, self._until = True, step + self._num_steps
        elif self._traces and step >= self._until:
            self._stop()

    def _stop(self) -> None:
        if self._traces:
            jax.block_until_ready(self._state)
            jax.profiler.stop_trace()
            print(f'trace of the steps to {self._step} in {self._folder}: see docs/performance.md')
            self._traces, self._num_steps, self._state = False, 0, None
