"""bfloat16: in the convolutions and nowhere else, and as accurate as float32."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from one_jax import config as config_lib
from one_jax import evaluate, parallel
from one_jax.data import datasets
from one_jax.recipe import make_recipe
from one_jax.state import init_state
from one_jax.train_step import make_train_step

STEPS, SEEDS = 30, (0, 1, 2)


class Run:
    """ONE with two branches on generated images of 8x8; seeds share what is compiled."""

    def __init__(self, dtype):
        config = config_lib.default_config()
        config.update_from_flattened_dict(
            {
                'model.name': 'resnet8',
                'model.num_branches': 2,
                'model.dtype': dtype,
                'data.name': 'image_folder',
                'data.image_size': 8,
                'data.generated_examples': 320,
                'data.batch_size': 32,
                'data.eval_batch_size': 80,
                'optimizer.learning_rate': 0.05,
                'optimizer.schedule': 'cosine',
                'train.steps': STEPS,
                'train.ema_decay': 0.9,
            }
        )
        self.config = config_lib.resolve(config)
        self.dataset = datasets.load(config.data)
        self.mesh = parallel.make_mesh(jax.devices()[:1])
        steps_per_epoch = self._batches(0).steps_per_epoch
        self.recipe = recipe = make_recipe(self.config, self.dataset.spec, steps_per_epoch)
        self.train_step = make_train_step(recipe, self.mesh)
        self.evaluator = evaluate.Evaluator(
            self.config, recipe.method, recipe.network, self.dataset, self.mesh
        )
        shape = self.dataset.spec.image_shape
        self.init = jax.jit(
            lambda seed: init_state(recipe.network, recipe.optimizer, shape, seed, True)
        )

    def _batches(self, seed):
        return self.dataset.train_batches(self.config.data.batch_size, seed)

    def batch(self, seed, step):
        batch = {name: values[None] for name, values in self._batches(seed).batch(step).items()}
        return parallel.shard_batch(batch, self.mesh, parallel.STEPS_AND_BATCH)

    def accuracy(self, seed):
        """Test top-1 in % of the deployed branch."""
        state = parallel.replicate(self.init(seed), self.mesh)
        for step in range(STEPS):
            state, _ = self.train_step(state, self.batch(seed, step))
        return self.evaluator(state.variables, 'test')['deployed_top1']


@pytest.fixture(scope='module')
def half():
    return Run('bfloat16')


def test_what_a_step_keeps_is_float32(half):
    """Parameters, statistics, momentum and moving averages; the loss and all that is recorded."""
    state = parallel.replicate(half.init(0), half.mesh)
    state, scalars = half.train_step(state, half.batch(0, 0))
    kept = (state.params, state.batch_stats, state.averages, scalars)
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype('float32')}
    momentum = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(momentum) == len(jax.tree.leaves(state.params))
    assert {leaf.dtype for leaf in momentum} == {jnp.dtype('float32')}
    record = half.evaluator(state.variables, 'test')
    # A mean of bfloat16 numbers would have three digits.
    assert record['deployed_nll'] != float(jnp.bfloat16(record['deployed_nll']))


def test_convolutions_are_bfloat16_and_logarithms_are_not(half):
    program = half.train_step.lower(half.init(0), half.batch(0, 0)).as_text()

    def result_types(operation):
        lines = [line for line in program.splitlines() if f'stablehlo.{operation}' in line]
        return {re.findall(r'tensor<(?:\d+x)*(\w+)>', line)[-1] for line in lines}

    assert result_types('convolution') == {'bf16'}
    assert result_types('log') == {'f32'}
    assert result_types('exponential') == {'f32'}
    assert result_types('rsqrt') == {'f32'}


def test_bfloat16_is_as_accurate_as_float32(half):
    """The means over the seeds differ by no more than the seeds do."""
    whole = Run('float32')
    ours, expected = (np.array([run.accuracy(seed) for seed in SEEDS]) for run in (half, whole))
    assert expected.mean() > 50
    spread = max(np.ptp(ours), np.ptp(expected))
    assert abs(ours.mean() - expected.mean()) <= spread
