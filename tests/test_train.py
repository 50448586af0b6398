"""The train step: against a second implementation, over devices, and over steps per call."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from one_jax import config as config_lib
from one_jax import losses, parallel, train
from one_jax.data import augment, datasets, resident
from one_jax.models import multibranch
from one_jax.state import init_state


def make_config(**fields):
    """A small recipe on generated images of CIFAR-10's shape; fields by dotted name."""
    config = config_lib.default_config()
    config.update_from_flattened_dict(
        {
            'model.name': 'resnet8',
            'model.num_branches': 2,
            'data.name': 'cifar10',
            'data.generated_examples': 64,
            'data.batch_size': 8,
            'data.eval_batch_size': 8,
            'train.epochs': 2,
            'train.compilation_cache_dir': '',
            **fields,
        }
    )
    return config


class Setting:
    """A recipe and its batches, with images cut to 8x8 so that everything is small."""

    def __init__(self, **fields):
        config = make_config(**fields)
        spec = config_lib.validate(config, num_devices=4)
        dataset = datasets.load(config.data)
        self.spec = dataclasses.replace(spec, image_shape=(8, 8, 3))
        examples = dataset.splits['train']
        examples = resident.Examples(examples.images[:, :8, :8], examples.labels)
        self.batches = resident.ResidentBatches(examples, config.data.batch_size, config.seed)
        self.recipe = train.make_recipe(
            config_lib.resolve(config), self.spec, self.batches.steps_per_epoch
        )

    def initial_state(self, seed=0):
        network, optimizer = self.recipe.network, self.recipe.optimizer
        averages = self.recipe.config.train.ema_decay > 0
        return jax.jit(lambda: init_state(network, optimizer, (8, 8, 3), seed, averages))()

    def run(self, num_devices, num_steps, steps_per_call=1):
        """The state after so many steps on so many devices, and the metrics of each step."""
        mesh = parallel.make_mesh(jax.devices()[:num_devices])
        state = jax.device_put(self.initial_state(), NamedSharding(mesh, P()))
        step = train.make_train_step(self.recipe, mesh)
        metrics = []
        for first in range(0, num_steps, steps_per_call):
            batches = [self.batches.batch(first + i) for i in range(steps_per_call)]
            batch = {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
            batch = parallel.shard_batch(batch, mesh, parallel.STEPS_AND_BATCH)
            state, scalars = step(state, batch)
            metrics += [jax.tree.map(lambda x, i=i: x[i], scalars) for i in range(steps_per_call)]
        return jax.device_get(state), jax.device_get(metrics)


def test_the_step_is_sgd_on_the_loss_of_the_method():
    """Gradient of the loss by hand, momentum and decay as PyTorch writes them, two steps."""
    setting = Setting(**{'optimizer.weight_decay': 0.01, 'data.augment': 'none'})
    recipe, spec = setting.recipe, setting.spec
    state, metrics = setting.run(num_devices=1, num_steps=2)

    @jax.jit
    def loss_and_gradient(params, batch_stats, images, labels):
        def loss_function(params):
            outputs, updated = recipe.network.apply(
                {'params': params, 'batch_stats': batch_stats},
                images,
                train=True,
                mutable=['batch_stats'],
            )
            # Epoch 0 of two, with a ramp over 80 / 300 of the run.
            weight = losses.sigmoid_rampup(0, 2 * 80 / 300)
            loss, _ = losses.one_loss(outputs.logits, outputs.teacher_logits, labels, 3.0, weight)
            return loss, updated['batch_stats']

        return jax.value_and_grad(loss_function, has_aux=True)(params)

    initial = setting.initial_state()
    params, batch_stats = initial.params, initial.batch_stats
    momentum = jax.tree.map(jnp.zeros_like, params)
    for step in range(2):
        batch = setting.batches.batch(step)
        images = augment.normalise(batch['image'], spec.mean, spec.std, jnp.float32)
        (loss, batch_stats), gradient = loss_and_gradient(
            params, batch_stats, images, batch['label']
        )
        assert metrics[step]['loss'] == pytest.approx(float(loss), rel=1e-5)
        norm = float(optax.tree.norm(gradient))
        assert metrics[step]['gradient_norm'] == pytest.approx(norm, rel=1e-4)
        gradient = jax.tree.map(lambda g, p: g + 0.01 * p, gradient, params)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, gradient)
        params = jax.tree.map(lambda p, m, g: p - 0.1 * (g + 0.9 * m), params, momentum, gradient)
    chex.assert_trees_all_close(state.params, params, rtol=1e-3, atol=1e-5)
    chex.assert_trees_all_close(state.batch_stats, batch_stats, rtol=1e-3, atol=1e-5)
    assert state.step == 2


def test_any_number_of_devices_gives_the_same_run():
    """With synchronised batch normalisation, in float64, to the order of rounding; and so the
    gradient is neither summed over devices nor divided twice. Augmentation is on."""
    fields = {'model.dtype': 'float64', 'sync_batch_norm': True}
    with jax.enable_x64(True):
        setting = Setting(**fields)
        alone, alone_metrics = setting.run(num_devices=1, num_steps=3)
        shared, shared_metrics = setting.run(num_devices=4, num_steps=3)
    chex.assert_trees_all_close(alone.params, shared.params, rtol=1e-10, atol=1e-12)
    chex.assert_trees_all_close(alone.batch_stats, shared.batch_stats, rtol=1e-10, atol=1e-12)
    chex.assert_trees_all_close(alone_metrics, shared_metrics, rtol=1e-5, atol=1e-6)


def test_per_replica_statistics_differ_from_synchronised_ones():
    """Guards the test above: the option does something, and the default is each device's own."""
    own, _ = Setting().run(num_devices=4, num_steps=1)
    synchronised, _ = Setting(sync_batch_norm=True).run(num_devices=4, num_steps=1)
    difference = optax.tree.norm(optax.tree.sub(own.params, synchronised.params))
    assert difference > 1e-3


def test_several_steps_a_call_are_the_same_steps():
    setting = Setting()
    one, one_metrics = setting.run(num_devices=1, num_steps=4)
    several, several_metrics = setting.run(num_devices=1, num_steps=4, steps_per_call=2)
    chex.assert_trees_all_close(one.params, several.params, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(one_metrics, several_metrics, rtol=1e-4, atol=1e-5)


def test_bfloat16_trains_float32_parameters():
    setting = Setting(**{'model.dtype': 'bfloat16'})
    state, metrics = setting.run(num_devices=1, num_steps=2)
    for leaf in jax.tree.leaves((state.params, state.batch_stats, state.opt_state[1])):
        assert leaf.dtype in (jnp.float32, jnp.int32)
    _, exact = Setting().run(num_devices=1, num_steps=2)
    assert metrics[0]['loss'] == pytest.approx(exact[0]['loss'], rel=0.02)
    assert metrics[0]['loss'] != exact[0]['loss']


def test_the_seed_decides():
    assert_equal = chex.assert_trees_all_equal
    first, second = (Setting().run(num_devices=1, num_steps=1)[0] for _ in range(2))
    assert_equal(first, second)
    networks = [Setting().initial_state(seed).params for seed in (0, 1)]
    with pytest.raises(AssertionError):
        assert_equal(*networks)


def run_in(directory, **fields):
    config = make_config(**fields)
    return train.train_and_evaluate(config, directory)


def test_held_out_images_are_watched_and_the_test_set_comes_last(tmp_path):
    result = run_in(
        tmp_path / 'run',
        **{'data.validation_fraction': 0.25, 'data.generated_examples': 80},
    )
    lines = (tmp_path / 'run/metrics.jsonl').read_text().splitlines()
    records = [json.loads(line) for line in lines]
    evaluations = [(r['step'], r['split']) for r in records if r['split'] != 'train']
    steps_per_epoch = 60 // 8
    assert evaluations == [
        (steps_per_epoch, 'validation'),
        (2 * steps_per_epoch, 'validation'),
        (2 * steps_per_epoch, 'test'),
    ]
    assert result['split'] == 'test'
    assert result['validation_deployed_top1'] == records[-2]['deployed_top1']
    assert result['deployed_top1'] == records[-1]['deployed_top1']


def test_generated_images_can_be_learnt(tmp_path):
    """The whole loop on four devices, from 10 % to far above chance."""
    result = run_in(
        tmp_path / 'run',
        **{
            'data.generated_examples': 320,
            'data.batch_size': 32,
            'data.augment': 'none',
            'train.epochs': 4,
            'optimizer.schedule': 'cosine',
            'optimizer.learning_rate': 0.05,
        },
    )
    assert result['deployed_top1'] > 60
    assert result['teacher_top1'] > 60
    assert result['num_devices'] == 4


def test_a_branch_of_the_trained_state_is_a_student():
    setting = Setting()
    state, _ = setting.run(num_devices=1, num_steps=1)
    student = multibranch.student_variables(state.variables, 1)
    images = jnp.zeros((2, 8, 8, 3))
    plain = setting.recipe.network.make_backbones[0]()
    logits, outputs = jax.jit(
        lambda student, variables: (
            plain.apply(student, images, train=False).logits,
            setting.recipe.network.apply(variables, images, train=False),
        )
    )(student, state.variables)
    np.testing.assert_allclose(logits, outputs.logits[1], rtol=1e-5, atol=1e-5)
