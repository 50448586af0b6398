"""The workdir of a running command: whose it is, and what becomes of a run when it fails."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
from commands import (
    REPOSITORY,
    assert_same_run,
    environment,
    final_state,
    run,
    snapshot,
    start,
)

from one_jax import config as config_lib
from one_jax import lock, workdir
from one_jax.errors import UserError

# With a constant rate the compiled step is the same for any number of steps.
RECIPE = (
    '--config=configs/image_folder.py:smoke,plain',
    '--config.data.image_size=8',
    '--config.data.generated_examples=64',
    '--config.data.batch_size=8',
    '--config.optimizer.schedule=constant',
    '--config.optimizer.warmup_epochs=0',
    '--config.train.log_every=3',
)
SHORT, ENDLESS = '--config.train.steps=16', '--config.train.steps=1000000'
QUICKLY_COMPILED = {
    'XLA_FLAGS': '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
}


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    return f'--config.train.compilation_cache_dir={tmp_path_factory.mktemp("cache")}'


@pytest.fixture(scope='module')
def finished(tmp_path_factory, cache):
    """The workdir of an uninterrupted run."""
    directory = tmp_path_factory.mktemp('runs') / 'plain'
    run('main', *RECIPE, SHORT, cache, f'--workdir={directory}', **QUICKLY_COMPILED)
    return directory


def half_of(finished, copy):
    """A copy of a run as if it had been killed after its first epoch."""
    shutil.copytree(finished, copy)
    (copy / 'result.json').unlink()
    shutil.rmtree(copy / 'checkpoints/16')
    return copy


@contextmanager
def training(directory, *flags):
    """A run that has done its first steps, and does not end by itself."""
    process = start('main', *RECIPE, ENDLESS, *flags, f'--workdir={directory}', **QUICKLY_COMPILED)
    try:
        # The first line of progress; a full pipe may hold the process up, which does no harm.
        line = ''
        while not line.startswith('step '):
            line = process.stderr.readline()
            assert line, process.communicate()
        yield process
    finally:
        process.kill()
        process.communicate()


def refused(directory, *flags):
    """The one line that a second command on the workdir prints."""
    _, errors = run('main', *RECIPE, *flags, f'--workdir={directory}', status=1)
    (line,) = errors.splitlines()
    return line


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path, cache):
    directory = tmp_path / 'run'
    with training(directory, cache) as first:
        line = refused(directory, ENDLESS, cache)
        assert line.startswith(f"error: workdir='{directory}' is in use by process {first.pid} on ")
        assert '--workdir' in line
        assert first.poll() is None
        first.kill()
        first.wait()
        assert (directory / lock.FILE_NAME).exists()
        # The very same command takes over, and saves when told to stop.
        with training(directory, cache) as second:
            second.send_signal(signal.SIGTERM)
            _, errors = second.communicate(timeout=240)
        assert second.returncode == 128 + signal.SIGTERM, errors
        assert final_state(directory)[1] > 0


def test_the_workdir_of_a_finished_run_is_free(finished):
    before = snapshot(finished)
    with lock.hold(finished):
        lock.require(finished)
        with (
            pytest.raises(UserError, match=f'in use by process {os.getpid()} on '),
            lock.hold(finished),
        ):
            raise AssertionError('held twice')
    with lock.hold(finished):
        pass
    after = snapshot(finished)
    assert {name for name in after if after[name] != before.get(name)} == {lock.FILE_NAME}


def test_what_a_start_leaves_does_not_make_a_directory_a_strange_one(tmp_path):
    """Killed before config.json was whole, the same command starts again."""
    config = config_lib.resolve(config_lib.default_config())
    (tmp_path / lock.FILE_NAME).write_text('process 1 on another\n')
    workdir.check(tmp_path, config)
    (tmp_path / '.config.json.x7_ab').write_text('{"seed"')
    workdir.check(tmp_path, config)
    (tmp_path / 'thesis.tex').write_text('precious')
    with pytest.raises(UserError, match='is not empty'):
        workdir.check(tmp_path, config)


def test_a_directory_that_takes_no_lock_file_is_refused(tmp_path):
    (tmp_path / lock.FILE_NAME).mkdir()
    with pytest.raises(UserError, match='cannot be written'), lock.hold(tmp_path):
        raise AssertionError('held')


def test_a_lock_that_is_gone_or_replaced_is_noticed(tmp_path):
    directory = tmp_path / 'run'
    with lock.hold(directory):
        (directory / lock.FILE_NAME).write_text('process 1 on another\n')
        with pytest.raises(UserError, match='removed, moved or replaced'):
            lock.require(directory)
        directory.rename(tmp_path / 'moved')
        with pytest.raises(UserError, match='removed, moved or replaced'):
            lock.require(directory)


def test_a_vanished_workdir_ends_the_run_and_does_not_come_back(tmp_path, cache):
    directory = tmp_path / 'run'
    with training(directory, cache, '--config.train.checkpoint_every_epochs=1000000') as process:
        process.send_signal(signal.SIGSTOP)
        directory.rename(tmp_path / 'moved')
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate(timeout=240)
    assert process.returncode == 1
    last = errors.splitlines()[-1]
    assert last.startswith(f"error: workdir='{directory}' was removed, moved or replaced")
    assert 'Traceback' not in errors
    assert not directory.exists()


def test_a_loss_that_explodes_ends_the_command_with_one_line(tmp_path, cache):
    """As users meet it: the learning rate is far too large."""
    directory = tmp_path / 'run'
    flags = (*RECIPE, SHORT, cache, '--config.optimizer.learning_rate=1e30')
    _, errors = run('main', *flags, f'--workdir={directory}', status=1, **QUICKLY_COMPILED)
    lines = errors.splitlines()
    assert lines[-1].startswith('error: step ')
    assert 'branch_cross_entropy of branch 0 is ' in lines[-1]
    assert 'there is no checkpoint yet' in lines[-1]
    assert 'Traceback' not in errors
    assert not (directory / 'checkpoints').exists()
    assert not (directory / 'result.json').exists()


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
def test_on_a_full_disk_the_command_says_so_and_goes_on_when_there_is_room(
    tmp_path, finished, cache
):
    """With room for the records and not for the checkpoint; with none at all; with enough."""
    copy, disk = half_of(finished, tmp_path / 'copy'), tmp_path / 'disk'
    disk.mkdir()
    command = [sys.executable, '-m', 'one_jax.main', *RECIPE, SHORT, cache]
    command.append(f'--workdir={disk}/run')
    process = subprocess.run(
        ['unshare', '-Urm', 'bash', '-c', ON_A_SMALL_DISK, 'bash', disk, copy, *command],
        cwd=REPOSITORY,
        env=environment(**QUICKLY_COMPILED),
        capture_output=True,
        text=True,
        timeout=500,
    )
    statuses = [line for line in process.stdout.splitlines() if line.startswith('status ')]
    assert statuses == ['status 1', 'status 1', 'status 0'], process.stderr
    first, second = re.findall('error: (could not save.*|workdir=.*)', process.stderr)
    assert f'could not save checkpoint 16 in {disk}/run/checkpoints (No space left' in first
    assert 'the ones before it are untouched' in first
    assert f"workdir='{disk}/run' cannot be written" in second
    assert 'No space left on device' in second
    # Both went on from the checkpoint before.
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


def test_a_torn_record_and_a_clock_set_back_change_nothing(tmp_path, finished, cache):
    """The clock goes back three years, and all files of the run are from the future."""
    copy = half_of(finished, tmp_path / 'run')
    with (copy / 'metrics.jsonl').open('ab') as file:
        file.write(b'{"step": 17, "epoch": 2.1, "spl')
    for path in copy.rglob('*'):
        os.utime(path, (4e9, 4e9))
    command = [sys.executable, '-c', WITH_THE_CLOCK_SET_BACK, *RECIPE, SHORT, cache]
    process = subprocess.run(
        [*command, f'--workdir={copy}'],
        cwd=REPOSITORY,
        env=environment(**QUICKLY_COMPILED),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert process.returncode == 0, process.stderr
    assert 'resumes after step 8' in process.stdout
    assert_same_run(copy, finished)
    assert 0 < json.loads((copy / 'result.json').read_text())['seconds'] < 1e5
