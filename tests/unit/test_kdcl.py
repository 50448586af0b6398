"""KDCL: its four teachers against closed forms and an independent optimiser, its own crops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_fixtures import (
    BATCH,
    CLASSES,
    create,
    cross_entropy,
    kl_divergence,
    random_labels,
    random_outputs,
    softmax,
    with_logits,
)

from one_jax import methods
from one_jax.errors import ConfigError
from one_jax.methods import kdcl


def min_logit_by_loops(logits, labels):
    target = np.zeros(logits.shape[1:])
    for image, label in enumerate(labels):
        for k in range(CLASSES):
            target[image, k] = min(z[image, k] - z[image, label] for z in logits)
    return target


@pytest.mark.parametrize('teacher', ['naive', 'min_logit', 'general'])
def test_loss_equals_the_formula(teacher):
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


def test_min_logit_target_gives_the_true_class_the_highest_probability():
    """For a target distribution, the most probable class counts as the true one."""
    logits, labels = random_outputs(3).logits, random_labels()
    target = np.asarray(kdcl.min_logit_target(logits, labels))
    images = np.arange(BATCH)
    np.testing.assert_array_equal(target[images, labels], 0)
    assert (softmax(target)[images, labels] >= softmax(logits)[:, images, labels] - 1e-6).all()
    smoothed = 0.6 * np.eye(CLASSES)[labels] + 0.4 * np.eye(CLASSES)[(labels + 1) % CLASSES]
    np.testing.assert_array_equal(kdcl.min_logit_target(logits, smoothed), target)


def test_gradient_of_the_divergence_pulls_to_a_constant_teacher():
    """At T = 2 it is 2 (q_i - p) / B, and 0 for the other network."""
    method, outputs = create('kdcl'), random_outputs(2)
    context = methods.Context(jnp.asarray(random_labels()))

    def divergence(logits):
        return method.loss(with_logits(outputs, logits), context)[1]['distillation'][1]

    gradient = jax.jit(jax.grad(divergence))(jnp.asarray(outputs.logits))
    np.testing.assert_array_equal(gradient[0], 0)
    target = softmax(min_logit_by_loops(outputs.logits, random_labels()) / 2)
    expected = 2 * (softmax(outputs.logits[1] / 2) - target) / BATCH
    np.testing.assert_allclose(gradient[1], expected, atol=1e-6)


def entropies_of_mixtures(logits, labels, weights):
    """For logits [K, N, C] and weights [N, K], by NumPy: the cross-entropies [N], and their
    derivatives by the weights [N, K]."""
    mixture = np.einsum('nk,knc->nc', weights, logits)
    top = mixture.max(axis=1)
    normaliser = top + np.log(np.exp(mixture - top[:, None]).sum(axis=1))
    residual = softmax(mixture) - np.eye(mixture.shape[1])[labels]
    true = mixture[np.arange(len(labels)), labels]
    return normaliser - true, np.einsum('knc,nc->nk', logits, residual)


def smallest_entropies(logits, labels):
    """The minimum over convex weights, [N]: pairwise Frank-Wolfe steps with exact line search.

    The duality gap, a bound on the distance from the minimum, proves the result.
    """
    images = np.arange(len(labels))
    weights = np.full((len(labels), len(logits)), 1 / len(logits))
    for _ in range(300):
        _, slopes = entropies_of_mixtures(logits, labels, weights)
        best = slopes.argmin(axis=1)
        worst = np.where(weights > 0, slopes, -np.inf).argmax(axis=1)
        low, high = np.zeros(len(labels)), weights[images, worst]

        def moved(step, weights=weights, best=best, worst=worst):
            changed = weights.copy()
            changed[images, worst] -= step
            changed[images, best] += step
            return changed

        for _ in range(30):
            middle = (low + high) / 2
            _, slopes = entropies_of_mixtures(logits, labels, moved(middle))
            falling = slopes[images, best] < slopes[images, worst]
            low, high = np.where(falling, middle, low), np.where(falling, high, middle)
        weights = np.maximum(moved(np.where(falling, high, low)), 0)
    entropies, slopes = entropies_of_mixtures(logits, labels, weights)
    gap = (weights * slopes).sum(axis=1) - slopes.min(axis=1)
    assert gap.max() < 1e-4
    return entropies


@pytest.mark.parametrize(
    ('num_branches', 'num_classes', 'scale', 'worst', 'usual'),
    [
        (2, 5, 1, 1e-5, 1e-6),
        (2, 100, 3, 1e-4, 1e-5),
        (3, 5, 6, 1e-3, 1e-5),
        (3, 100, 3, 1e-4, 1e-5),
        # Extreme: six confident networks, three of them mostly right.
        (6, 100, 12, 1e-2, 1e-3),
    ],
)
def test_linear_weights_reach_the_smallest_cross_entropy(
    num_branches, num_classes, scale, worst, usual
):
    """Within `worst` nats on all images, and within `usual` on nine of ten."""
    rng = np.random.default_rng(num_branches)
    logits = scale * rng.normal(size=(num_branches, 100, num_classes)).astype(np.float32)
    labels = rng.integers(0, num_classes, 100)
    # Often sure of the true class, so that some optimal weights are inside.
    logits[rng.integers(0, num_branches, 100), np.arange(100), labels] += 2 * scale
    weights = np.asarray(jax.jit(kdcl.linear_weights)(logits, labels), np.float64)
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)
    logits = logits.astype(np.float64)
    excess = entropies_of_mixtures(logits, labels, weights)[0] - smallest_entropies(logits, labels)
    assert excess.min() > -1e-4
    assert excess.max() < worst
    assert np.quantile(excess, 0.9) < usual


def test_linear_weights_of_one_hot_and_extreme_logits():
    logits, labels = random_outputs(3).logits, random_labels()
    of_integers = kdcl.linear_weights(logits, labels)
    of_probabilities = kdcl.linear_weights(logits, np.eye(CLASSES)[labels])
    np.testing.assert_allclose(of_integers, of_probabilities, atol=1e-6)
    for scale in (0.0, 1e4, 1e30):
        weights = np.asarray(kdcl.linear_weights((scale * logits).astype(np.float32), labels))
        assert np.isfinite(weights).all()
        np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)


def test_state_from_validation_is_the_closed_form():
    """Two batches, one with padding, against the covariance of all errors."""
    method = create('kdcl', teacher='general', ridge=0.05, **{'model.num_branches': 3})
    rng = np.random.default_rng(1)
    logits, labels = 3 * rng.normal(size=(3, 10, CLASSES)), rng.integers(0, CLASSES, 10)
    second = np.concatenate([logits[:, 6:], np.full((3, 2, CLASSES), np.nan)], axis=1)
    statistics = [
        method.validation_statistics(logits[:, :6], labels[:6], np.ones(6)),
        method.validation_statistics(
            second, np.concatenate([labels[6:], [0, 0]]), np.array([1, 1, 1, 1, 0, 0])
        ),
    ]
    state = method.state_from_validation(jax.tree.map(lambda *values: sum(values), *statistics))

    errors = (softmax(logits) - np.eye(CLASSES)[labels]).reshape(3, -1)
    covariance = errors @ errors.T / 10
    covariance += 0.05 * np.trace(covariance) / 3 * np.eye(3)
    inverse = np.linalg.inv(covariance)
    np.testing.assert_allclose(state['weights'], inverse.sum(axis=1) / inverse.sum(), rtol=1e-4)
    np.testing.assert_allclose(method.initial_state()['weights'], 1 / 3, rtol=1e-6)


def test_general_weights_of_equal_faultless_and_independent_networks():
    for ridge in (1e-9, 0.01, 1.0):
        np.testing.assert_allclose(kdcl.general_weights(np.ones((3, 3)), ridge), 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(kdcl.general_weights(np.zeros((2, 2)), 0.01), 1 / 2)
    # Independent errors: inversely proportional to their size.
    for ridge in (0.01, 0.5):
        weights = kdcl.general_weights(np.diag([1.0, 3.0]), ridge)
        added = 2 * ridge
        expected = np.array([3 + added, 1 + added]) / (4 + 2 * added)
        np.testing.assert_allclose(weights, expected, rtol=1e-6)
    assert create('kdcl').ridge == 0.01


def test_field_with_a_wrong_value_is_an_error():
    with pytest.raises(ConfigError, match=r"method.teacher='best' is not allowed: .*'min_logit'"):
        create('kdcl', teacher='best')
    for ridge in (0.0, -0.1, 2.0, float('nan')):
        with pytest.raises(ConfigError, match=r'method.ridge=.* is not allowed'):
            create('kdcl', ridge=ridge)
    with pytest.raises(ConfigError, match=r'model.share_stages=1 is not allowed'):
        create('kdcl', **{'model.share_stages': 1})
    assert create('kdcl').augments_branches
    assert not create('kdcl', own_augmentation=False).augments_branches
    assert create('kdcl', teacher='general').uses_validation
