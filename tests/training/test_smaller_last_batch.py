"""Epochs that end with a smaller batch: stopping, placement and devices do not change the run."""

import jax
import numpy as np
import pytest
from training_fixtures import Setting, assert_same_run, saved_state, small_config, stopping_after

from one_jax import train
from one_jax.errors import ConfigError
from one_jax.runtime import parallel
from one_jax.runtime.interrupt import Interrupted

# Three steps an epoch, of 16, 16 and 8 of the 40 images.
FIELDS = {'data.batch_size': 16, 'data.drop_last': False, 'train.steps': 6, 'train.log_every': 2}


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp('runs') / 'run'
    train.train_and_evaluate(small_config(**FIELDS), directory)
    return directory


def test_run_stopped_around_a_smaller_batch_resumes_to_the_same_steps(finished, tmp_path):
    """Before it with the images on the host, after it with the images in device memory."""
    config, workdir = small_config(**FIELDS), tmp_path / 'run'
    for step in (2, 3):
        with stopping_after(step), pytest.raises(Interrupted):
            train.train_and_evaluate(config, workdir)
        assert saved_state(workdir)[1] == step
    config.data.placement = 'device'
    train.train_and_evaluate(config, workdir)
    assert_same_run(workdir, finished)


def test_run_with_a_smaller_batch_on_two_devices_with_several_steps_per_call_is_the_same(
    tmp_path, monkeypatch
):
    fields = {**FIELDS, 'model.dtype': 'float64', 'sync_batch_norm': True}
    with jax.enable_x64(True):
        alone, _ = Setting(1, **fields).run(range(6))
        mesh = parallel.make_mesh(jax.devices()[:2])
        monkeypatch.setattr(parallel, 'make_mesh', lambda: mesh)
        extra = {'data.placement': 'device', 'train.steps_per_call': 2}
        train.train_and_evaluate(small_config(**fields, **extra), tmp_path)
    state, _ = saved_state(tmp_path)
    for path, expected in jax.tree_util.tree_leaves_with_path(alone.params):
        name = jax.tree_util.keystr(path, simple=True, separator='.')
        np.testing.assert_allclose(
            state[f'params.{name}'], expected, rtol=1e-9, atol=1e-9, err_msg=name
        )


def test_smaller_batch_that_parts_do_not_divide_is_an_error_before_anything_is_written(tmp_path):
    config = small_config(**FIELDS, **{'train.accumulation_steps': 16})
    mesh = parallel.make_mesh(jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, 'make_mesh', lambda: mesh)
        with pytest.raises(ConfigError, match=r'data\.drop_last=False .* last batch of 8'):
            train.train_and_evaluate(config, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_smaller_batch_of_a_stream_is_an_error(tmp_path):
    fields = {'data.stream': True, 'data.root': str(tmp_path), 'data.generated_examples': 0}
    with pytest.raises(ConfigError, match=r'data\.drop_last=False .* True for a streamed'):
        train.train_and_evaluate(small_config(**FIELDS, **fields), tmp_path / 'run')
