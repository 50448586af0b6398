"""What a run shows of its progress."""

import io

from one_jax.training import progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def make_bar(stream):
    """Returns a progress bar and its clock, which the test sets."""
    now = [0.0]
    return progress_bar.ProgressBar(
        100, 32, first_step=20, stream=stream, clock=lambda: now[0]
    ), now


def test_progress_in_a_log_is_a_line_per_record():
    stream = io.StringIO()
    bar, now = make_bar(stream)
    now[0] = 10.0
    bar.update(40)
    assert stream.getvalue() == ''
    assert bar.log(40, 2.0, 0.5) == 64.0
    with bar.paused():
        now[0] = 30.0
    now[0] = 40.0
    # 20 steps in 10 s without the pause; with it one step per second, so 40 s for 40 steps.
    assert bar.log(60, 3.0, 0.25) == 64.0
    bar.message('test top-1 97.1 %')
    bar.close()
    first, second, third = stream.getvalue().splitlines()
    assert first == 'step 40/100  epoch 2.00  loss 0.5000  64 images/s  00:30 left'
    assert second == 'step 60/100  epoch 3.00  loss 0.2500  64 images/s  00:40 left'
    assert third == 'test top-1 97.1 %'


def test_progress_on_a_terminal_is_a_bar():
    stream = Terminal()
    bar, now = make_bar(stream)
    now[0] = 10.0
    assert bar.log(40, 2.0, 0.5) == 64.0
    bar.message('a message')
    bar.update(100)
    bar.close()
    shown = stream.getvalue()
    assert '40/100' in shown
    assert 'loss 0.5000, 64 images/s' in shown
    assert 'a message\n' in shown
    assert '100%' in shown.splitlines()[-1]
