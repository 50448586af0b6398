"""Processes that are killed or stopped at any moment, or whose disk is full."""

import contextlib
import itertools
import json
import random
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from command_helpers import TINY, cache_flag, run, start

from one_jax.training import checksums
from one_jax.training.checkpoint import Checkpoints

SAVE_ON_A_FULL_DISK = """
import resource, sys
import numpy as np
from one_jax.training.checkpoint import Checkpoints
from one_jax.errors import UserError

noise = {'w': np.random.default_rng(0).normal(size=100_000)}
with Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(1, noise, {})
    checkpoints.wait()
    # A file that may not grow fails as on a full disk, in the thread that writes.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    try:
        checkpoints.save(2, noise, {})
        checkpoints.wait()
    except UserError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    checkpoints.save(3, noise, {})
"""


def test_save_on_a_full_disk_keeps_earlier_checkpoints(tmp_path):
    directory = tmp_path / 'checkpoints'
    command = [sys.executable, '-c', SAVE_ON_A_FULL_DISK, str(directory)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert f'could not save checkpoint 2 in {directory} ' in output
    assert output.count('\n') == 1
    checkpoints = Checkpoints(directory, read_only=True)
    assert checkpoints.steps() == [1, 3]
    saved = np.random.default_rng(0).normal(size=100_000)
    np.testing.assert_array_equal(checkpoints.read().state['w'], saved)


SAVE_UNTIL_KILLED = """
import os, signal, sys
import numpy as np
from one_jax.training.checkpoint import Checkpoints

directory, fatal_event, fatal_count = sys.argv[1], sys.argv[2], int(sys.argv[3])

def state_of(step):
    return {f'leaf{i}': np.full((100, 10 * i + 1), 1000.0 * step + i) for i in range(20)}

def kill_at_the_fatal_event(event, arguments):
    global fatal_count
    if event == fatal_event:
        fatal_count -= 1
        if fatal_count == 0:
            os.kill(os.getpid(), signal.SIGKILL)

with Checkpoints(directory) as checkpoints:
    step = checkpoints.read().step if checkpoints.steps() else 0
    print(step, flush=True)
    sys.addaudithook(kill_at_the_fatal_event)
    while True:
        step += 1
        checkpoints.save(step, state_of(step), {'at': step})
        if step % 3 == 0:
            checkpoints.wait()
            print(step, flush=True)
"""


def test_save_killed_at_any_moment_leaves_whole_checkpoints(tmp_path):
    directory = tmp_path / 'checkpoints'
    moments = random.Random(0)
    # At a random moment; before a rename that completes a step or puts away an expired one; or
    # while that one is being deleted.
    for fatal in ['', 'os.rename', '', 'os.rmdir', 'os.rename', '']:
        arguments = [str(directory), fatal, str(moments.randint(10, 30))]
        process = subprocess.Popen(
            [sys.executable, '-c', SAVE_UNTIL_KILLED, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        lines = ''
        if not fatal:
            lines = ''.join(process.stdout.readline() for _ in range(moments.randint(2, 6)))
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=moments.uniform(0, 0.15))
            process.kill()
        rest, errors = process.communicate(timeout=60)
        assert errors == ''
        assert process.returncode == -signal.SIGKILL
        complete = int((lines + rest).split()[-1])

        reader = Checkpoints(directory, read_only=True)
        state, progress, step = reader.read()
        assert step >= complete
        assert step == reader.steps()[-1]
        assert progress == {'at': step}
        for i in range(20):
            assert (state[f'leaf{i}'] == 1000.0 * step + i).all()
        # No half checkpoint has the name of a whole one.
        for older in reader.steps():
            checksums.verify(directory / str(older))


# The beginning of the line to wait for, and seconds from there to the signal.
MOMENTS = [
    *[('', 0.4), ('', 1.0), ('', 2.0), ('1 x cpu', 0.0), ('1 x cpu', 1.0)],
    *[('memory', 0.0), ('memory', 0.3), ('step', 0.0), ('epoch 2', 0.0), ('epoch 2', 0.3)],
]


def test_main_signalled_at_any_moment_ends_with_one_line_and_resumes(tmp_path):
    """In imports, compilation, training and the last writes; SIGTERM and Ctrl-C in turn."""
    workdir, statuses = tmp_path / 'run', []
    flags = (*TINY, cache_flag(), f'--workdir={workdir}')
    numbers = itertools.cycle((signal.SIGINT, signal.SIGTERM))
    for (beginning, delay), number in zip(MOMENTS, numbers, strict=False):
        if (workdir / 'result.json').exists():
            shutil.rmtree(workdir)
        process = start('main', *flags)
        if beginning:
            lines = process.stdout if beginning in ('1 x cpu', 'memory') else process.stderr
            next(line for line in lines if line.startswith(beginning))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=delay)
        process.send_signal(number)
        output, errors = process.communicate(timeout=120)
        errors = [line for line in errors.splitlines() if not line.startswith(('step ', 'epoch '))]
        # Without a line only if the run ended before the signal came.
        assert (process.returncode, len(errors)) in [(128 + number, 1), (0, 0)], (output, errors)
        assert all(line.startswith(f'stopped by {number.name}') for line in errors)
        statuses.append(process.returncode)
        for path in workdir.rglob('*.json'):
            json.loads(path.read_text())
    assert statuses.count(0) <= 2
    run('main', *flags)
