"""Checkpoints: bit-exact, safe against donation, kills and damaged files, newest and best kept."""

import asyncio
import logging
import math
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from one_jax.checkpoint import Checkpoints
from one_jax.errors import ConfigError, UserError

PROGRESS = {'loss': 0.1, 'tiny': 5e-324, 'history': [1 / 3, 2, None], 'note': 'größer', 'ok': True}


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: optax.OptState
    rng: jax.Array


def make_state() -> State:
    params = {
        'stem': {'kernel': jax.random.normal(jax.random.PRNGKey(1), (3, 3, 4, 8))},
        'norm': {'scale': jnp.asarray([-0.0, jnp.inf, jnp.nan, 1e-45], jnp.float32)},
        'half': jnp.asarray([1 / 3, 3e38, -1e-40], jnp.bfloat16),
    }
    optimizer = optax.chain(
        optax.clip(1.0), optax.sgd(optax.constant_schedule(0.1), momentum=0.9, nesterov=True)
    )
    return State(
        jnp.asarray(7, jnp.int32), params, optimizer.init(params), jax.random.PRNGKey(2**32 - 1)
    )


def small(value: float) -> dict:
    return {'w': jnp.full((40, 50), float(value)), 'n': jnp.asarray(value, jnp.int32)}


def assert_same(restored, expected):
    """Same classes all the way down, and the same bits."""
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    for found, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        assert isinstance(found, jax.Array) == isinstance(wanted, jax.Array)
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        assert np.asarray(found).tobytes() == np.asarray(wanted).tobytes()


def listing(folder: Path) -> dict:
    return {path: path.stat().st_mtime_ns for path in folder.rglob('*')}


def over_four_devices(*spec: str) -> NamedSharding:
    mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec(*spec))


def test_state_and_progress_come_back_bit_for_bit(tmp_path):
    state = make_state()
    with Checkpoints(tmp_path / 'checkpoints') as checkpoints:
        assert checkpoints.save(7, state, PROGRESS)
    with Checkpoints(tmp_path / 'checkpoints') as checkpoints:
        for restored in (checkpoints.restore_latest(state), checkpoints.restore(7, state)):
            assert_same(restored.state, state)
            assert restored.progress == PROGRESS
            assert restored.step == 7
        assert type(restored.state.opt_state[0]) is type(state.opt_state[0])


def test_numpy_leaves_of_every_width_come_back(tmp_path):
    state = {
        'int64': np.int64(2**62 + 1),
        'float64': np.asarray([math.pi, 5e-324]),
        'bool': np.asarray([True, False]),
        'uint8': np.arange(6, dtype=np.uint8).reshape(2, 3).T,
    }
    with Checkpoints(tmp_path / 'checkpoints') as checkpoints:
        checkpoints.save(0, state, {})
        assert_same(checkpoints.restore_latest(state).state, state)


def test_float64_arrays_on_the_device_come_back(tmp_path):
    with jax.enable_x64(True), Checkpoints(tmp_path / 'checkpoints') as checkpoints:
        state = {'w': jnp.asarray([math.pi, 1e-300]), 'n': jnp.asarray(2**40)}
        assert state['w'].dtype == jnp.float64
        checkpoints.save(0, state, {})
        assert_same(checkpoints.restore_latest(state).state, state)


def test_restored_where_the_template_is(tmp_path):
    state = {name: jnp.arange(24.0).reshape(8, 3) for name in 'abcde'}
    replicated, split = over_four_devices(), over_four_devices('data')
    like = jax.ShapeDtypeStruct((8, 3), jnp.float32)
    template = {
        'a': like.update(sharding=replicated),
        'b': like.update(sharding=split),
        'c': like,
        'd': jnp.zeros((8, 3)),
        'e': jax.device_put(jnp.zeros((8, 3)), jax.devices()[2]),
    }
    with Checkpoints(tmp_path / 'checkpoints') as checkpoints:
        checkpoints.save(1, state, {})
        restored = checkpoints.restore_latest(template).state
        assert restored['a'].sharding == replicated
        assert restored['b'].sharding == split
        assert isinstance(restored['c'], np.ndarray)
        # Not tied to a device: it may enter a computation over all four.
        assert not restored['d'].committed
        assert restored['e'].sharding == SingleDeviceSharding(jax.devices()[2])
        for leaf in restored.values():
            np.testing.assert_array_equal(leaf, np.arange(24.0).reshape(8, 3))
        # And saved from four devices, restored on one.
        checkpoints.save(2, {'a': restored['a'], 'b': restored['b']}, {})
        again = checkpoints.restore_latest({'a': template['d'], 'b': template['e']}).state
        np.testing.assert_array_equal(again['a'], np.arange(24.0).reshape(8, 3))
        np.testing.assert_array_equal(again['b'], np.arange(24.0).reshape(8, 3))


def test_restored_copies_on_several_devices_do_not_share_memory(tmp_path):
    template = {'w': jax.device_put(jnp.zeros((512, 64)), over_four_devices())}
    with Checkpoints(tmp_path / 'checkpoints') as checkpoints:
        checkpoints.save(1, {'w': jnp.ones((512, 64))}, {})
        state = checkpoints.restore_latest(template).state
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 2, tree), donate_argnums=0)
    for _ in range(3):
        state = step(state)
    for shard in state['w'].addressable_shards:
        np.testing.assert_array_equal(shard.data, np.full((512, 64), 8.0))


@pytest.mark.parametrize('placed', ['one device', 'replicated', 'split'])
def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path, placed):
    sharding = {
        'one device': SingleDeviceSharding(jax.devices()[0]),
        'replicated': over_four_devices(),
        'split': over_four_devices('data'),
    }[placed]
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    # 1001 rows cannot be split over the replicas, 1000 can: Orbax copies the second, not the first.
    rows = [1000] if placed == 'split' else [1000, 1001]
    state = {f'{n}_{i}': jnp.zeros((n, 503)) for n in rows for i in range(6)}
    state = step(jax.device_put(state, sharding))
    with Checkpoints(tmp_path / 'checkpoints', keep_latest=9) as checkpoints:
        for saved in range(1, 4):
            host, progress = np.full(1000, float(saved)), {'losses': [1.0]}
            checkpoints.save(saved, {'device': state, 'host': host}, progress)
            progress['losses'][0] = -1.0
            host[:] = -1
            for _ in range(10):
                state = step(state)
            jax.block_until_ready(state)
        for saved in range(1, 4):
            restored = checkpoints.read(saved)
            assert restored.progress == {'losses': [1.0]}
            assert set(restored.state['host']) == {float(saved)}
            for leaf in restored.state['device'].values():
                assert (leaf == 10 * (saved - 1) + 1).all()


@pytest.mark.parametrize('damage', ['half', 'flip', 'zeros', 'delete'])
def test_any_damaged_file_is_noticed(tmp_path, caplog, damage):
    intact = tmp_path / 'intact'
    older, newer = make_state(), jax.tree.map(lambda leaf: leaf + 1, make_state())
    with Checkpoints(intact) as checkpoints:
        checkpoints.save(5, older, {'at': 5}, {'deployed_top1': 50.0})
        checkpoints.save(8, newer, {'at': 8}, {'deployed_top1': 80.0})
    files = [path.relative_to(intact) for path in (intact / '8').rglob('*') if path.is_file()]
    assert len(files) > 10
    for number, file in enumerate(files):
        directory = tmp_path / f'{number}' / 'checkpoints'
        shutil.copytree(intact, directory)
        content = (directory / file).read_bytes()
        middle = len(content) // 2
        if damage == 'delete':
            (directory / file).unlink()
        elif damage == 'half':
            (directory / file).write_bytes(content[:middle])
        elif damage == 'zeros':
            (directory / file).write_bytes(bytes(len(content)))
        else:
            flipped = bytes([content[middle] ^ 4])
            (directory / file).write_bytes(content[:middle] + flipped + content[middle + 1 :])
        caplog.clear()
        with Checkpoints(directory) as checkpoints:
            restored = checkpoints.restore_latest(newer)
            # Orbax's own notes on the step as a whole; nothing that is restored comes from them.
            if file.name in ('_CHECKPOINT_METADATA', 'commit_success.txt') and len(file.parts) == 2:
                assert restored.step == 8
            else:
                assert restored.step == 5
                (warning,) = caplog.messages
                assert str(directory / '8') in warning
                assert '\n' not in warning
                assert checkpoints.steps() == [5]
                assert (directory.parent / 'damaged_checkpoints' / '8').is_dir()
            assert_same(restored.state, newer if restored.step == 8 else older)
            assert restored.progress == {'at': restored.step}
        shutil.rmtree(directory.parent)


def spoil(step_directory: Path):
    (step_directory / 'metrics' / 'metrics').write_text('{"deployed_top1": 99.')


def test_a_step_damaged_twice_is_set_aside_twice(tmp_path):
    directory = tmp_path / 'checkpoints'
    for kept in (['8'], ['8', '8-2'], ['8', '8-2', '8-3']):
        with Checkpoints(directory) as checkpoints:
            checkpoints.save(5, small(5), {})
            checkpoints.save(8, small(8), {})
            checkpoints.wait()
            spoil(directory / '8')
            assert checkpoints.restore_latest(small(0)).step == 5
        assert sorted(path.name for path in (tmp_path / 'damaged_checkpoints').iterdir()) == kept


def test_a_damaged_older_checkpoint_does_not_stop_the_run(tmp_path, caplog):
    directory = tmp_path / 'checkpoints'
    with Checkpoints(directory) as checkpoints:
        for step, accuracy in ((1, 90.0), (2, 10.0), (3, 20.0)):
            checkpoints.save(step, small(step), {}, {'deployed_top1': accuracy})
    spoil(directory / '1')
    with Checkpoints(directory) as checkpoints:
        assert checkpoints.restore_latest(small(0)).step == 3
        assert checkpoints.best_step() == 3
        checkpoints.save(4, small(4), {}, {'deployed_top1': 15.0})
        checkpoints.save(5, small(5), {}, {'deployed_top1': 15.0})
        checkpoints.wait()
        assert checkpoints.steps() == [3, 4, 5]
    assert (tmp_path / 'damaged_checkpoints' / '1').is_dir()
    assert all(str(directory / '1') in message for message in caplog.messages)


def test_when_all_are_damaged_nothing_is_touched(tmp_path):
    directory = tmp_path / 'checkpoints'
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(5, small(5), {})
        checkpoints.save(8, small(8), {})
    shutil.rmtree(directory / '5' / 'state')
    spoil(directory / '8')
    before = listing(tmp_path)
    # The second attempt must not take the folder for that of a new run.
    for _ in range(2):
        with (
            Checkpoints(directory) as checkpoints,
            pytest.raises(UserError, match=r'all 2 checkpoints in .* are damaged'),
        ):
            checkpoints.restore_latest(small(0))
    with pytest.raises(UserError, match=r'checkpoint 8 in .* is damaged: .*metrics/metrics'):
        Checkpoints(directory).restore(8, small(0))
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ('template', 'named'),
    [
        (
            {'w': jnp.zeros((40, 51)), 'n': np.int32(0)},
            r'w is float32\[40, 50\] there and float32\[40, 51\]',
        ),
        (
            {'w': jnp.zeros((40, 50)), 'n': np.float32(0)},
            r'n is int32\[\] there and float32\[\] here',
        ),
        ({'w': jnp.zeros((40, 50))}, r'n is int32\[\] there and absent here'),
        ({**small(0), 'm': [{'b': jnp.ones(2)}]}, r'm/0/b is absent there and float32\[2\] here'),
        ({str(i): jnp.ones(2) for i in range(9)}, 'and 8 more'),
    ],
)
def test_another_structure_is_refused_and_named(tmp_path, template, named):
    directory = tmp_path / 'checkpoints'
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(5, small(5), {})
        checkpoints.save(8, small(8), {})
        checkpoints.wait()
        before = listing(tmp_path)
        with pytest.raises(UserError, match=named) as error:
            checkpoints.restore_latest(template)
        assert '\n' not in str(error.value)
        assert listing(tmp_path) == before


def test_the_newest_and_the_best_are_kept_also_after_a_restart(tmp_path):
    directory = tmp_path / 'checkpoints'
    accuracies = [10.0, 30.0, math.nan, 30.0, 20.0, None, 25.0]
    kept = [[1], [1, 2], [2, 3], [3, 4], [4, 5], [4, 5, 6], [4, 6, 7]]
    best = [1, 2, 2, 4, 4, 4, 4]
    for step, accuracy in enumerate(accuracies, start=1):
        metrics = None if accuracy is None else {'deployed_top1': accuracy, 'nll': 1.0}
        # A new object every time, as after a restart of the process.
        with Checkpoints(directory, keep_latest=2) as checkpoints:
            checkpoints.save(step, small(step), {}, metrics)
        reader = Checkpoints(directory, read_only=True)
        assert reader.steps() == kept[step - 1]
        assert reader.best_step() == best[step - 1]
        assert reader.latest_step() == step
    assert sorted(path.name for path in directory.iterdir()) == ['4', '6', '7']


def test_the_same_steps_are_kept_without_a_restart(tmp_path):
    with Checkpoints(tmp_path / 'checkpoints', keep_latest=1, best_metric='score') as checkpoints:
        for step, score in enumerate([1.0, 9.0, 3.0, 4.0]):
            checkpoints.save(step, small(step), {}, {'score': score})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 3]
        assert checkpoints.best_step() == 1
        # Going on from an earlier step: Orbax alone would skip the save without a word.
        assert checkpoints.save(2, small(2), {}, {'score': 10.0})
        checkpoints.wait()
        assert 2 in checkpoints.steps()
        assert checkpoints.best_step() == 2


def test_saving_a_step_again_does_nothing(tmp_path):
    with Checkpoints(tmp_path / 'checkpoints') as checkpoints:
        assert checkpoints.save(3, small(1), {})
        assert not checkpoints.save(3, small(2), {})
        checkpoints.wait()
        assert not checkpoints.save(3, small(2), {})
        np.testing.assert_array_equal(checkpoints.read(3).state['n'], 1)


def test_nothing_is_written_before_the_first_save(tmp_path):
    with Checkpoints(tmp_path / 'run' / 'checkpoints') as checkpoints:
        assert checkpoints.restore_latest(small(0)) is None
        assert checkpoints.steps() == []
        assert checkpoints.latest_step() is None
        assert checkpoints.best_step() is None
        checkpoints.wait()
        with pytest.raises(UserError, match='no checkpoint in'):
            checkpoints.read()
        with pytest.raises(UserError, match=r'no checkpoint 4 in .*; steps there: none'):
            checkpoints.restore(4, small(0))
    assert not (tmp_path / 'run').exists()


def test_a_reader_changes_nothing(tmp_path, caplog):
    directory = tmp_path / 'checkpoints'
    with Checkpoints(directory) as checkpoints:
        for step in (5, 8):
            checkpoints.save(step, small(step), {'at': step}, {'deployed_top1': float(step)})
    spoil(directory / '8')
    (directory / '9.orbax-checkpoint-tmp' / 'state').mkdir(parents=True)
    before = listing(tmp_path)
    with Checkpoints(directory, read_only=True) as checkpoints:
        assert checkpoints.steps() == [5, 8]
        assert checkpoints.restore_latest(small(0)).step == 5
        assert checkpoints.best_step() == 5
        state, progress, step = checkpoints.read()
        assert (progress, step) == ({'at': 5}, 5)
        assert type(state['w']) is np.ndarray
        np.testing.assert_array_equal(state['w'], np.full((40, 50), 5, np.float32))
        with pytest.raises(ValueError, match='reading only'):
            checkpoints.save(10, small(1), {})
    assert listing(tmp_path) == before
    assert len(caplog.messages) == 3
    assert all(f'skipped the damaged checkpoint {directory}/8' in line for line in caplog.messages)


def test_read_names_every_array(tmp_path):
    state = make_state()
    with Checkpoints(tmp_path / 'checkpoints') as checkpoints:
        checkpoints.save(7, state, {})
        read = checkpoints.read(7).state
    assert read['params']['half'].dtype == jnp.bfloat16
    # chain(clip, sgd): the momentum is the first state of the second transformation.
    momentum = read['opt_state']['1']['0']['trace']['stem']['kernel']
    np.testing.assert_array_equal(momentum, np.zeros((3, 3, 4, 8)))
    assert len(jax.tree.leaves(read)) == len(jax.tree.leaves(state))


def test_what_a_killed_save_left_is_ignored_and_cleaned_up(tmp_path):
    directory = tmp_path / 'checkpoints'
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(5, small(5), {})
    shutil.copytree(directory / '5', directory / '9.orbax-checkpoint-tmp')
    shutil.copytree(directory / '5', directory / 'deleted' / '3')
    with Checkpoints(directory) as checkpoints:
        assert checkpoints.restore_latest(small(0)).step == 5
        checkpoints.save(9, small(9), {})
        checkpoints.wait()
        assert sorted(path.name for path in directory.iterdir()) == ['5', '9']
        np.testing.assert_array_equal(checkpoints.restore_latest(small(0)).state['n'], 9)


def test_a_save_that_cannot_write_is_reported(tmp_path):
    directory = tmp_path / 'checkpoints'
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(1, small(1), {})
        checkpoints.wait()
        directory.rename(tmp_path / 'away')
        directory.write_text('no folder')
        with pytest.raises(UserError, match='could not save checkpoint 2 in'):
            checkpoints.save(2, small(2), {})
        directory.unlink()
        (tmp_path / 'away').rename(directory)
        assert checkpoints.save(2, small(2), {})
        np.testing.assert_array_equal(checkpoints.read().state['n'], 2)


@pytest.mark.parametrize('leaf', [jnp.zeros((0, 3)), jax.random.key(0)], ids=['empty', 'key'])
def test_what_orbax_cannot_keep_is_refused(tmp_path, leaf):
    with Checkpoints(tmp_path / 'checkpoints') as checkpoints:
        with pytest.raises(ValueError, match=r'a/b of shape .* cannot be saved'):
            checkpoints.save(1, {'a': {'b': leaf}}, {})
        assert checkpoints.save(1, small(1), {})
    with pytest.raises(ConfigError, match='keep_latest=0 is not allowed: at least 1'):
        Checkpoints(tmp_path, keep_latest=0)


def test_in_a_notebook_where_an_event_loop_runs(tmp_path, caplog):
    async def save_and_restore():
        with Checkpoints(tmp_path / 'checkpoints') as checkpoints:
            checkpoints.save(1, small(1), {}, {'deployed_top1': 1.0})
            return checkpoints.restore_latest(small(0))

    with caplog.at_level(logging.WARNING):
        assert_same(asyncio.run(save_and_restore()).state, small(1))
    # Nothing to say in an ordinary run, neither by us nor by Orbax.
    assert caplog.messages == []


SAVE_ON_A_FULL_DISK = """
import resource, sys
import numpy as np
from one_jax.checkpoint import Checkpoints
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


def test_a_full_disk_leaves_the_checkpoints_before(tmp_path):
    directory = tmp_path / 'checkpoints'
    command = [sys.executable, '-c', SAVE_ON_A_FULL_DISK, str(directory)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert f'could not save checkpoint 2 in {directory} ' in output
    assert output.count('\n') == 1
    checkpoints = Checkpoints(directory, read_only=True)
    assert checkpoints.steps() == [1, 3]
    np.testing.assert_array_equal(checkpoints.read(1).state['w'], checkpoints.read(3).state['w'])


SAVE_UNTIL_KILLED = """
import os, signal, sys
import numpy as np
from one_jax.checkpoint import Checkpoints

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
    restored = checkpoints.restore_latest(state_of(0))
    step = restored.step if restored else 0
    print(step, flush=True)
    sys.addaudithook(kill_at_the_fatal_event)
    while True:
        step += 1
        checkpoints.save(step, state_of(step), {'at': step}, {'deployed_top1': float(-step % 7)})
        if step % 3 == 0:
            checkpoints.wait()
            print(step, flush=True)
"""


def test_killed_at_any_moment(tmp_path):
    directory = tmp_path / 'checkpoints'
    moments = random.Random(0)
    # At a random moment; or before one of the renames that complete a step and put away an expired
    # one; or in the middle of deleting that.
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
        template = {f'leaf{i}': np.zeros((100, 10 * i + 1)) for i in range(20)}
        state, progress, step = reader.restore_latest(template)
        assert step >= complete
        assert step == reader.latest_step()
        assert progress == {'at': step}
        for i in range(20):
            assert (state[f'leaf{i}'] == 1000.0 * step + i).all()
        # A kill never leaves half of one, neither while it is written nor while it is deleted.
        for older in reader.steps():
            np.testing.assert_array_equal(reader.read(older).state['leaf0'], 1000.0 * older)
