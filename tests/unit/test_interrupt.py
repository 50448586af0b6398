"""Signals that ask a run to stop."""

import signal

import pytest

from one_jax.runtime.interrupt import StopRequest


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_stop_request_notes_the_first_signal_and_leaves_the_second(number):
    second = []
    previous = signal.signal(number, lambda *_: second.append(number))
    try:
        with StopRequest() as stop:
            assert not stop
            signal.raise_signal(number)
            assert stop
            assert stop.signal_number == number
            assert second == []
            signal.raise_signal(number)
        assert second == [number]
    finally:
        signal.signal(number, previous)


def test_stop_request_restores_the_handlers():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopRequest():
        pass
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
