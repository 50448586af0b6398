"""Checkpoints: bit-exact, safe against donation and damaged files."""

import asyncio
import logging
import math
import shutil
from pathlib import Path
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from one_jax.errors import UserError
from one_jax.training.checkpoint import Checkpoints

PROGRESS = {'loss': 0.1, 'tiny': 5e-324, 'history': [1 / 3, 2, None], 'note': 'größer', 'ok': True}


class Disk(NamedTuple):
    total: int
    free: int


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


def test_checkpoint_state_and_progress_round_trip_bit_for_bit(tmp_path):
    state = make_state()
    with Checkpoints(tmp_path / 'checkpoints') as checkpoints:
        checkpoints.save(7, state, PROGRESS)
    with Checkpoints(tmp_path / 'checkpoints') as checkpoints:
        restored = checkpoints.restore_latest(state)
    assert_same(restored.state, state)
    assert type(restored.state.opt_state[0]) is type(state.opt_state[0])
    assert (restored.progress, restored.step) == (PROGRESS, 7)


def test_checkpoint_leaves_of_every_dtype_round_trip(tmp_path):
    with jax.enable_x64(True), Checkpoints(tmp_path / 'checkpoints') as checkpoints:
        state = {
            'int64': np.int64(2**62 + 1),
            'float64': np.asarray([math.pi, 5e-324]),
            'bool': np.asarray([True, False]),
            'uint8': np.arange(6, dtype=np.uint8).reshape(2, 3).T,
            'device': {'w': jnp.asarray([math.pi, 1e-300]), 'n': jnp.asarray(2**40)},
        }
        checkpoints.save(0, state, {})
        restored = checkpoints.read().state
    assert_same(restored, jax.device_get(state))
    assert restored['device']['w'].dtype == np.float64


def test_checkpoint_restored_arrays_have_the_templates_shardings(tmp_path):
    state = {name: jnp.arange(24.0).reshape(8, 3) for name in 'abc'}
    replicated, split = over_four_devices(), over_four_devices('data')
    like = jax.ShapeDtypeStruct((8, 3), jnp.float32)
    template = {
        'a': like.update(sharding=replicated),
        'b': like.update(sharding=split),
        'c': jax.device_put(jnp.zeros((8, 3)), jax.devices()[2]),
    }
    with Checkpoints(tmp_path / 'checkpoints') as checkpoints:
        checkpoints.save(1, state, {})
        restored = checkpoints.restore_latest(template).state
        assert restored['a'].sharding == replicated
        assert restored['b'].sharding == split
        assert restored['c'].sharding == SingleDeviceSharding(jax.devices()[2])
        for leaf in restored.values():
            np.testing.assert_array_equal(leaf, np.arange(24.0).reshape(8, 3))
        # Saved from four devices, restored on one.
        checkpoints.save(2, {'a': restored['a'], 'b': restored['b']}, {})
        again = checkpoints.restore_latest({'a': template['c'], 'b': template['c']}).state
        for leaf in again.values():
            np.testing.assert_array_equal(leaf, np.arange(24.0).reshape(8, 3))


def test_checkpoint_restored_copies_on_several_devices_do_not_share_memory(tmp_path):
    template = {'w': jax.device_put(jnp.zeros((512, 64)), over_four_devices())}
    with Checkpoints(tmp_path / 'checkpoints') as checkpoints:
        checkpoints.save(1, {'w': jnp.ones((512, 64))}, {})
        state = checkpoints.restore_latest(template).state
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 2, tree), donate_argnums=0)
    for _ in range(3):
        state = step(state)
    for shard in state['w'].addressable_shards:
        np.testing.assert_array_equal(shard.data, np.full((512, 64), 8.0))


@pytest.mark.parametrize('spec', [(), ('data',)], ids=['replicated', 'split'])
def test_checkpoint_state_donated_after_save_is_saved_unchanged(tmp_path, spec):
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    # 1001 rows cannot be split over the replicas, 1000 can: Orbax copies the second, not the first.
    rows = [1000] if spec else [1000, 1001]
    state = {f'{n}_{i}': jnp.zeros((n, 503)) for n in rows for i in range(6)}
    state = step(jax.device_put(state, over_four_devices(*spec)))
    with Checkpoints(tmp_path / 'checkpoints') as checkpoints:
        for saved in range(1, 4):
            host, progress = np.full(1000, float(saved)), {'losses': [1.0]}
            checkpoints.save(saved, {'device': state, 'host': host}, progress)
            progress['losses'][0] = -1.0
            host[:] = -1
            for _ in range(10):
                state = step(state)
            jax.block_until_ready(state)
            restored = checkpoints.read()
            assert restored.progress == {'losses': [1.0]}
            assert set(restored.state['host']) == {float(saved)}
            for leaf in restored.state['device'].values():
                assert (leaf == 10 * (saved - 1) + 1).all()


def test_checkpoint_any_damaged_file_falls_back_to_the_one_before(tmp_path, caplog):
    intact = tmp_path / 'intact'
    older, newer = make_state(), jax.tree.map(lambda leaf: leaf + 1, make_state())
    with Checkpoints(intact) as checkpoints:
        checkpoints.save(5, older, {'at': 5})
        checkpoints.save(8, newer, {'at': 8})
    # What Orbax notes about the step as a whole is not read.
    notes = ('_CHECKPOINT_METADATA', 'commit_success.txt')
    files = [path.relative_to(intact) for path in (intact / '8').rglob('*') if path.is_file()]
    files = [file for file in files if len(file.parts) > 2 or file.name not in notes]
    assert len(files) > 8
    for number, file in enumerate(files):
        directory = tmp_path / f'{number}' / 'checkpoints'
        shutil.copytree(intact, directory)
        content = (directory / file).read_bytes()
        middle = len(content) // 2
        flipped = bytes([content[middle] ^ 4])
        (directory / file).write_bytes(content[:middle] + flipped + content[middle + 1 :])
        caplog.clear()
        with Checkpoints(directory) as checkpoints:
            restored = checkpoints.restore_latest(newer)
            assert (restored.step, restored.progress) == (5, {'at': 5})
            assert_same(restored.state, older)
            assert checkpoints.steps() == [5]
        (warning,) = caplog.messages
        assert str(directory / '8') in warning
        assert '\n' not in warning
        assert (directory.parent / 'damaged_checkpoints' / '8').is_dir()


def spoil(step_directory: Path):
    (step_directory / 'record' / 'metadata').write_text('{"progress": {"at": 99')


def test_checkpoint_step_damaged_again_is_set_aside_again(tmp_path):
    directory = tmp_path / 'checkpoints'
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(5, small(5), {})
    for kept in (['8'], ['8', '8-2'], ['8', '8-2', '8-3']):
        with Checkpoints(directory) as checkpoints:
            checkpoints.save(8, small(8), {})
            checkpoints.wait()
            spoil(directory / '8')
            assert checkpoints.restore_latest(small(0)).step == 5
        assert sorted(path.name for path in (tmp_path / 'damaged_checkpoints').iterdir()) == kept


def test_checkpoint_when_all_are_damaged_nothing_is_touched(tmp_path):
    directory = tmp_path / 'checkpoints'
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(5, small(5), {})
        checkpoints.save(8, small(8), {})
    shutil.rmtree(directory / '5' / 'state')
    spoil(directory / '8')
    before = listing(tmp_path)
    # The second attempt must not take the folder for one of a new run.
    for _ in range(2):
        with (
            Checkpoints(directory) as checkpoints,
            pytest.raises(UserError, match=r'all 2 checkpoints .* damaged .*record/metadata'),
        ):
            checkpoints.restore_latest(small(0))
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ('template', 'named'),
    [
        (
            {'w': jnp.zeros((40, 51)), 'n': np.int32(0)},
            r'w is .*40, 50.* there and .*40, 51.* here',
        ),
        (
            {'w': jnp.zeros((40, 50)), 'n': np.float32(0)},
            r'n is .*int32.* there and .*float32.* here',
        ),
        ({'w': jnp.zeros((40, 50))}, r'n is .*int32.* there and absent here'),
        ({**small(0), 'm': [{'b': jnp.ones(2)}]}, r'm/0/b is absent there and .*float32.* here'),
        ({str(i): jnp.ones(2) for i in range(9)}, 'and 8 more'),
    ],
)
def test_checkpoint_of_another_structure_is_an_error_with_names(tmp_path, template, named):
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


def test_checkpoint_newest_are_kept_with_and_without_a_restart(tmp_path):
    directory = tmp_path / 'checkpoints'
    for step in (1, 2, 3):
        # A new object every time, as after a restart of the process.
        with Checkpoints(directory, keep_latest=2) as checkpoints:
            checkpoints.save(step, small(step), {})
    assert sorted(path.name for path in directory.iterdir()) == ['2', '3']
    with Checkpoints(directory, keep_latest=1) as checkpoints:
        for step in (4, 5):
            checkpoints.save(step, small(step), {})
        checkpoints.wait()
        assert checkpoints.steps() == [5]


def test_checkpoint_save_below_the_latest_step_is_made(tmp_path):
    """As after the newer ones were set aside; Orbax alone would skip it silently."""
    with Checkpoints(tmp_path / 'checkpoints') as checkpoints:
        checkpoints.save(3, small(3), {})
        checkpoints.save(2, small(2), {})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3]


def test_checkpoint_before_the_first_save_writes_nothing(tmp_path):
    with Checkpoints(tmp_path / 'run' / 'checkpoints') as checkpoints:
        assert checkpoints.restore_latest(small(0)) is None
        assert checkpoints.steps() == []
        checkpoints.wait()
        with pytest.raises(UserError, match='no checkpoint in'):
            checkpoints.read()
    assert not (tmp_path / 'run').exists()


def test_checkpoint_reader_changes_nothing(tmp_path, caplog):
    directory = tmp_path / 'checkpoints'
    with Checkpoints(directory) as checkpoints:
        for step in (5, 8):
            checkpoints.save(step, small(step), {'at': step})
    spoil(directory / '8')
    (directory / '9.orbax-checkpoint-tmp' / 'state').mkdir(parents=True)
    before = listing(tmp_path)
    with Checkpoints(directory, read_only=True) as checkpoints:
        assert checkpoints.steps() == [5, 8]
        state, progress, step = checkpoints.read()
    assert (progress, step) == ({'at': 5}, 5)
    assert type(state['w']) is np.ndarray
    np.testing.assert_array_equal(state['w'], np.full((40, 50), 5, np.float32))
    assert listing(tmp_path) == before
    assert caplog.messages[0].startswith(f'skipped the damaged checkpoint {directory}/8')


def test_checkpoint_read_without_a_template_names_every_array(tmp_path):
    state = make_state()
    with Checkpoints(tmp_path / 'checkpoints') as checkpoints:
        checkpoints.save(7, state, {})
        read = checkpoints.read().state
    assert read['params']['half'].dtype == jnp.bfloat16
    # chain(clip, sgd): the momentum is the first state of the second transformation.
    momentum = read['opt_state']['1']['0']['trace']['stem']['kernel']
    np.testing.assert_array_equal(momentum, np.zeros((3, 3, 4, 8)))
    assert len(jax.tree.leaves(read)) == len(jax.tree.leaves(state))


def test_checkpoint_remains_of_a_killed_save_are_ignored_and_removed(tmp_path):
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


def test_checkpoint_save_that_fails_is_followed_by_one_that_succeeds(tmp_path):
    directory = tmp_path / 'checkpoints'
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(1, small(1), {})
        checkpoints.wait()
        directory.rename(tmp_path / 'away')
        directory.write_text('no folder')
        with pytest.raises(NotADirectoryError):
            checkpoints.save(2, small(2), {})
        directory.unlink()
        (tmp_path / 'away').rename(directory)
        checkpoints.save(2, small(2), {})
        np.testing.assert_array_equal(checkpoints.read().state['n'], 2)


def test_checkpoint_save_without_room_is_an_error_before_writing(tmp_path, monkeypatch):
    with Checkpoints(tmp_path / 'checkpoints') as checkpoints:
        monkeypatch.setattr(shutil, 'disk_usage', lambda _: Disk(total=10**9, free=8003))
        with pytest.raises(UserError, match=r'\(No space left on device\); earlier checkpoints'):
            checkpoints.save(1, small(1), {})
        monkeypatch.setattr(shutil, 'disk_usage', lambda _: Disk(total=0, free=0))
        checkpoints.save(1, small(1), {})


def test_checkpoint_inside_a_running_event_loop_works_silently(tmp_path, caplog):
    async def save_and_restore():
        with Checkpoints(tmp_path / 'checkpoints') as checkpoints:
            checkpoints.save(1, small(1), {})
            return checkpoints.restore_latest(small(0))

    with caplog.at_level(logging.WARNING):
        assert_same(asyncio.run(save_and_restore()).state, small(1))
    assert caplog.messages == []


def test_checkpoint_copied_under_another_step_is_an_error(tmp_path):
    directory = tmp_path / 'checkpoints'
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(5, small(5), {})
    shutil.copytree(directory / '5', directory / '9')
    with (
        Checkpoints(directory) as checkpoints,
        pytest.raises(UserError, match=r"/9' is a copy of checkpoint 5: move it away"),
    ):
        checkpoints.restore_latest(small(0))


def test_checkpoint_of_another_run_is_an_error_before_its_arrays_are_read(tmp_path):
    def check(progress):
        raise UserError(f'of run {progress["run"]}')

    with Checkpoints(tmp_path, check=check) as checkpoints:
        checkpoints.save(5, small(5), {'run': 3})
        with pytest.raises(UserError, match='of run 3'):
            checkpoints.restore_latest({'other': jnp.zeros(3)})


def test_checkpoint_that_cannot_be_read_back_is_an_error_at_the_first(tmp_path):
    """Orbax takes this path for a pattern that does not match it."""
    checkpoints = Checkpoints(tmp_path / 'lr=[0.1]')
    checkpoints.save(5, {'w': np.ones(3)}, {})
    with pytest.raises(UserError, match=r"\[0\.1\]/5' cannot be read back: .*does not exist"):
        checkpoints.close()


def test_start_removes_what_a_killed_save_left(tmp_path):
    directory = tmp_path / 'checkpoints'
    litter = (directory / 'deleted/4', directory / '8.orbax-checkpoint-tmp-123')
    kept = (directory / '4', directory / 'mine')
    for folder in (*litter, *kept):
        folder.mkdir(parents=True)
        (folder / 'file').touch()
    with Checkpoints(directory, read_only=True):
        assert all(folder.exists() for folder in litter)
    with Checkpoints(directory):
        assert set(directory.iterdir()) == set(kept)


def test_start_with_a_file_in_place_of_the_checkpoints_is_an_error(tmp_path):
    (tmp_path / 'checkpoints').touch()
    with (
        pytest.raises(UserError, match='a folder, or not there'),
        Checkpoints(tmp_path / 'checkpoints'),
    ):
        raise AssertionError('entered')
