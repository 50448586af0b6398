"""The memory of a compiled train step, and the errors of one that does not fit."""

import jax
import numpy as np
import pytest
from training_fixtures import Setting, small_config

from one_jax import train
from one_jax.errors import ConfigError
from one_jax.runtime import memory, parallel
from one_jax.training import compiled_step
from one_jax.training import step as step_lib
from one_jax.training.compiled_step import CompiledStep
from one_jax.training.evaluation import Evaluator
from one_jax.training.planning import make_plan

FIELDS = {'method.name': 'plain', 'model.num_branches': None}


def test_memory_of_state_batch_and_examples_is_exact():
    """Two steps per call, on two devices, with the images of 40 examples on each."""
    setting = Setting(2, **FIELDS)
    found = CompiledStep(setting.experiment, setting.mesh, num_steps=2, num_examples=40).memory
    state = jax.eval_shape(setting.initial_state, jax.ShapeDtypeStruct((), 'uint32'))
    assert found.state == sum(leaf.size * 4 for leaf in jax.tree.leaves(state))
    params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert found.state > 2 * 4 * params
    # Mask and index of half a batch each, and the number of steps.
    assert found.batch == 2 * (8 // 2) * (4 + 4) + 4
    assert found.examples == 40 * (8 * 8 * 3 + 4)
    assert found.teachers == 0
    # At least the gradients.
    assert found.temporaries > 4 * params


def test_run_that_does_not_fit_is_an_error_and_leaves_the_workdir_free(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, 'available_bytes', lambda: 4 * 500_000)
    with pytest.raises(ConfigError) as raised:
        train.train_and_evaluate(small_config(**FIELDS), tmp_path / 'run')
    message = str(raised.value)
    assert message.startswith('data.batch_size=8 is not allowed: ')
    for words in ('of 0.5 MB', 'temporaries', 'dtype=bfloat16', 'a smaller --config.data.batch_s'):
        assert words in message
    # XLA's CPU compiler keeps the activations of all parts.
    assert 'accumulation' not in message
    assert '\n' not in message
    assert [path.name for path in (tmp_path / 'run').iterdir()] == ['.lock']


def test_evaluation_that_does_not_fit_is_an_error_before_training(monkeypatch, tmp_path):
    """Of 10,000 images on each device, the first maps alone take 41 MB."""
    monkeypatch.setattr(memory, 'available_bytes', lambda: 4 * 40_000_000)
    config = small_config(**FIELDS, **{'data.eval_batch_size': 40_000})
    with pytest.raises(ConfigError, match=r'evaluation .* of 40\.0 MB.*; give fewer') as raised:
        train.train_and_evaluate(config, tmp_path / 'run')
    assert (raised.value.field, raised.value.value) == ('data.eval_batch_size', 40_000)
    assert [path.name for path in (tmp_path / 'run').iterdir()] == ['.lock']


def test_evaluation_compiled_ahead_is_the_one_that_runs():
    setting = Setting(2, **FIELDS)
    experiment, config = setting.experiment, setting.experiment.config
    evaluator, lazy = (
        Evaluator(config, experiment.method, experiment.network, setting.source, setting.mesh)
        for _ in range(2)
    )
    state = setting.initial_state(np.uint32(0))
    needed = evaluator.compile(state.evaluated_variables)
    # Each device's half of a batch of 16 images, at least.
    assert needed > 8 * (8 * 8 * 3 + 4 + 4)
    step = evaluator._step
    assert isinstance(step, jax.stages.Compiled)
    assert evaluator(state.evaluated_variables, 'test') == lazy(state.evaluated_variables, 'test')
    assert evaluator._step is step


class Refusing:
    """A train step whose compiler fails."""

    def __init__(self, reason):
        self._reason = reason

    def lower(self, *arguments):
        return self

    def compile(self):
        raise jax.errors.JaxRuntimeError(self._reason)


def compile_refusing(monkeypatch, reason):
    monkeypatch.setattr(step_lib, 'make_train_step', lambda *arguments: Refusing(reason))
    setting = Setting(2, **FIELDS, **{'train.accumulation_steps': 2})
    CompiledStep(setting.experiment, setting.mesh)


def test_compiler_out_of_memory_on_an_accelerator_is_an_error_with_advice(monkeypatch):
    monkeypatch.setattr(parallel, 'platform', lambda mesh: 'gpu')
    reason = 'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.\nUsed 17.60G of 15.75G hbm'
    with pytest.raises(ConfigError, match=r'Used 17\.60G of 15\.75G') as raised:
        compile_refusing(monkeypatch, reason)
    for field in ('train.accumulation_steps=4', 'model.remat=blocks', 'model.dtype=bfloat16'):
        assert f'--config.{field}' in str(raised.value)
    assert '\n' not in str(raised.value)


def test_compiler_with_another_error_is_not_the_users(monkeypatch):
    with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'):
        compile_refusing(monkeypatch, 'INTERNAL: bug')


def test_plan_needs_neither_the_data_set_nor_the_devices(tmp_path):
    fields = {'data.name': 'cifar10', 'data.data_dir': str(tmp_path), 'data.image_size': 0}
    config = small_config(**FIELDS, **fields, **{'data.generated_examples': 0})
    planned = make_plan(config, 4).memory
    assert planned.batch == 2 * (32 * 32 * 3 + 4 + 4)
    # A quarter of 16 images, and at least the first maps of each.
    assert planned.evaluation > 4 * 32 * 32 * (3 + 16 * 4)
    assert config.data.batch_size == 8
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match=r'data\.batch_size=8 .* multiple of the 5 devices'):
        make_plan(config, 5)


def test_compiled_step_keeps_few_calls_in_flight(monkeypatch):
    waited = []
    step = object.__new__(CompiledStep)
    step.__dict__.update(_in_flight=compiled_step.collections.deque(), _teacher_variables=())
    step._programs = {(1, 8): lambda state, batch: (state + 1, state)}
    monkeypatch.setattr(jax, 'block_until_ready', waited.append)
    for state in range(7):
        step(state, {'mask': np.ones((1, 8))})
    assert waited == list(range(7 - compiled_step.MAX_CALLS_IN_FLIGHT))
