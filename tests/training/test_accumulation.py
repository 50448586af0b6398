"""Gradient accumulation, against the parts applied by hand and against a whole batch.

Batch normalisation sees each part by itself. Only if all parts hold the same images do they have
the gradient of the whole batch; their running statistics still differ.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_fixtures import Setting

from one_jax import losses
from one_jax.data import augment
from one_jax.training.inputs import Inputs
from one_jax.training.step import _split

STEPS, PART, DEVICES = 3, 2, 2
DECAY, RATE = 0.01, 0.02


def make_setting(accumulation_steps, **fields):
    fields = {
        'method.name': 'plain',
        'model.num_branches': None,
        'model.dtype': 'float64',
        'data.augment': 'none',
        'data.batch_size': 2 * PART * DEVICES,
        'optimizer.learning_rate': RATE,
        'optimizer.weight_decay': DECAY,
        'train.accumulation_steps': accumulation_steps,
        'train.steps': STEPS,
        **fields,
    }
    return Setting(DEVICES, **fields)


@pytest.fixture(scope='module', autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope='module')
def in_parts(float64):
    return make_setting(2)


def draw(size, copies=1):
    """Draws batches; in each device's share the same `size` images come `copies` times."""
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(STEPS):
        images = rng.integers(0, 256, (DEVICES, 1, size, 8, 8, 3), np.uint8)
        labels = rng.integers(0, 10, (DEVICES, 1, size)).astype(np.int32)
        batches.append(
            {
                'image': np.repeat(images, copies, axis=1).reshape(-1, 8, 8, 3),
                'label': np.repeat(labels, copies, axis=1).reshape(-1),
                'mask': np.ones(DEVICES * copies * size, np.float32),
            }
        )
    return batches


def test_accumulation_equals_the_parts_by_hand(in_parts):
    """Mean gradient over parts and devices, running statistics part after part, SGD by hand."""
    experiment, batches = in_parts.experiment, draw(2 * PART)
    actual, metrics = in_parts.run(batches)

    @jax.jit
    def gradient_of(params, batch_stats, images, labels):
        def loss_function(params):
            outputs, updated = experiment.network.apply(
                {'params': params, 'batch_stats': batch_stats},
                augment.normalise(images, experiment.spec.mean, experiment.spec.std, jnp.float64),
                train=True,
                mutable=['batch_stats'],
            )
            loss = losses.cross_entropy(outputs.logits, labels).mean(axis=-1).sum()
            return loss, updated['batch_stats']

        return jax.value_and_grad(loss_function, has_aux=True)(params)

    mean = lambda trees: jax.tree.map(lambda *x: sum(x) / len(x), *trees)  # noqa: E731
    initial = jax.device_get(in_parts.initial_state(np.uint32(0)))
    params, batch_stats = initial.params, initial.batch_stats
    momentum = jax.tree.map(jnp.zeros_like, params)
    for batch, measured in zip(batches, metrics, strict=True):
        parts = [
            (batch['image'][i : i + PART], batch['label'][i : i + PART])
            for i in range(0, 2 * PART * DEVICES, PART)
        ]
        gradients, statistics, loss = [], [], []
        for device in range(DEVICES):
            own = batch_stats
            for images, labels in parts[2 * device : 2 * device + 2]:
                (value, own), gradient = gradient_of(params, own, images, labels)
                gradients.append(gradient)
                loss.append(float(value))
            statistics.append(own)
        batch_stats = mean(statistics)
        gradient = jax.tree.map(lambda g, p: g + DECAY * p, mean(gradients), params)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, gradient)
        params = jax.tree.map(lambda p, m, g: p - RATE * (g + 0.9 * m), params, momentum, gradient)
        assert measured['loss'] == pytest.approx(np.mean(loss), rel=1e-6)
    chex.assert_trees_all_close(actual.params, params, rtol=1e-10, atol=1e-10)
    chex.assert_trees_all_close(actual.batch_stats, batch_stats, rtol=1e-10, atol=1e-10)


def test_accumulation_of_equal_parts_has_the_gradient_of_the_whole(in_parts):
    batches = draw(PART, copies=2)
    whole, whole_metrics = make_setting(1).run(batches)
    parts, metrics = in_parts.run(batches)
    chex.assert_trees_all_close(parts.params, whole.params, rtol=1e-10, atol=1e-10)
    chex.assert_trees_all_close(parts.opt_state, whole.opt_state, rtol=1e-10, atol=1e-10)
    for own, other in zip(metrics, whole_metrics, strict=True):
        assert own['loss'] == pytest.approx(other['loss'], rel=1e-6)
    # The parts have updated them twice per step.
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(parts.batch_stats, whole.batch_stats, rtol=1e-3)


@pytest.mark.parametrize('branches', [(), (3,)])
def test_accumulation_splits_images_of_every_branch_along_the_batch(branches):
    batch = 6
    images = np.arange(np.prod((*branches, batch, 2, 2, 3))).reshape(*branches, batch, 2, 2, 3)
    labels, mask = np.arange(batch), np.arange(batch) % 2
    targets = np.arange(4 * batch).reshape(batch, 4)
    inputs, masks = _split((Inputs(images, labels, targets), mask), 3)
    for part in range(3):
        own = slice(2 * part, 2 * part + 2)
        np.testing.assert_array_equal(inputs.images[part], images[..., own, :, :, :])
        np.testing.assert_array_equal(inputs.labels[part], labels[own])
        np.testing.assert_array_equal(inputs.targets[part], targets[own])
        np.testing.assert_array_equal(masks[part], mask[own])
