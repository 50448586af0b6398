"""The optional extras: mixup, CutMix, label smoothing, moving averages."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import Setting, run_in

from one_jax import checkpoint, export, losses
from one_jax.data import augment, mixing
from one_jax.models.multibranch import student_variables


def test_soft_targets_are_a_mean_of_cross_entropies():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(3, 4, 5)).astype(np.float32)
    targets = generator.dirichlet(np.ones(5), size=4).astype(np.float32)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.einsum('bc,kbc->kb', targets, log_probabilities)
    np.testing.assert_allclose(losses.cross_entropy(logits, targets), expected, rtol=1e-5)
    labels = np.array([1, 4, 0, 2])
    hard = losses.cross_entropy(logits, labels)
    np.testing.assert_allclose(losses.cross_entropy(logits, np.eye(5)[labels]), hard, rtol=1e-5)


def test_mixup_is_a_convex_combination():
    images, partners = jnp.ones((2, 4, 4, 3)), jnp.zeros((2, 4, 4, 3))
    ratios = []
    for seed in range(50):
        mixed, ratio = mixing.mix(jax.random.key(seed), images, partners, 0.4, 0.0)
        np.testing.assert_allclose(mixed, ratio, rtol=1e-5)
        ratios.append(float(ratio))
    # Beta(0.4, 0.4) has the mean 1/2 and the standard deviation 0.373.
    assert abs(np.mean(ratios) - 0.5) < 3 * 0.373 / 50**0.5
    assert np.std(ratios) > 0.25


def test_cutmix_is_a_box_of_the_partner_and_the_ratio_is_its_area():
    images, partners = jnp.ones((1, 16, 12, 3)), jnp.zeros((1, 16, 12, 3))
    ratios = []
    for seed in range(50):
        mixed, ratio = mixing.mix(jax.random.key(seed), images, partners, 0.0, 1.0)
        assert float(ratio) == pytest.approx(float(mixed.mean()), abs=1e-6)
        rows, columns = np.nonzero(np.asarray(mixed[0, :, :, 0]) == 0)
        if len(rows):
            height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
            assert len(rows) == height * width
        ratios.append(float(ratio))
    assert min(ratios) < 0.4
    assert max(ratios) > 0.9


def test_the_box_has_the_area_that_was_drawn_when_it_fits():
    inside = [
        float(1 - mixing.draw_box(jax.random.key(seed), jnp.float32(0.75), 64, 64).mean())
        for seed in range(40)
    ]
    assert max(inside) == pytest.approx(0.25, abs=1e-6)
    assert min(inside) < 0.24


def test_both_alphas_toss_up():
    images, partners = jnp.ones((1, 16, 16, 1)), jnp.zeros((1, 16, 16, 1))
    boxes = 0
    for seed in range(40):
        mixed, _ = mixing.mix(jax.random.key(seed), images, partners, 1.0, 1.0)
        boxes += set(np.unique(mixed)) <= {0.0, 1.0}
    assert 8 < boxes < 32


EXTRAS = {
    'data.mixup_alpha': 0.5,
    'data.cutmix_alpha': 1.0,
    'train.label_smoothing': 0.1,
    'train.ema_decay': 0.9,
}


def test_with_all_extras_any_number_of_devices_gives_the_same_run():
    fields = {**EXTRAS, 'model.dtype': 'float64', 'sync_batch_norm': True}
    with jax.enable_x64(True):
        setting = Setting(**fields)
        alone, alone_metrics = setting.run(num_devices=1, num_steps=2)
        shared, shared_metrics = setting.run(num_devices=4, num_steps=2)
    chex.assert_trees_all_close(alone.params, shared.params, rtol=1e-9, atol=1e-11)
    chex.assert_trees_all_close(alone.averages, shared.averages, rtol=1e-9, atol=1e-11)
    chex.assert_trees_all_close(alone_metrics, shared_metrics, rtol=1e-5, atol=1e-6)


def test_smoothed_labels_raise_the_loss_by_what_the_formula_says():
    """The first step of the plain network: 0.9 CE(label) + 0.1 mean over classes."""
    fields = {'method.name': 'plain', 'model.num_branches': 1, 'data.augment': 'none'}
    setting = Setting(**fields)
    _, metrics = Setting(**fields, **{'train.label_smoothing': 0.1}).run(1, num_steps=1)
    batch, spec = setting.batches.batch(0), setting.spec
    images = augment.normalise(batch['image'], spec.mean, spec.std, jnp.float32)
    outputs, _ = jax.jit(
        lambda variables: setting.recipe.network.apply(
            variables, images, train=True, mutable=['batch_stats']
        )
    )(setting.initial_state().variables)
    log_probabilities = np.asarray(jax.nn.log_softmax(outputs.logits[0]))
    own = log_probabilities[np.arange(len(images)), batch['label']].mean()
    expected = -0.9 * own - 0.1 * log_probabilities.mean()
    assert metrics[0]['loss'] == pytest.approx(float(expected), rel=1e-4)


def test_moving_averages_follow_the_weights():
    setting = Setting(**{'train.ema_decay': 0.9})
    start = setting.initial_state()
    states = [setting.run(num_devices=1, num_steps=steps)[0] for steps in (1, 2)]
    expected = start.variables
    for state in states:
        decay = min(0.9, (1 + int(state.step)) / (10 + int(state.step)))
        expected = jax.tree.map(
            lambda old, new, decay=decay: decay * old + (1 - decay) * new,
            expected,
            state.variables,
        )
    chex.assert_trees_all_close(states[-1].averages, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(states[-1].evaluated_variables, states[-1].averages)
    without, _ = Setting().run(num_devices=1, num_steps=2)
    assert without.averages is None
    chex.assert_trees_all_close(without.params, states[-1].params, rtol=1e-5, atol=1e-6)


def test_the_averages_are_what_is_exported(tmp_path):
    run_in(tmp_path / 'run', **{'train.ema_decay': 0.9, 'train.epochs': 1})
    student = export.export_student(tmp_path / 'run', tmp_path / 'student', branch=1)
    with checkpoint.Checkpoints(tmp_path / 'run/checkpoints', read_only=True) as checkpoints:
        state = checkpoints.read().state
    chex.assert_trees_all_equal(student.variables, student_variables(state['averages'], 1))
    last = student_variables({'params': state['params']}, 1)['params']
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(student.variables['params'], last, rtol=1e-3)
