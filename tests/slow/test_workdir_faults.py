"""What becomes of a run whose workdir, disk, clock or files misbehave; in real processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
from command_helpers import REPOSITORY, TIMEOUT, TINY, cache_flag, environment, run, start
from training_fixtures import assert_same_run, cut_back, saved_state

from one_jax.training import workdir

ENDLESS = '--config.train.steps=1000000'
PLAIN = ('--config=configs/image_folder.py:smoke,plain', *TINY[1:])


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """The workdir of an uninterrupted run."""
    directory = tmp_path_factory.mktemp('runs') / 'plain'
    run('main', *PLAIN, cache_flag(), f'--workdir={directory}')
    return directory


@contextmanager
def training(directory, *flags):
    """A run that has made its first steps and does not end by itself."""
    process = start('main', *PLAIN, ENDLESS, cache_flag(), *flags, f'--workdir={directory}')
    try:
        # The first line of progress; later a full pipe may block the process.
        line = ''
        while not line.startswith('step '):
            line = process.stderr.readline()
            assert line, process.communicate()
        yield process
    finally:
        process.kill()
        process.communicate()


def test_workdir_of_a_running_process_is_an_error_until_it_is_dead(tmp_path):
    directory = tmp_path / 'run'
    with training(directory) as first:
        flags = (*PLAIN, ENDLESS, cache_flag(), f'--workdir={directory}')
        _, errors = run('main', *flags, status=1)
        (line,) = errors.splitlines()
        assert line.startswith(f"error: workdir='{directory}' is in use by process {first.pid} on ")
        assert '--workdir' in line
        assert first.poll() is None
        first.kill()
        first.wait()
        assert (directory / workdir.LOCK).exists()
        # The very same command takes over, and saves when it is told to stop.
        with training(directory) as second:
            second.send_signal(signal.SIGTERM)
            _, errors = second.communicate(timeout=TIMEOUT)
        assert second.returncode == 128 + signal.SIGTERM, errors
        assert saved_state(directory)[1] > 0


def test_workdir_that_vanishes_ends_the_run_and_does_not_come_back(tmp_path):
    directory = tmp_path / 'run'
    with training(directory, '--config.train.checkpoint_every_epochs=1000000') as process:
        process.send_signal(signal.SIGSTOP)
        directory.rename(tmp_path / 'moved')
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1
    last = errors.splitlines()[-1]
    assert last.startswith(f"error: workdir='{directory}' was removed, moved or replaced")
    assert 'Traceback' not in errors
    assert not directory.exists()


ON_A_SMALL_DISK = """
set -e
disk=$1 copy=$2; shift 2
mount -t tmpfs -o size=16m tmpfs $disk
cp -r $copy $disk/run
fill() {  # leaves so many kilobytes
    room=$(df -k --output=avail $disk | tail -1)
    dd if=/dev/zero of=$disk/fill$1 bs=1k status=none count=$((room - $1))
}
set +e
fill 200; "$@"; echo "status $?"
ls $disk/run/checkpoints >&2
fill 0; "$@"; echo "status $?"
rm $disk/fill*; "$@"; echo "status $?"
rm -r $copy; cp -r $disk/run $copy
"""


def can_mount():
    command = ['unshare', '-Urm', 'mount', '-t', 'tmpfs', 'tmpfs', '/mnt']
    return shutil.which('unshare') and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason='no small file system can be mounted here')
def test_run_on_a_full_disk_ends_with_one_line_and_resumes_when_there_is_room(tmp_path, finished):
    """First with room for the records and not for a checkpoint, then with none."""
    copy, disk = cut_back(finished, 8, tmp_path / 'copy'), tmp_path / 'disk'
    disk.mkdir()
    command = [sys.executable, '-m', 'one_jax.main', *PLAIN, cache_flag()]
    command.append(f'--workdir={disk}/run')
    process = subprocess.run(
        ['unshare', '-Urm', 'bash', '-c', ON_A_SMALL_DISK, 'bash', disk, copy, *command],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    statuses = [line for line in process.stdout.splitlines() if line.startswith('status ')]
    assert statuses == ['status 1', 'status 1', 'status 0'], process.stderr
    first, second = re.findall('error: (could not save.*|workdir=.*)', process.stderr)
    assert f'could not save checkpoint 16 in {disk}/run/checkpoints (No space left' in first
    assert 'earlier checkpoints are untouched' in first
    assert f"workdir='{disk}/run' cannot be written" in second
    assert 'No space left on device' in second
    assert process.stdout.count('resumes after step 8 of 16') >= 2
    assert_same_run(copy, finished)


WITH_THE_CLOCK_SET_BACK = """
import runpy, sys, time

now, now_ns = time.time, time.time_ns
time.time = lambda: now() - 1e8
time.time_ns = lambda: now_ns() - 10**17
sys.argv = ['main', *sys.argv[1:]]
runpy.run_module('one_jax.main', run_name='__main__')
"""


def test_run_with_a_torn_record_and_a_clock_set_back_resumes_to_the_same_end(tmp_path, finished):
    """The clock goes back three years, and all files of the run come from the future."""
    copy = cut_back(finished, 8, tmp_path / 'run')
    with (copy / 'metrics.jsonl').open('ab') as file:
        file.write(b'{"step": 17, "epoch": 2.1, "spl')
    for path in copy.rglob('*'):
        os.utime(path, (4e9, 4e9))
    command = [sys.executable, '-c', WITH_THE_CLOCK_SET_BACK, *PLAIN, cache_flag()]
    process = subprocess.run(
        [*command, f'--workdir={copy}'],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert process.returncode == 0, process.stderr
    assert 'resumes after step 8' in process.stdout
    assert_same_run(copy, finished)
    assert 0 < json.loads((copy / 'result.json').read_text())['seconds'] < 1e5
