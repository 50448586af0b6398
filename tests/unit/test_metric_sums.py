"""The running sums of the training metrics, and the guard that reads them."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from one_jax.training import guard
from one_jax.training.state import MetricSums, TrainState

SHAPES = {
    'loss': jax.ShapeDtypeStruct((), jnp.float32),
    'branch_loss': jax.ShapeDtypeStruct((2,), jnp.float32),
}
add = jax.jit(MetricSums.add, static_argnames='max_skipped')


def add_steps(sums, first_step, losses, max_skipped=0, finite=None):
    """Adds one step per loss, whose first branch has a finite loss of 1."""
    for step, loss in enumerate(losses, start=first_step):
        metrics = {'loss': jnp.float32(loss), 'branch_loss': jnp.float32([1, loss])}
        is_finite = np.isfinite(loss) if finite is None else finite
        sums = add(sums, jnp.int32(step), metrics, jnp.asarray(is_finite), max_skipped=max_skipped)
    return jax.device_get(sums)


def make_sums():
    return MetricSums.zeros(SHAPES)


def test_metric_sums_several_steps_average_in_float64():
    losses = np.float32([0.1, 0.7, 1e-3])
    means = add_steps(make_sums(), 1, losses).means()
    total = (losses[0] + losses[1]) + losses[2]
    assert means == {'loss': float(total) / 3, 'branch_loss': [1.0, float(total) / 3]}
    assert isinstance(means['loss'], float)


def test_metric_sums_start_anew_forget_the_steps_before():
    sums = add_steps(make_sums(), 1, [5, 7]).start_anew()
    assert add_steps(sums, 3, [1, 2]).means() == {'loss': 1.5, 'branch_loss': [1, 1.5]}


def test_metric_sums_skipped_steps_are_counted_and_left_out():
    sums = add_steps(make_sums(), 1, [1, np.nan, np.inf, 2], max_skipped=2)
    assert sums.means() == {'loss': 1.5, 'branch_loss': [1, 1.5]}
    assert (sums.steps, sums.skipped, sums.skipped_in_a_row) == (2, 2, 0)
    assert sums.first_nonfinite_step == 0


def test_metric_sums_all_steps_skipped_give_nan():
    sums = add_steps(make_sums(), 1, [np.nan, np.nan], max_skipped=2)
    assert np.isnan(sums.means()['loss'])
    assert np.isnan(sums.means()['branch_loss']).all()


def test_metric_sums_nonfinite_step_is_remembered_and_freezes_the_sums():
    sums = add_steps(make_sums(), 1, [1, 1, np.nan])
    later = add_steps(sums, 4, [3, np.inf, 5])
    assert later.first_nonfinite_step == 3
    assert later.steps == sums.steps == 3
    np.testing.assert_array_equal(later.sums['branch_loss'], [3, np.nan])
    assert later.start_anew().first_nonfinite_step == 3


def test_metric_sums_skips_in_a_row_count_across_records():
    sums = add_steps(make_sums(), 1, [1, np.nan, np.nan], max_skipped=2).start_anew()
    assert (sums.skipped, sums.skipped_in_a_row) == (0, 2)
    assert add_steps(sums, 4, [1], max_skipped=2).skipped_in_a_row == 0
    assert add_steps(sums, 4, [np.nan], max_skipped=2).first_nonfinite_step == 4


def make_experiment(max_skipped=0):
    train = types.SimpleNamespace(skip_nonfinite_steps=max_skipped)
    optimizer = types.SimpleNamespace(learning_rate=0.1)
    config = types.SimpleNamespace(train=train, optimizer=optimizer)
    return types.SimpleNamespace(config=config, steps_per_epoch=8)


def make_state(metrics, kernel=1.0, variance=1.0):
    variables = {'kernel': jnp.float32([1, kernel])}, {'var': jnp.float32([1, variance])}
    return TrainState(jnp.int32(8), *variables, (), jnp.zeros(2, jnp.uint32), metrics=metrics)


def test_guard_finite_state_passes():
    state = make_state(add_steps(make_sums(), 1, [1, 2]))
    guard.require_finite(make_experiment(), 8, state, None)


def test_guard_nonfinite_term_is_named_with_step_branch_and_checkpoint():
    state = make_state(add_steps(make_sums(), 9, [1, np.nan, 1]))
    with pytest.raises(guard.NonFiniteError) as error:
        guard.require_finite(make_experiment(), 11, state, 8)
    assert str(error.value).startswith(
        'step 10 (epoch 1.25) is not finite: branch_loss of branch 1 is nan; loss is nan; '
        'the checkpoint of step 8 is kept. Lower optimizer.learning_rate=0.1'
    )
    assert '--config.train.skip_nonfinite_steps=10' in str(error.value)
    assert '\n' not in str(error.value)


def test_guard_too_many_skips_are_reported():
    state = make_state(add_steps(make_sums(), 1, [np.nan] * 3, max_skipped=2))
    with pytest.raises(guard.NonFiniteError, match=r'^step 3 .* 2 steps before it'):
        guard.require_finite(make_experiment(max_skipped=2), 3, state, None)


def test_guard_finite_loss_with_nonfinite_update_names_the_parameters():
    sums = add_steps(make_sums(), 1, [1.0, 1.0], max_skipped=1, finite=False)
    with pytest.raises(guard.NonFiniteError, match=r'^step 2 .* parameters or statistics'):
        guard.require_finite(make_experiment(1), 2, make_state(sums), None)


@pytest.mark.parametrize('place', ['kernel', 'variance'])
def test_guard_nonfinite_variables_end_the_run(place):
    state = make_state(make_sums(), **{place: jnp.inf})
    with pytest.raises(guard.NonFiniteError, match=r'^step 8 .* there is no checkpoint yet'):
        guard.require_finite(make_experiment(), 8, state, None)
