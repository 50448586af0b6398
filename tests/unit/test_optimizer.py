"""Learning-rate schedules, and SGD."""

import math

import numpy as np
import optax
import pytest

from one_jax import config as config_lib
from one_jax.data.table import DATASETS
from one_jax.errors import ConfigError
from one_jax.training.experiment import make_experiment
from one_jax.training.optimizer import make_optimizer, make_schedule


def rates(total_steps=100, **fields):
    config = config_lib.default_config().optimizer
    config.update(fields)
    schedule = make_schedule(config, steps_per_epoch=10, total_steps=total_steps)
    return np.array([float(schedule(step)) for step in range(total_steps)])


def test_step_schedule_decays_at_its_milestones():
    expected = np.repeat([0.1, 0.01, 0.001], [50, 25, 25])
    np.testing.assert_allclose(rates(), expected, rtol=1e-6)


def test_step_schedule_with_warmup_counts_milestones_from_the_first_step():
    expected = np.repeat([0.1, 0.01, 0.001], [50, 25, 25])
    expected[:20] = 0.1 * np.arange(20) / 20
    np.testing.assert_allclose(rates(warmup_epochs=2.0), expected, rtol=1e-6)


def test_step_schedule_milestones_at_one_step_both_apply():
    np.testing.assert_allclose(rates(2, milestones=(0.5, 0.6)), [0.1, 0.001], rtol=1e-6)


@pytest.mark.parametrize('warmup_epochs', [0.0, 0.5])
def test_cosine_schedule_decays_from_the_peak_to_zero(warmup_epochs):
    warmup = round(10 * warmup_epochs)
    expected = [
        0.2 * step / warmup
        if step < warmup
        else 0.1 * (1 + math.cos(math.pi * (step - warmup) / (100 - warmup)))
        for step in range(100)
    ]
    actual = rates(schedule='cosine', learning_rate=0.2, warmup_epochs=warmup_epochs)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-7)


def test_constant_schedule_stays():
    np.testing.assert_allclose(rates(schedule='constant'), 0.1, rtol=1e-6)


@pytest.mark.parametrize('schedule', ['step', 'cosine', 'constant'])
def test_schedule_with_reference_batch_size_scales_with_the_batch(schedule):
    """The warm-up too; 0 scales nothing."""
    config = config_lib.default_config().optimizer
    config.update(schedule=schedule, warmup_epochs=0.5)

    def rates_of(batch_size, reference):
        config.reference_batch_size = reference
        schedule = make_schedule(config, 10, 100, batch_size)
        return np.array([float(schedule(step)) for step in (0, 3, 5, 20, 60, 99)])

    unscaled = rates_of(512, reference=0)
    np.testing.assert_allclose(rates_of(512, reference=128), 4 * unscaled, rtol=1e-6)
    np.testing.assert_allclose(rates_of(32, reference=128), unscaled / 4, rtol=1e-6)
    np.testing.assert_array_equal(rates_of(128, reference=128), unscaled)


@pytest.mark.parametrize('epochs', [0.01, 2.5, 3.0])
def test_warmup_without_a_step_or_as_long_as_the_run_is_an_error(epochs):
    """Of 25 steps in epochs of 10."""
    spec = DATASETS['cifar10']
    config = config_lib.default_config()
    config.update_from_flattened_dict(
        {'model.name': 'resnet8', 'train.steps': 25, 'optimizer.warmup_epochs': 2.4}
    )
    make_experiment(config_lib.resolve(config), spec, (), 10)
    config.optimizer.warmup_epochs = epochs
    with pytest.raises(ConfigError, match=r'optimizer\.warmup_epochs=.* below the 25 steps'):
        make_experiment(config_lib.resolve(config), spec, (), 10)


def test_epochs_whose_steps_int32_cannot_count_are_an_error():
    config = config_lib.default_config()
    config.train.epochs = 99_999
    with pytest.raises(ConfigError, match=r'train\.epochs=99999 .* an epoch has 100000'):
        make_experiment(config_lib.resolve(config), DATASETS['cifar10'], (), 100_000)


def test_optimizer_is_pytorchs_sgd_with_coupled_weight_decay():
    """Two steps by hand: decay is added to the gradient, momentum is Nesterov's."""
    config = config_lib.default_config().optimizer
    config.update(weight_decay=0.01, momentum=0.9)
    optimizer = make_optimizer(config, lambda step: 0.1 / (1 + step))
    params, gradients = {'w': np.float32([1.0, -2.0])}, [np.float32([0.5, 1.0]), np.float32([1, 0])]
    state, found = optimizer.init(params), params
    weight, momentum = np.float64(params['w']), 0.0
    for step, gradient in enumerate(gradients):
        updates, state = optimizer.update({'w': gradient}, state, found)
        found = optax.apply_updates(found, updates)
        decayed = gradient + 0.01 * weight
        momentum = 0.9 * momentum + decayed
        weight = weight - 0.1 / (1 + step) * (decayed + 0.9 * momentum)
    np.testing.assert_allclose(found['w'], weight, rtol=1e-6)
