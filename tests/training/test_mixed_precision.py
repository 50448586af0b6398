"""bfloat16: in the convolutions and nowhere else, with the losses of float32."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_fixtures import Setting

from one_jax.training.evaluation import Evaluator
from one_jax.training.step import abstract_arguments

STEPS = 8


def make_setting(dtype):
    fields = {
        'model.dtype': dtype,
        'data.generated_examples': 320,
        'data.batch_size': 32,
        'data.eval_batch_size': 80,
        'optimizer.learning_rate': 0.05,
        'optimizer.schedule': 'cosine',
        'train.ema_decay': 0.9,
    }
    return Setting(**fields)


@pytest.fixture(scope='module')
def half():
    return make_setting('bfloat16')


@pytest.fixture(scope='module')
def trained(half):
    return half.run(range(STEPS))


def test_bfloat16_steps_keep_state_and_metrics_in_float32(half, trained):
    state, _ = trained
    kept = (state.params, state.batch_stats, state.averages, state.metrics.sums)
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype('float32')}
    momentum = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(momentum) == len(jax.tree.leaves(state.params))
    assert {leaf.dtype for leaf in momentum} == {jnp.dtype('float32')}
    experiment = half.experiment
    evaluator = Evaluator(
        experiment.config, experiment.method, experiment.network, half.source, half.mesh
    )
    evaluation = evaluator(state.variables, 'test')
    # A mean of bfloat16 numbers would have three digits.
    assert evaluation['deployed_nll'] != float(jnp.bfloat16(evaluation['deployed_nll']))


def test_bfloat16_step_convolves_in_bfloat16_and_takes_logarithms_in_float32(half):
    state = jax.eval_shape(half.initial_state, jax.ShapeDtypeStruct((), 'uint32'))
    arguments = abstract_arguments(half.experiment, half.mesh, state)
    program = half.train_step.lower(*arguments).as_text()

    def result_types(operation):
        lines = [line for line in program.splitlines() if f'stablehlo.{operation}' in line]
        return {re.findall(r'tensor<(?:\d+x)*(\w+)>', line)[-1] for line in lines}

    assert result_types('convolution') == {'bf16'}
    assert result_types('log') == {'f32'}
    assert result_types('exponential') == {'f32'}
    assert result_types('rsqrt') == {'f32'}


def test_bfloat16_losses_follow_those_in_float32(trained):
    ours = [record['loss'] for record in trained[1]]
    expected = [record['loss'] for record in make_setting('float32').run(range(STEPS))[1]]
    assert expected[-1] < 0.95 * expected[0]
    np.testing.assert_allclose(ours, expected, rtol=0.03)
