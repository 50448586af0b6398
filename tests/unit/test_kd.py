"""Distillation from frozen teachers into one network: KD and MEAL V2."""

import jax
import numpy as np
import pytest
from method_fixtures import (
    create,
    cross_entropy,
    folders,
    frozen_logits,
    kl_divergence,
    random_labels,
    random_outputs,
    softmax,
)

from one_jax import methods
from one_jax.errors import ConfigError


def run(name, outputs, context, **fields):
    """Loss and terms of a method with as many teachers as `context` has."""
    method = create(name, teachers=folders(len(context.teacher_logits)), **fields)
    return jax.device_get(jax.jit(method.loss)(outputs, context))


@pytest.mark.parametrize('num_teachers', [1, 3])
def test_kd_loss_is_cross_entropy_and_divergence_from_the_mean_logits(num_teachers):
    outputs, labels = random_outputs(1), random_labels()
    teachers = frozen_logits(num_teachers)
    context = methods.Context(labels, teacher_logits=teachers)
    weights = {'cross_entropy_weight': 0.1, 'distill_weight': 0.7}
    loss, terms = run('kd', outputs, context, temperature=3.0, **weights)
    expected_ce = cross_entropy(outputs.logits[0], labels)
    expected_kl = kl_divergence(sum(teachers) / num_teachers, outputs.logits[0], 3.0)
    np.testing.assert_allclose(terms['branch_cross_entropy'], [expected_ce], rtol=1e-5)
    np.testing.assert_allclose(terms['distillation'], [expected_kl], rtol=1e-5)
    assert loss == pytest.approx(0.1 * expected_ce + 0.7 * expected_kl, rel=1e-5)


def test_kd_defaults_are_temperature_4_weights_of_1_and_no_ramp():
    outputs, teachers = random_outputs(1), frozen_logits(1)
    context = methods.Context(random_labels(), progress=0.0, teacher_logits=teachers)
    loss, terms = run('kd', outputs, context)
    assert terms['distill_weight'] == 1
    expected = kl_divergence(teachers[0], outputs.logits[0], 4.0)
    np.testing.assert_allclose(terms['distillation'], [expected], rtol=1e-5)
    np.testing.assert_allclose(loss, expected + terms['branch_cross_entropy'].sum(), rtol=1e-5)


def test_kd_weight_below_0_is_an_error():
    with pytest.raises(ConfigError, match=r'method.cross_entropy_weight=-1.0 .* at least 0'):
        create('kd', teachers='a', cross_entropy_weight=-1.0)


def test_kd_ramp_scales_the_weight():
    context = methods.Context(random_labels(), progress=0.25, teacher_logits=frozen_logits(1))
    _, terms = run('kd', random_outputs(1), context, rampup_fraction=0.5, distill_weight=2.0)
    assert terms['distill_weight'] == pytest.approx(2 * np.exp(-5 * 0.5**2), rel=1e-5)


@pytest.mark.parametrize('num_teachers', [1, 3])
def test_meal_loss_is_the_divergence_from_the_mean_probabilities(num_teachers):
    outputs, teachers = random_outputs(1), frozen_logits(num_teachers)
    context = methods.Context(random_labels(), teacher_logits=teachers)
    loss, terms = run('meal', outputs, context)
    mean = sum(softmax(teacher) for teacher in teachers) / num_teachers
    expected = kl_divergence(np.log(mean), outputs.logits[0], 1.0)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert terms.keys() == {'distillation'}
    # The labels play no part.
    other = methods.Context(random_labels(1), teacher_logits=teachers)
    assert run('meal', outputs, other)[0] == loss


@pytest.mark.parametrize('name', ['kd', 'meal'])
def test_method_without_teachers_is_an_error(name):
    with pytest.raises(ConfigError, match=r"method.teachers='' is not allowed: 1 to 64 folders"):
        create(name)
    with pytest.raises(ConfigError, match=r'model.num_branches=2 is not allowed: exactly 1'):
        create(name, teachers='teacher', **{'model.num_branches': 2})
    assert create(name, teachers='a,b').teacher_folders == ('a', 'b')
