"""How far training is, on a terminal and in a log."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

import tqdm


class Progress:
    """How far training is: a bar with ETA on a terminal, elsewhere a line for every log point.

    Args:
      total_steps: of the run.
      batch_size: images a step.
      start_step: steps done before this process.
      stream: where to show it.
      clock: seconds.
    """

    def __init__(
        self,
        total_steps: int,
        batch_size: int,
        start_step: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._stream = sys.stderr if stream is None else stream
        self._total_steps, self._batch_size, self._clock = total_steps, batch_size, clock
        self._first = self._last = (start_step, clock())
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm.tqdm(
                total=total_steps,
                initial=start_step,
                file=self._stream,
                unit='step',
                dynamic_ncols=True,
            )

    def update(self, step: int) -> None:
        """Moves the bar to `step` completed steps; costs next to nothing."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def log(self, step: int, epoch: float, loss: float) -> float:
        """Shows a log point.

        Args:
          step: completed steps.
          epoch: completed epochs.
          loss: at this step; the caller has waited for it, which makes the time true.

        Returns:
          Images a second since the last log point, without what was `paused`.
        """
        now = self._clock()
        rate = (step - self._last[0]) * self._batch_size / max(now - self._last[1], 1e-9)
        seconds_a_step = (now - self._first[1]) / max(step - self._first[0], 1)
        self._last = (step, now)
        if self._bar is not None:
            self._bar.set_postfix_str(
                f'epoch {epoch:.2f}, loss {loss:.4f}, {rate:,.0f} images/s', refresh=False
            )
            self.update(step)
        else:
            left = tqdm.tqdm.format_interval((self._total_steps - step) * seconds_a_step)
            self.message(
                f'step {step}/{self._total_steps}  epoch {epoch:.2f}  loss {loss:.4f}  '
                f'{rate:,.0f} images/s  {left} left'
            )
        return rate

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """For evaluation and saving: their time counts in the ETA, but not in images a second."""
        start = self._clock()
        yield
        step, last = self._last
        self._last = (step, last + self._clock() - start)

    def message(self, text: str) -> None:
        """Prints a line without tearing the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
