"""SIGTERM and Ctrl-C: a command ends with one line; a run stops after the current step and saves.

Python calls signal handlers in the main thread, between two of its own operations: not while that
thread compiles. And what a handler raises can be swallowed, as JAX's callback of the garbage
collector does. Commands therefore handle signals in a thread, which Python's C code wakes up.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_listening = False
_request: 'StopRequest | None' = None


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
    """A context in which the first signal is noted instead of ending the process.

    The second has its usual effect, so that a stuck process can be ended.

    Args:
      forward: called, possibly in another thread, when the first signal arrives.

    Attributes:
      signal_number: the signal that arrived, or None.
    """

    def __init__(self, forward: Callable[[], None] | None = None):
        self.signal_number: int | None = None
        self._forward, self._previous = forward, {}

    def __enter__(self) -> Self:
        global _request
        _request = self
        if not _listening:  # In a notebook, say.
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        global _request
        _request = None
        self._restore()

    def __bool__(self) -> bool:
        return self.signal_number is not None

    def note(self, number: int) -> None:
        """Notes that a signal arrived."""
        self.signal_number = number
        if self._forward is not None:
            self._forward()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._restore()
        self.note(number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


def listen() -> None:
    """From now on, signals end this process with one line, unless a `StopRequest` notes them.

    For commands; call it in the main thread before the imports that take seconds.
    """
    global _listening
    for number, name in enumerate(('stdin', 'stdout', 'stderr')):
        if getattr(sys, name) is None:  # Closed: what is opened next would get its output.
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(number, 'w' if number else 'r'))
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in SIGNALS:
        # A shell's background jobs and nohup ignore some signals.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
            # Registered first, called last: in what remains, Python would reset the handlers.
            atexit.register(signal.signal, number, signal.SIG_IGN)
    threading.Thread(target=_listen, args=(reader,), daemon=True).start()
    _listening = True


def _listen(reader: int) -> None:
    while True:
        (number,) = os.read(reader, 1)
        if number in SIGNALS:
            if (request := _request) is None or request:
                _end(number)
            request.note(number)


def _end(number: int) -> None:
    # Neither exceptions nor buffers: the main thread may hold any lock. What was being written has
    # a temporary name, and the system releases locks of files.
    with contextlib.suppress(Exception):
        stderr = sys.stderr.fileno()
        new_line = '\n' if os.isatty(stderr) else ''
        os.write(stderr, f'{new_line}stopped by {signal.Signals(number).name}\n'.encode())
    os._exit(128 + number)
