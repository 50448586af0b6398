"""Signals: they end a command with one line, and ask a run to stop."""

import signal
import subprocess
import sys

import pytest

from one_jax.runtime.interrupt import StopRequest

SIGNALS = [signal.SIGTERM, signal.SIGINT]


@pytest.mark.parametrize('number', SIGNALS)
def test_stop_request_notes_the_first_signal_and_leaves_the_second(number):
    second, forwarded = [], []
    previous = signal.signal(number, lambda *_: second.append(number))
    try:
        with StopRequest(lambda: forwarded.append(number)) as stop:
            assert not stop
            signal.raise_signal(number)
            assert stop
            assert (stop.signal_number, second, forwarded) == (number, [], [number])
            signal.raise_signal(number)
        assert (second, forwarded) == ([number], [number])
    finally:
        signal.signal(number, previous)


def test_stop_request_restores_the_handlers():
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest():
        pass
    assert [signal.getsignal(number) for number in SIGNALS] == before


BEGINNING = """
import hashlib, os, signal
from one_jax.runtime import interrupt

signal.alarm(120)  # Ends what a failed test leaves.

def compute():  # As long as a compilation, in C, without a look at signals.
    print('ready', flush=True)
    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)

def swallow():  # As the garbage collector does what its callbacks raise.
    print('ready', flush=True)
    while True:
        try:
            while True:
                pass
        except BaseException:
            pass

interrupt.listen()
"""


def start(script, *shell):
    """Starts a script after `BEGINNING`, through a shell or not, and waits until it prints."""
    command = [*shell, sys.executable, '-c', BEGINNING + script]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline()
    return process


@pytest.mark.parametrize('number', SIGNALS)
@pytest.mark.parametrize('busy', ['compute()', 'swallow()'])
def test_signal_to_a_busy_command_ends_it_with_one_line(number, busy):
    process = start(busy)
    process.send_signal(number)
    assert process.communicate(timeout=60) == ('', f'stopped by {number.name}\n')
    assert process.returncode == 128 + number


STOPS = """
with interrupt.StopRequest(lambda: print('noted', flush=True)) as stop:
    compute()
"""


@pytest.mark.parametrize('number', SIGNALS)
def test_second_signal_to_a_stopping_run_ends_it_with_one_line(number):
    process = start(STOPS)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == 'noted\n'
    process.send_signal(number)
    assert process.communicate(timeout=60) == ('', f'stopped by {number.name}\n')
    assert process.returncode == 128 + number


AFTER = """
with interrupt.StopRequest():
    pass
compute()
"""


def test_signal_after_the_stop_request_ends_the_command():
    process = start(AFTER)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ('', 'stopped by SIGINT\n')


LATE = """
class Late:
    def __del__(self, kill=os.kill, own=os.getpid(), number=signal.SIGTERM):
        kill(own, number)

interrupt.late = Late()
interrupt.late.itself = interrupt.late
print('done', flush=True)
"""


def test_signal_while_python_ends_does_not_change_the_exit_status():
    process = start(LATE)
    assert process.communicate(timeout=60) == ('', '')
    assert process.returncode == 0


def test_signal_that_the_shell_ignores_stays_ignored():
    """As of background jobs of a script, and with nohup."""
    process = start('compute()', 'sh', '-c', 'trap "" INT; exec "$@"', 'sh')
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60) == ('', 'stopped by SIGTERM\n')


NOT_LISTENING = """
import signal
before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
import one_jax.runtime.cli, one_jax.runtime.interrupt
assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
"""


def test_import_of_the_package_leaves_signals_alone():
    subprocess.run([sys.executable, '-c', NOT_LISTENING], check=True)
