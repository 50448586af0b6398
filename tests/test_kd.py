"""Distillation from frozen teachers into one network: KD and MEAL V2."""

import jax
import numpy as np
import pytest
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

from one_jax import methods
from one_jax.errors import ConfigError


def frozen_logits(num_teachers, seed=7):
    """Logits of the teachers, [N, B, C]."""
    shape = num_teachers, BATCH, CLASSES
    return 3 * np.random.default_rng(seed).normal(size=shape)


def folders(number):
    return ','.join(f'teacher{index}' for index in range(number))


def run(name, outputs, context, **fields):
    """Loss and terms of a method with as many teachers as `context` has."""
    method = create(name, teachers=folders(len(context.teacher_logits)), **fields)
    return jax.device_get(jax.jit(method.loss)(outputs, context))


@pytest.mark.parametrize('num_teachers', [1, 3])
def test_kd_is_cross_entropy_and_divergence_from_the_mean_logits(num_teachers):
    outputs, labels = random_outputs(1), random_labels()
    teachers = frozen_logits(num_teachers)
    context = methods.Context(labels, teacher_logits=teachers)
    loss, terms = run('kd', outputs, context, temperature=3.0, distill_weight=0.7)
    expected_ce = cross_entropy(outputs.logits[0], labels)
    expected_kl = kl_divergence(sum(teachers) / num_teachers, outputs.logits[0], 3.0)
    np.testing.assert_allclose(terms['branch_cross_entropy'], [expected_ce], rtol=1e-5)
    np.testing.assert_allclose(terms['distillation'], [expected_kl], rtol=1e-5)
    assert loss == pytest.approx(expected_ce + 0.7 * expected_kl, rel=1e-5)


def test_kd_defaults():
    """T = 4 and alpha = 1 from the first step on."""
    outputs, teachers = random_outputs(1), frozen_logits(1)
    context = methods.Context(random_labels(), progress=0.0, teacher_logits=teachers)
    loss, terms = run('kd', outputs, context)
    assert terms['distill_weight'] == 1
    expected = kl_divergence(teachers[0], outputs.logits[0], 4.0)
    np.testing.assert_allclose(terms['distillation'], [expected], rtol=1e-5)
    np.testing.assert_allclose(loss, expected + terms['branch_cross_entropy'].sum(), rtol=1e-5)


def test_kd_ramp():
    context = methods.Context(random_labels(), progress=0.25, teacher_logits=frozen_logits(1))
    _, terms = run('kd', random_outputs(1), context, rampup_fraction=0.5, distill_weight=2.0)
    assert terms['distill_weight'] == pytest.approx(2 * np.exp(-5 * 0.5**2), rel=1e-5)


@pytest.mark.parametrize('num_teachers', [1, 3])
def test_meal_is_the_divergence_from_the_mean_probabilities(num_teachers):
    outputs, teachers = random_outputs(1), frozen_logits(num_teachers)
    context = methods.Context(random_labels(), teacher_logits=teachers)
    loss, terms = run('meal', outputs, context)
    target, own = softmax(teachers).mean(axis=0), softmax(outputs.logits[0])
    expected = (target * np.log(target / own)).sum(axis=-1).mean()
    np.testing.assert_allclose(terms['distillation'], [expected], rtol=1e-5)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert terms.keys() == {'distillation'}


def test_meal_takes_no_notice_of_the_labels():
    outputs, teachers = random_outputs(1), frozen_logits(2)
    values = [
        run('meal', outputs, methods.Context(random_labels(seed), teacher_logits=teachers))[0]
        for seed in (0, 1)
    ]
    assert values[0] == values[1]
    assert not np.array_equal(random_labels(0), random_labels(1))


@pytest.mark.parametrize('name', ['kd', 'meal'])
def test_padding_counts_for_nothing(name):
    outputs, labels, teachers = random_outputs(1), random_labels(), frozen_logits(2)
    mask = np.array([1, 1, 0, 1])
    padded = teachers.copy()
    padded[:, 2] = np.inf
    context = methods.Context(labels, mask=mask, teacher_logits=padded)
    loss, _ = run(name, outputs, context)
    kept = np.flatnonzero(mask)
    context = methods.Context(labels[kept], teacher_logits=teachers[:, kept])
    expected, _ = run(name, outputs.replace(logits=outputs.logits[:, kept]), context)
    assert loss == pytest.approx(expected, rel=1e-6)


def test_labels_may_be_probabilities():
    outputs, labels, teachers = random_outputs(1), random_labels(), frozen_logits(1)
    hard = run('kd', outputs, methods.Context(labels, teacher_logits=teachers))[0]
    one_hot = np.eye(CLASSES)[labels]
    soft = run('kd', outputs, methods.Context(one_hot, teacher_logits=teachers))[0]
    assert soft == pytest.approx(hard, rel=1e-6)


@pytest.mark.parametrize(
    ('name', 'term'), [('kd', 'branch_cross_entropy'), ('kd', 'distillation'), ('meal', None)]
)
def test_every_term_teaches_the_whole_network(name, term):
    def scalar(method, outputs, context):
        loss, terms = method.loss(outputs, context)
        return loss if term is None else terms[term].sum()

    norms = gradient_norms(scalar, name, 1, frozen_logits(2), teachers=folders(2))
    assert norms['trunk'] > 0
    assert norms['head'][0] > 0


@pytest.mark.parametrize('name', ['kd', 'meal'])
def test_a_student_without_teachers_is_refused(name):
    with pytest.raises(ConfigError, match=r"method.teachers='' is not allowed: 1 or more folders"):
        create(name)
    with pytest.raises(ConfigError, match=r'model.num_branches=2 is not allowed: exactly 1'):
        create(name, teachers='teacher', **{'model.num_branches': 2})
