"""Gradient accumulation: against the parts applied by hand, and where the parts are copies.

Batch normalisation sees each part by itself, so that in general A parts are not one batch. They
are, but for the running statistics, when all parts hold the same images.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from one_jax import config as config_lib
from one_jax import losses, parallel, train
from one_jax.data import augment, datasets
from one_jax.errors import ConfigError
from one_jax.inputs import Inputs
from one_jax.state import init_state
from one_jax.train_step import _split

STEPS, PART = 3, 2


def make_config(accumulation_steps, batch_size, **fields):
    config = config_lib.default_config()
    config.update_from_flattened_dict(
        {
            'method.name': 'plain',
            'model.name': 'resnet8',
            'model.dtype': 'float64',
            'data.name': 'image_folder',
            'data.image_size': 8,
            'data.augment': 'none',
            'data.generated_examples': 64,
            'data.batch_size': batch_size,
            'optimizer.learning_rate': 0.02,
            'optimizer.weight_decay': 0.01,
            'optimizer.schedule': 'constant',
            'train.accumulation_steps': accumulation_steps,
            'train.steps': STEPS,
            'train.compilation_cache_dir': '',
            **fields,
        }
    )
    return config


@functools.cache
def make_recipe(accumulation_steps, batch_size, fields=()):
    config = make_config(accumulation_steps, batch_size, **dict(fields))
    config_lib.validate(config, 1)
    spec = datasets.load(config.data).spec
    return train.make_recipe(config_lib.resolve(config), spec, STEPS)


def fresh_state(recipe):
    return jax.jit(lambda: init_state(recipe.network, recipe.optimizer, (8, 8, 3), 0))()


def run(recipe, num_devices, batches):
    """The state after the batches, and the loss of each step."""
    mesh = parallel.make_mesh(jax.devices()[:num_devices])
    state = parallel.replicate(fresh_state(recipe), mesh)
    step = train.make_train_step(recipe, mesh)
    seen = []
    for batch in batches:
        batch = jax.tree.map(lambda x: x[None], batch)
        state, scalars = step(state, parallel.shard_batch(batch, mesh, parallel.STEPS_AND_BATCH))
        seen.append(float(scalars['loss'][0]))
    return jax.device_get(state), seen


def draw(size, copies=1, num_devices=1):
    """Random batches; of each device's part, `copies` of the same images one after the other."""
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(STEPS):
        images = rng.integers(0, 256, (num_devices, 1, size, 8, 8, 3), np.uint8)
        labels = rng.integers(0, 10, (num_devices, 1, size)).astype(np.int32)
        batches.append(
            {
                'image': np.repeat(images, copies, axis=1).reshape(-1, 8, 8, 3),
                'label': np.repeat(labels, copies, axis=1).reshape(-1),
                'mask': np.ones(num_devices * copies * size, np.float32),
            }
        )
    return batches


@pytest.mark.parametrize('num_devices', [1, 2])
def test_the_parts_one_after_the_other_by_hand(num_devices):
    """Mean gradient over parts and devices, running statistics through the parts, SGD by hand."""
    with jax.enable_x64(True):
        batch_size = 2 * PART * num_devices
        recipe = make_recipe(2, batch_size)
        batches = draw(2 * PART, num_devices=num_devices)
        actual, seen = run(recipe, num_devices, batches)

        @jax.jit
        def gradient_of(params, batch_stats, images, labels):
            def loss_function(params):
                outputs, updated = recipe.network.apply(
                    {'params': params, 'batch_stats': batch_stats},
                    augment.normalise(images, recipe.spec.mean, recipe.spec.std, jnp.float64),
                    train=True,
                    mutable=['batch_stats'],
                )
                loss = losses.cross_entropy(outputs.logits, labels).mean(axis=-1).sum()
                return loss, updated['batch_stats']

            return jax.value_and_grad(loss_function, has_aux=True)(params)

        mean = lambda trees: jax.tree.map(lambda *x: sum(x) / len(x), *trees)  # noqa: E731
        initial = fresh_state(recipe)
        params, batch_stats = initial.params, initial.batch_stats
        momentum = jax.tree.map(jnp.zeros_like, params)
        for batch, loss_seen in zip(batches, seen, strict=True):
            parts = [
                (batch['image'][i : i + PART], batch['label'][i : i + PART])
                for i in range(0, batch_size, PART)
            ]
            gradients, statistics, loss = [], [], []
            for device in range(num_devices):
                own = batch_stats
                for images, labels in parts[2 * device : 2 * device + 2]:
                    (value, own), gradient = gradient_of(params, own, images, labels)
                    gradients.append(gradient)
                    loss.append(float(value))
                statistics.append(own)
            batch_stats = mean(statistics)
            gradient = jax.tree.map(lambda g, p: g + 0.01 * p, mean(gradients), params)
            momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, gradient)
            params = jax.tree.map(
                lambda p, m, g: p - 0.02 * (g + 0.9 * m), params, momentum, gradient
            )
            assert loss_seen == pytest.approx(np.mean(loss), rel=1e-6)
    chex.assert_trees_all_close(actual.params, params, rtol=1e-10, atol=1e-10)
    chex.assert_trees_all_close(actual.batch_stats, batch_stats, rtol=1e-10, atol=1e-10)
    assert actual.step == STEPS


@pytest.mark.parametrize('num_devices', [1, 2])
def test_parts_that_are_copies_give_the_gradient_of_the_whole(num_devices):
    with jax.enable_x64(True):
        batches = draw(PART, copies=2, num_devices=num_devices)
        batch_size = 2 * PART * num_devices
        whole, seen_whole = run(make_recipe(1, batch_size), num_devices, batches)
        parts, seen = run(make_recipe(2, batch_size), num_devices, batches)
    chex.assert_trees_all_close(parts.params, whole.params, rtol=1e-10, atol=1e-10)
    chex.assert_trees_all_close(parts.opt_state, whole.opt_state, rtol=1e-10, atol=1e-10)
    assert seen == pytest.approx(seen_whole, rel=1e-6)
    # They have seen each step's images twice.
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(parts.batch_stats, whole.batch_stats, rtol=1e-3)


def test_members_with_images_of_their_own():
    """KDCL: images [K, B, ...] are cut along the batch, and not along the members."""
    fields = (
        ('method.name', 'kdcl'),
        ('method.teacher', 'naive'),
        ('method.own_augmentation', True),
    )
    with jax.enable_x64(True):
        batches = draw(PART, copies=2)[:1]
        whole, _ = run(make_recipe(1, 2 * PART, fields), 1, batches)
        parts, _ = run(make_recipe(2, 2 * PART, fields), 1, batches)
    chex.assert_trees_all_close(parts.params, whole.params, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('members', [(), (3,)])
def test_every_part_has_its_images_labels_targets_and_mask(members):
    batch = 6
    images = np.arange(np.prod((*members, batch, 2, 2, 3))).reshape(*members, batch, 2, 2, 3)
    labels, mask = np.arange(batch), np.arange(batch) % 2
    targets = np.arange(4 * batch).reshape(batch, 4)
    inputs, masks = _split((Inputs(images, labels, targets), mask), 3)
    for part in range(3):
        own = slice(2 * part, 2 * part + 2)
        np.testing.assert_array_equal(inputs.images[part], images[..., own, :, :, :])
        np.testing.assert_array_equal(inputs.labels[part], labels[own])
        np.testing.assert_array_equal(inputs.targets[part], targets[own])
        np.testing.assert_array_equal(masks[part], mask[own])


@pytest.mark.parametrize(
    ('accumulation_steps', 'num_devices', 'allowed'),
    [
        (0, 1, 'at least 1'),
        (-2, 1, 'at least 1'),
        (3, 1, 'such that 1 devices times it divide data.batch_size=8'),
        (4, 4, 'such that 4 devices times it divide data.batch_size=8'),
        (16, 1, 'such that 1 devices times it divide data.batch_size=8'),
    ],
)
def test_parts_that_cannot_be_are_refused(accumulation_steps, num_devices, allowed):
    with pytest.raises(ConfigError) as error:
        config_lib.validate(make_config(accumulation_steps, 8), num_devices)
    assert error.value.field == 'train.accumulation_steps'
    assert error.value.value == accumulation_steps
    assert error.value.allowed == allowed


@pytest.mark.parametrize(('accumulation_steps', 'num_devices'), [(1, 4), (8, 1), (2, 4)])
def test_parts_that_can_be_are_allowed(accumulation_steps, num_devices):
    config_lib.validate(make_config(accumulation_steps, 8), num_devices)
