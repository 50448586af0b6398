"""One device or four: the same steps and runs, in float64 with synchronised statistics."""

import jax
import numpy as np
import pytest
from training_fixtures import Setting, cut_back, saved_state, small_config

from one_jax import train
from one_jax.runtime import parallel, records

FIELDS = {'model.dtype': 'float64', 'sync_batch_norm': True}
# Images are cropped, and mixed with those of other devices.
EXTRAS = {
    'data.augment': 'pad_crop_flip',
    'data.padding': 2,
    'data.mixup_alpha': 0.5,
    'data.cutmix_alpha': 1.0,
    'train.label_smoothing': 0.1,
    'train.ema_decay': 0.9,
}


@pytest.fixture(scope='module', autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def assert_close(actual, expected):
    """Compares trees to 1e-10, and float32 leaves, the metrics among them, to their rounding."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        tolerance = 1e-5 if getattr(y, 'dtype', None) == np.float32 else 1e-10
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance, err_msg=name)


def test_step_on_four_devices_equals_one():
    """A gradient summed over the devices, in place of the mean, would be four times as large."""
    fields = {**FIELDS, **EXTRAS, 'method.name': 'okddip', 'model.num_branches': 3}
    alone, alone_metrics = Setting(1, **fields).run(range(3))
    shared, metrics = Setting(4, **fields).run(range(3))
    assert_close(shared.variables, alone.variables)
    assert_close(shared.averages, alone.averages)
    assert_close(metrics, alone_metrics)
    assert all(record['gradient_norm'] > 0.1 for record in metrics)
    assert {leaf.dtype for leaf in jax.tree.leaves(alone.params)} == {np.dtype(np.float64)}


def test_run_saved_on_four_devices_resumes_on_one_with_several_steps_per_call(
    tmp_path, monkeypatch
):
    """Neither records nor epochs end at multiples of a call."""
    train.train_and_evaluate(small_config(**FIELDS), tmp_path / 'four')
    workdir = cut_back(tmp_path / 'four', 5, tmp_path / 'one')
    mesh = parallel.make_mesh(jax.devices()[:1])
    monkeypatch.setattr(parallel, 'make_mesh', lambda: mesh)
    config = small_config(**FIELDS, **{'data.placement': 'device', 'train.steps_per_call': 2})
    assert train.train_and_evaluate(config, workdir)['num_devices'] == 1
    (state, step), (expected, expected_step) = map(saved_state, (workdir, tmp_path / 'four'))
    assert step == expected_step == 10
    assert_close(state, expected)
    found, expected = map(records.read_records, (workdir, tmp_path / 'four'))
    assert [record.pop('split') for record in found] == [r.pop('split') for r in expected]
    assert_close(found, expected)
