"""SIGTERM and Ctrl-C as a request to stop after the current step."""

import signal
from collections.abc import Sequence
from types import FrameType
from typing import Self


class Interrupted(Exception):
    """A run was stopped by a signal; its state is saved.

    Attributes:
      step: completed steps.
      signal_number: the signal.
    """

    def __init__(self, step: int, signal_number: int):
        self.step, self.signal_number = step, signal_number
        super().__init__(f'{signal.Signals(signal_number).name} at step {step}')


class StopRequest:
    """A context in which signals are noted instead of ending the process; true once one arrived.

    The second signal has its usual effect, so that a stuck process can be ended.

    Args:
      signals: which signals to note.

    Attributes:
      signal_number: the signal that arrived, or None.
    """

    def __init__(self, signals: Sequence[int] = (signal.SIGTERM, signal.SIGINT)):
        self._signals = signals
        self.signal_number: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in self._signals:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def __bool__(self) -> bool:
        return self.signal_number is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
