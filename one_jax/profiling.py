"""A trace of some steps by `jax.profiler`, on request: docs/performance.md says how to read it."""

from pathlib import Path
from typing import Any

import jax

FOLDER = 'profile'
# Calls before the trace: what is compiled and allocated once is no part of it.
FIRST_CALLS = 3


class Profiler:
    """Traces whole calls of the train step until `num_steps` are in the trace; 0: nothing at all.

    Args:
      directory: the workdir; the trace goes to its folder `profile`.
      num_steps: at least so many steps.
    """

    def __init__(self, directory: Path, num_steps: int):
        self._folder, self._num_steps = directory / FOLDER, num_steps
        self._calls = 0
        self._until: int | None = None

    def before(self, step: int, state: Any) -> None:
        """To be called before the call that goes on after `step`."""
        if self._num_steps and self._until is None and self._calls == FIRST_CALLS:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._until = step + self._num_steps
        self._calls += 1

    def after(self, step: int, state: Any) -> None:
        """To be called after the call that made `step`."""
        if self._until is not None and step >= self._until:
            self._stop(state)

    def close(self, state: Any) -> None:
        """Ends a trace that is still running, because training is."""
        if self._until is not None:
            self._stop(state)

    def _stop(self, state: Any) -> None:
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
        print(f'trace of the steps until {self._until} in {self._folder}: docs/performance.md')
        self._num_steps, self._until = 0, None
