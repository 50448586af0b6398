"""Learning-rate schedules."""

import math

import numpy as np
import pytest

from one_jax import config as config_lib
from one_jax.optimizer import make_schedule


def rates(total_steps=100, **fields):
    config = config_lib.default_config().optimizer
    config.update(fields)
    schedule = make_schedule(config, steps_per_epoch=10, total_steps=total_steps)
    return np.array([float(schedule(step)) for step in range(total_steps)])


def test_step_schedule_falls_at_half_and_three_quarters():
    expected = np.repeat([0.1, 0.01, 0.001], [50, 25, 25])
    np.testing.assert_allclose(rates(), expected, rtol=1e-6)


def test_milestones_count_from_the_first_step_with_a_warmup_too():
    expected = np.repeat([0.1, 0.01, 0.001], [50, 25, 25])
    expected[:20] = 0.1 * np.arange(20) / 20
    np.testing.assert_allclose(rates(warmup_epochs=2.0), expected, rtol=1e-6)


def test_milestones_that_fall_together_both_apply():
    np.testing.assert_allclose(rates(2, milestones=(0.5, 0.6)), [0.1, 0.001], rtol=1e-6)


@pytest.mark.parametrize('warmup_epochs', [0.0, 0.5])
def test_cosine_goes_from_the_peak_to_zero(warmup_epochs):
    warmup = round(10 * warmup_epochs)
    expected = [
        0.2 * step / warmup
        if step < warmup
        else 0.1 * (1 + math.cos(math.pi * (step - warmup) / (100 - warmup)))
        for step in range(100)
    ]
    actual = rates(schedule='cosine', learning_rate=0.2, warmup_epochs=warmup_epochs)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-7)


def test_constant_stays():
    np.testing.assert_allclose(rates(schedule='constant'), 0.1, rtol=1e-6)


@pytest.mark.parametrize('schedule', ['step', 'cosine', 'constant'])
def test_the_rate_follows_the_batch_from_the_reference(schedule):
    """Four times the reference batch, four times the rate, in the warm-up too; 0 scales nothing."""
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
