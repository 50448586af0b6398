"""Shows the progress of training on a terminal and in a log."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

import tqdm


class ProgressBar:
    """A bar with ETA on a terminal; elsewhere a line for every log point.

    `first_step` is the number of steps completed before, and `clock` returns seconds.
    """

    def __init__(
        self,
        total_steps: int,
        batch_size: int,
        first_step: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._stream = stream = stream or sys.stderr
        self._total_steps, self._batch_size, self._clock = total_steps, batch_size, clock
        self._first = self._last = (first_step, clock())
        bar = {'total': total_steps, 'initial': first_step, 'unit': 'step', 'dynamic_ncols': True}
        self._bar = tqdm.tqdm(**bar, file=stream, disable=not stream.isatty())

    def update(self, step: int) -> None:
        """Moves the bar to `step` completed steps."""
        self._bar.update(step - self._bar.n)

    def log(self, step: int, epoch: float, loss: float) -> float:
        """Shows a log point.

        Args:
          step: completed steps; the caller has waited for them.
          epoch: completed epochs.
          loss: since the last log point.

        Returns:
          Images per second since the last log point, without pauses.
        """
        now = self._clock()
        rate = (step - self._last[0]) * self._batch_size / max(now - self._last[1], 1e-9)
        seconds_per_step = (now - self._first[1]) / max(step - self._first[0], 1)
        self._last = (step, now)
        if self._bar.disable:
            left = tqdm.tqdm.format_interval((self._total_steps - step) * seconds_per_step)
            self.message(
                f'step {step}/{self._total_steps}  epoch {epoch:.2f}  loss {loss:.4f}  '
                f'{rate:,.0f} images/s  {left} left'
            )
        else:
            text = f'epoch {epoch:.2f}, loss {loss:.4f}, {rate:,.0f} images/s'
            self._bar.set_postfix_str(text, refresh=False)
            self.update(step)
        return rate

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """For evaluating and saving, whose time counts in the ETA but not in images per second."""
        start = self._clock()
        yield
        step, last = self._last
        self._last = (step, last + self._clock() - start)

    def message(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        tqdm.tqdm.write(text, file=self._stream)
        self._stream.flush()

    def close(self) -> None:
        self._bar.close()
