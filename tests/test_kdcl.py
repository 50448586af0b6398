"""KDCL: its four teachers against closed forms and grids, own crops, whole runs."""

import functools
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import assert_same_run, final_state
from jax.sharding import PartitionSpec as P
from method_fixtures import (
    BATCH,
    CLASSES,
    create,
    cross_entropy,
    gradient_norms,
    kl_divergence,
    random_labels,
    random_outputs,
    softmax,
)
from test_train import Setting, make_config

from one_jax import config as config_lib
from one_jax import inputs, methods, parallel, train
from one_jax.errors import ConfigError
from one_jax.interrupt import Interrupted
from one_jax.methods import kdcl


def entropy_of_mixtures(logits, label, weights):
    """Of one image: logits [K, C], weights [N, K]; by NumPy, [N]."""
    return -np.log(softmax(weights @ logits)[:, label])


def min_logit_by_loops(logits, labels):
    target = np.zeros(logits.shape[1:])
    for image, label in enumerate(labels):
        for k in range(CLASSES):
            target[image, k] = min(z[image, k] - z[image, label] for z in logits)
    return target


@pytest.mark.parametrize('teacher', ['naive', 'min_logit', 'general'])
def test_terms_against_the_formula(teacher):
    outputs, labels = random_outputs(3), random_labels()
    method = create('kdcl', teacher=teacher, **{'model.num_branches': 3})
    state = {'weights': np.array([0.7, 0.5, -0.2])}
    loss, terms = method.loss(outputs, methods.Context(labels, progress=0.0, method_state=state))
    z = outputs.logits
    if teacher == 'min_logit':
        target = min_logit_by_loops(z, labels)
        assert 'teacher_weights' not in terms
    elif teacher == 'general':
        target = 0.7 * z[0] + 0.5 * z[1] - 0.2 * z[2]
        np.testing.assert_allclose(terms['teacher_weights'], [0.7, 0.5, -0.2], rtol=1e-6)
    else:
        images = np.arange(BATCH)
        best = softmax(z)[:, images, labels].argmax(axis=0)
        target = z[best, images]
        np.testing.assert_allclose(terms['teacher_weights'], np.bincount(best, minlength=3) / BATCH)
    divergences = [kl_divergence(target, logits, 2.0) for logits in z]
    entropies = [cross_entropy(logits, labels) for logits in z]
    np.testing.assert_allclose(terms['distillation'], divergences, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(terms['branch_cross_entropy'], entropies, rtol=1e-5)
    assert float(terms['distill_weight']) == 1
    assert float(loss) == pytest.approx(sum(entropies) + sum(divergences), rel=1e-4)


def test_min_logit_is_the_surest_of_the_true_class():
    """And of a target distribution, the most probable class counts as the true one."""
    logits, labels = random_outputs(3).logits, random_labels()
    target = np.asarray(kdcl.min_logit_target(logits, labels))
    images = np.arange(BATCH)
    np.testing.assert_array_equal(target[images, labels], 0)
    assert (softmax(target)[images, labels] >= softmax(logits)[:, images, labels] - 1e-6).all()
    smoothed = 0.6 * np.eye(CLASSES)[labels] + 0.4 * np.eye(CLASSES)[(labels + 1) % CLASSES]
    np.testing.assert_array_equal(kdcl.min_logit_target(logits, smoothed), target)


@pytest.mark.parametrize('num_members', [2, 3])
@pytest.mark.parametrize('scale', [1, 6])
def test_linear_weights_against_a_fine_grid(num_members, scale):
    rng = np.random.default_rng(num_members)
    logits = scale * rng.normal(size=(num_members, 40, CLASSES))
    labels = rng.integers(0, CLASSES, 40)
    # Sure of the true class now and then, so that some of the weights end up inside.
    logits[rng.integers(0, num_members, 40), np.arange(40), labels] += 2 * scale
    weights = np.asarray(jax.jit(kdcl.linear_weights)(logits, labels), np.float64)
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)

    steps = np.linspace(0, 1, 4001 if num_members == 2 else 161)
    grid = np.stack(np.meshgrid(*[steps] * (num_members - 1)), axis=-1).reshape(-1, num_members - 1)
    grid = grid[grid.sum(axis=1) <= 1 + 1e-9]
    grid = np.concatenate([1 - grid.sum(axis=1, keepdims=True), grid], axis=1)
    inside = 0
    for image, label in enumerate(labels):
        own = entropy_of_mixtures(logits[:, image], label, weights[image][None])[0]
        entropies = entropy_of_mixtures(logits[:, image], label, grid)
        assert own <= entropies.min() + 1e-5 * num_members
        inside += grid[entropies.argmin()].max() < 0.99
    assert inside > 3


def test_linear_is_at_the_optimum_of_many_sure_members():
    """The conditions of optimality (Karush, Kuhn, Tucker), with logits of the size of trained
    networks': no member could still lower the cross-entropy by more than the barriers allow."""
    rng = np.random.default_rng(0)
    logits = 12 * rng.normal(size=(6, 64, 100)).astype(np.float32)
    labels = rng.integers(0, 100, 64)
    logits[:3, np.arange(64), labels] += 12
    weights = np.asarray(jax.jit(kdcl.linear_weights)(logits, labels), np.float64)
    residual = softmax(np.einsum('bk,kbc->bc', weights, logits)) - np.eye(100)[labels]
    derivatives = np.einsum('kbc,bc->bk', logits, residual)
    # The duality gap of a convex function over the simplex bounds its distance from the minimum.
    gap = (weights * derivatives).sum(axis=1) - derivatives.min(axis=1)
    assert gap.max() < 2 * 6e-5


def test_linear_of_target_probabilities():
    logits, labels = random_outputs(3).logits, random_labels()
    of_integers = kdcl.linear_weights(logits, labels)
    of_probabilities = kdcl.linear_weights(logits, np.eye(CLASSES)[labels])
    np.testing.assert_allclose(of_integers, of_probabilities, atol=1e-6)


@pytest.mark.parametrize('teacher', kdcl.TEACHERS)
def test_the_teacher_is_a_constant(teacher):
    """At T = 2 the gradient of the divergence is 2 (q_i - p) / B, and that of no other member."""
    method, outputs = create('kdcl', teacher=teacher), random_outputs(2)
    state = {'weights': np.array([0.3, 0.7], np.float32)}
    context = methods.Context(jnp.asarray(random_labels()), method_state=state)

    @jax.jit
    def gradient_of_second(logits):
        def divergence(logits):
            return method.loss(outputs.replace(logits=logits), context)[1]['distillation'][1]

        return jax.grad(divergence)(logits)

    gradient = gradient_of_second(jnp.asarray(outputs.logits))
    np.testing.assert_array_equal(gradient[0], 0)
    assert float(jnp.abs(gradient[1]).max()) > 1e-2
    if teacher == 'min_logit':
        target = softmax(min_logit_by_loops(outputs.logits, random_labels()) / 2)
        expected = 2 * (softmax(outputs.logits[1] / 2) - target) / BATCH
        np.testing.assert_allclose(gradient[1], expected, atol=1e-6)


def test_who_gets_gradient_in_a_network():
    def distillation(method, outputs, context):
        return method.loss(outputs, context)[1]['distillation'][0]

    norms = gradient_norms(distillation, 'kdcl', 2)
    assert norms['trunk'] == norms['head'][1] == 0
    assert norms['head'][0] > 0


@pytest.mark.parametrize('teacher', kdcl.TEACHERS)
def test_padding_is_left_out(teacher):
    outputs, labels, method = random_outputs(2), random_labels(), create('kdcl', teacher=teacher)
    state = {'weights': np.array([0.3, 0.7], np.float32)}
    padded = outputs.replace(logits=outputs.logits.copy())
    padded.logits[:, 2] = 1e30
    loss, _ = method.loss(
        padded, methods.Context(labels, np.array([1, 1, 0, 1]), 1.0, None, None, state)
    )
    whole = outputs.replace(logits=np.delete(outputs.logits, 2, axis=1))
    context = methods.Context(np.delete(labels, 2), method_state=state)
    assert float(loss) == pytest.approx(float(method.loss(whole, context)[0]), rel=1e-5)


def test_general_weights_from_held_out_images():
    """Two batches, one with padding, against the covariance of all errors written out."""
    method = create('kdcl', teacher='general', **{'model.num_branches': 3})
    rng = np.random.default_rng(1)
    logits, labels = 3 * rng.normal(size=(3, 10, CLASSES)), rng.integers(0, CLASSES, 10)
    second = np.concatenate([logits[:, 6:], np.full((3, 2, CLASSES), np.nan)], axis=1)
    sums = [
        method.held_out_sums(logits[:, :6], labels[:6], np.ones(6)),
        method.held_out_sums(
            second, np.concatenate([labels[6:], [0, 0]]), np.array([1, 1, 1, 1, 0, 0])
        ),
    ]
    state = method.refresh(jax.tree.map(lambda *values: sum(values), *sums))

    errors = (softmax(logits) - np.eye(CLASSES)[labels]).reshape(3, -1)
    covariance = errors @ errors.T / 10
    covariance += kdcl.RIDGE * np.trace(covariance) / 3 * np.eye(3)
    inverse = np.linalg.inv(covariance)
    np.testing.assert_allclose(state['weights'], inverse.sum(axis=1) / inverse.sum(), rtol=1e-4)
    assert state['weights'].dtype == method.initial_state()['weights'].dtype
    np.testing.assert_allclose(method.initial_state()['weights'], 1 / 3, rtol=1e-6)


def test_general_weights_of_members_alike_and_faultless():
    np.testing.assert_allclose(kdcl.general_weights(np.ones((3, 3))), 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(kdcl.general_weights(np.zeros((2, 2))), 1 / 2)
    # Independent errors: in inverse proportion to their size.
    weights = kdcl.general_weights(np.diag([1.0, 3.0]))
    np.testing.assert_allclose(weights, [3.02 / 4.04, 1.02 / 4.04], rtol=1e-6)


@pytest.mark.parametrize('own_augmentation', [True, False])
def test_every_member_has_its_own_crops(own_augmentation):
    setting = Setting(**{'method.name': 'kdcl', 'method.own_augmentation': own_augmentation})
    mesh = parallel.make_mesh(jax.devices()[:1])
    batch = setting.batches.batch(0)
    views = jax.jit(
        jax.shard_map(
            lambda images, labels: (
                inputs.training_inputs(
                    setting.recipe, mesh, jax.random.key(0), images, labels
                ).images
            ),
            mesh=mesh,
            in_specs=parallel.BATCH,
            out_specs=P(None, parallel.DATA_AXIS) if own_augmentation else parallel.BATCH,
        )
    )(batch['image'], batch['label'])
    if not own_augmentation:
        assert views.shape == (8, 8, 8, 3)
        return
    assert views.shape == (2, 8, 8, 8, 3)
    same = (np.asarray(views[0]) == np.asarray(views[1])).all(axis=(1, 2, 3))
    assert same.sum() <= 2


@pytest.fixture(scope='module')
def small():
    return functools.partial(
        make_config,
        **{
            'method.name': 'kdcl',
            'data.generated_examples': 80,
            'data.validation_fraction': 0.2,
            'train.epochs': 2,
        },
    )


def test_general_needs_held_out_images(small):
    config = small(**{'method.teacher': 'general', 'data.validation_fraction': 0.0})
    with pytest.raises(ConfigError, match=r'data.validation_fraction=0.0 is not allowed'):
        config_lib.validate(config, 4)
    config_lib.validate(small(**{'data.validation_fraction': 0.0}), 4)


def test_what_is_refused():
    with pytest.raises(ConfigError, match=r"method.teacher='best' is not allowed: .*'min_logit'"):
        create('kdcl', teacher='best')
    with pytest.raises(ConfigError, match=r'model.share_stages=1 is not allowed'):
        create('kdcl', **{'model.share_stages': 1})


def test_unlike_members_and_the_linear_teacher_train(tmp_path, small):
    config = small(
        **{
            'method.teacher': 'linear',
            'model.num_branches': None,
            'model.members': 'resnet8,wrn10_1',
            'data.generated_examples': 40,
            'train.epochs': 1,
        }
    )
    result = train.train_and_evaluate(config, tmp_path)
    assert result['branch_network'] == ['resnet8', 'wrn10_1']
    assert np.isfinite(result['branch_nll']).all()


def test_general_trains_and_resumes_bit_for_bit(tmp_path, small, monkeypatch):
    """Stopped within the second epoch: the weights of that epoch are those it began with."""
    config = small(**{'method.teacher': 'general', 'train.log_every': 3})
    result = train.train_and_evaluate(config, tmp_path / 'whole')
    assert 'validation_deployed_top1' in result
    state, steps = final_state(tmp_path / 'whole')
    assert steps == 14
    weights = state['method.weights']
    assert weights.sum() == pytest.approx(1, rel=1e-5)
    assert abs(weights[0] - 0.5) > 1e-4

    update = train.Progress.update

    def update_and_stop(self, step):
        update(self, step)
        if step == 10:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(train.Progress, 'update', update_and_stop)
        with pytest.raises(Interrupted):
            train.train_and_evaluate(config, tmp_path / 'resumed')
    assert final_state(tmp_path / 'resumed')[1] == 10
    train.train_and_evaluate(config, tmp_path / 'resumed')
    assert_same_run(tmp_path / 'resumed', tmp_path / 'whole')
