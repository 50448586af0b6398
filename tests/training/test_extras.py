"""Training with label smoothing and moving averages."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_fixtures import Setting

from one_jax.data import augment


@pytest.fixture(scope='module')
def smoothed():
    """The plain network without augmentation, with smoothed labels and moving averages."""
    fields = {'method.name': 'plain', 'model.num_branches': None, 'data.augment': 'none'}
    return Setting(**fields, **{'train.label_smoothing': 0.1, 'train.ema_decay': 0.9})


def test_first_loss_with_label_smoothing_follows_the_formula(smoothed):
    """0.9 times the label's cross-entropy and 0.1 times the mean over the classes."""
    _, metrics = smoothed.run(range(1))
    batch, spec = smoothed.host_batch(0), smoothed.experiment.spec
    images = augment.normalise(batch['image'], spec.mean, spec.std, jnp.float32)
    outputs, _ = jax.jit(
        lambda variables: smoothed.experiment.network.apply(
            variables, images, train=True, mutable=['batch_stats']
        )
    )(smoothed.initial_state(np.uint32(0)).variables)
    log_probabilities = np.asarray(jax.nn.log_softmax(outputs.logits[0]))
    own = log_probabilities[np.arange(len(images)), batch['label']].mean()
    expected = -0.9 * own - 0.1 * log_probabilities.mean()
    assert metrics[0]['loss'] == pytest.approx(float(expected), rel=1e-4)


def test_moving_averages_after_two_steps_follow_the_recursion(smoothed):
    start = jax.device_get(smoothed.initial_state(np.uint32(0)))
    states = [smoothed.run(range(steps))[0] for steps in (1, 2)]
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
