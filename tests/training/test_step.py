"""The train step, against a second implementation and over several steps per call."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core as jax_core
from training_fixtures import Setting

from one_jax import losses
from one_jax.data import augment
from one_jax.models import multibranch
from one_jax.training.step import abstract_arguments


@pytest.fixture(scope='module', autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope='module')
def setting(float64):
    """ONE without augmentation."""
    fields = {'model.dtype': 'float64', 'data.augment': 'none', 'train.ema_decay': 0.9}
    return Setting(**fields)


def test_step_is_sgd_on_the_loss_of_the_method(setting):
    """The loss by hand, momentum and decay as PyTorch writes them, for two steps."""
    experiment, spec = setting.experiment, setting.experiment.spec
    state, metrics = setting.run(range(2))

    @jax.jit
    def loss_and_gradient(params, batch_stats, images, labels):
        def loss_function(params):
            outputs, updated = experiment.network.apply(
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

    initial = jax.device_get(setting.initial_state(np.uint32(0)))
    params, batch_stats = initial.params, initial.batch_stats
    momentum = jax.tree.map(jnp.zeros_like, params)
    for step in range(2):
        batch = setting.host_batch(step)
        images = augment.normalise(batch['image'], spec.mean, spec.std, jnp.float64)
        (loss, batch_stats), gradient = loss_and_gradient(
            params, batch_stats, images, batch['label']
        )
        assert metrics[step]['loss'] == pytest.approx(float(loss), rel=1e-6)
        norm = float(optax.tree.norm(gradient))
        assert metrics[step]['gradient_norm'] == pytest.approx(norm, rel=1e-6)
        gradient = jax.tree.map(lambda g, p: g + 1e-4 * p, gradient, params)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, gradient)
        params = jax.tree.map(lambda p, m, g: p - 0.1 * (g + 0.9 * m), params, momentum, gradient)
    chex.assert_trees_all_close(state.params, params, rtol=1e-8, atol=1e-10)
    chex.assert_trees_all_close(state.batch_stats, batch_stats, rtol=1e-8, atol=1e-10)
    assert state.step == 2


def test_step_sums_equal_the_metrics_of_single_steps(setting):
    """Three steps in one record, against three records of one."""
    _, metrics = setting.run(range(3))
    state = setting.initial_state(np.uint32(0))
    for step in range(3):
        state = setting.call(state, setting.host_batch(step))
    means = jax.device_get(state.metrics).means()
    assert means.keys() == metrics[0].keys() >= {'loss', 'branch_top1', 'teacher_top1'}
    for name, mean in means.items():
        expected = np.mean([np.float64(record[name]) for record in metrics], axis=0)
        np.testing.assert_allclose(mean, expected, rtol=1e-6, err_msg=name)


def test_step_several_per_call_equal_one_per_call(setting):
    """A padded call makes `count` steps. XLA compiles a loop, so rounding differs."""
    one, several = (setting.initial_state(np.uint32(0)) for _ in range(2))
    batches = [setting.host_batch(step) for step in range(5)]
    for batch in batches:
        one = setting.call(one, batch)
    calls = [batches[:3], [*batches[3:], batches[0]]]
    for count, call in zip((3, 2), calls, strict=True):
        stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *call)
        several, done = setting.train_step(several, {**stacked, 'count': np.int32(count)})
    assert done == 5
    chex.assert_trees_all_close(several, one, rtol=1e-6, atol=1e-10)
    chex.assert_trees_all_close(several.params, one.params, rtol=1e-10, atol=1e-10)


def primitives(jaxpr):
    """Yields the names of all operations of a program, and of the programs in it."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jax_core.jaxprs_in_params(equation.params):
            yield from primitives(inner)


def test_step_that_cannot_skip_has_no_extra_work():
    """It checks whether the metrics are finite, and selects no parameters."""
    counts = []
    for each in (Setting(), Setting(**{'train.skip_nonfinite_steps': 2})):
        state = jax.eval_shape(each.initial_state, jax.ShapeDtypeStruct((), 'uint32'))
        arguments = abstract_arguments(each.experiment, each.mesh, state)
        traced = each.train_step.trace(*arguments)
        names = list(primitives(traced.jaxpr.jaxpr))
        counts.append((names.count('is_finite'), names.count('select_n')))
    params = len(jax.tree.leaves(state.params))
    metrics = len(state.metrics.sums)
    # The cross-entropy has one of its own.
    assert metrics <= counts[0][0] <= metrics + 2
    assert counts[1][0] - counts[0][0] >= params
    assert counts[1][1] - counts[0][1] >= 2 * params


def test_initial_state_depends_on_the_seed_alone(setting):
    states = [jax.device_get(setting.initial_state(np.uint32(seed))) for seed in (0, 0, 1)]
    chex.assert_trees_all_equal(states[0], states[1])
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(states[0].params, states[2].params)
    chex.assert_trees_all_equal(states[0].averages, states[0].variables)
    fields = {'model.dtype': 'float64', 'train.ema_decay': 0.9}
    elsewhere = Setting(2, **fields).initial_state(np.uint32(0))
    chex.assert_trees_all_equal(jax.device_get(elsewhere), states[0])


def test_state_branch_of_it_is_a_plain_network(setting):
    state, _ = setting.run(range(1))
    student = multibranch.student_variables(state.variables, 1)
    network = setting.experiment.network
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3))
    plain = jax.jit(lambda variables: network.make_backbones[0]().apply(variables, images, False))
    outputs = jax.jit(lambda variables: network.apply(variables, images, train=False))
    np.testing.assert_allclose(
        plain(student).logits, outputs(state.variables).logits[1], rtol=1e-10, atol=1e-10
    )
