"""EKD as reconstructed: terms, pairings, identities."""

import itertools

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
    with_logits,
)

from one_jax import methods
from one_jax.errors import ConfigError

PAIRINGS = ('one_to_one', 'all_to_all', 'ensemble_to_all')
A, B, RHO, T = 0.4, 0.7, 1.5, 5.0
FIELDS = {
    'cross_entropy_weight': A,
    'distill_weight': B,
    'squared_error_weight': RHO,
    'temperature': T,
}


def settings(num_branches, num_teachers, **fields):
    return {'teachers': folders(num_teachers), 'model.num_branches': num_branches, **fields}


def run(outputs, context, **fields):
    """Loss and terms, with as many branches and teachers as the arguments have."""
    method = create('ekd', **settings(len(outputs.logits), len(context.teacher_logits), **fields))
    return jax.device_get(jax.jit(method.loss)(outputs, context))


def divergence(target, logits, temperature=T):
    return kl_divergence(target, logits, temperature)


def squared_error(target, logits):
    return ((target - logits) ** 2).mean()


def pairs(pairing, teachers, num_branches):
    """The teachers of every branch, by the pairing's definition."""
    if pairing == 'one_to_one':
        return [[teachers[branch]] for branch in range(num_branches)]
    if pairing == 'all_to_all':
        return [list(teachers)] * num_branches
    return [[sum(teachers) / len(teachers)]] * num_branches


@pytest.mark.parametrize(
    ('pairing', 'num_teachers'), [('one_to_one', 3), ('all_to_all', 4), ('ensemble_to_all', 2)]
)
def test_loss_equals_the_formula(pairing, num_teachers):
    outputs, labels, teachers = random_outputs(3), random_labels(), frozen_logits(num_teachers)
    context = methods.Context(labels, teacher_logits=teachers)
    loss, terms = run(outputs, context, pairing=pairing, **FIELDS)
    logits, mean, mean_teacher = outputs.logits, outputs.logits.mean(0), teachers.mean(0)
    of_branch = list(zip(pairs(pairing, teachers, 3), logits, strict=True))
    expected = {
        'branch_cross_entropy': [cross_entropy(z, labels) for z in logits],
        'distillation': [np.mean([divergence(t, z) for t in own]) for own, z in of_branch],
        'squared_error': [np.mean([squared_error(t, z) for t in own]) for own, z in of_branch],
        'ensemble_cross_entropy': cross_entropy(mean, labels),
        'ensemble_distillation': divergence(mean_teacher, mean),
        'ensemble_squared_error': squared_error(mean_teacher, mean),
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-5, err_msg=name)
    sums = {name: np.sum(value) for name, value in expected.items()}
    total = A * (sums['branch_cross_entropy'] + sums['ensemble_cross_entropy'])
    total += B * (sums['distillation'] + sums['ensemble_distillation'])
    total += B * RHO * (sums['squared_error'] + sums['ensemble_squared_error'])
    assert loss == pytest.approx(total, rel=1e-5)


def test_defaults_are_the_reconstructions():
    """a = 0.5, b = 0.6, rho = 1, T = 10, three branches above one shared stage, no ramp."""
    outputs, labels, teachers = random_outputs(3), random_labels(), frozen_logits(3)
    method = create('ekd', teachers='x,y,z')
    assert (method.num_branches, method.share_stages, method.deployed) == (3, 1, 'ensemble')
    context = methods.Context(labels, progress=0.0, teacher_logits=teachers)
    loss = float(jax.jit(method.loss)(outputs, context)[0])
    expected = 0.0
    targets = [*teachers, teachers.mean(0)]
    for target, logits in zip(targets, [*outputs.logits, outputs.logits.mean(0)], strict=True):
        expected += 0.5 * cross_entropy(logits, labels)
        expected += 0.6 * (divergence(target, logits, 10.0) + squared_error(target, logits))
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('pairing', PAIRINGS)
def test_one_branch_and_one_teacher_count_twice(pairing):
    outputs, labels, teachers = random_outputs(1), random_labels(), frozen_logits(1)
    context = methods.Context(labels, teacher_logits=teachers)
    fields = {'model.share_stages': 0, 'pairing': pairing, **FIELDS}
    loss, _ = run(outputs, context, **fields)
    target, logits = teachers[0], outputs.logits[0]
    single = A * cross_entropy(logits, labels)
    single += B * (divergence(target, logits) + RHO * squared_error(target, logits))
    assert loss == pytest.approx(2 * single, rel=1e-5)
    assert create('ekd', **settings(1, 1, **fields)).deployed == 'branch 0'


def test_pairings_differ_unless_the_teachers_are_equal():
    outputs, labels, teachers = random_outputs(3), random_labels(), frozen_logits(3)
    equal = np.broadcast_to(teachers[:1], teachers.shape)

    def values(logits):
        context = methods.Context(labels, teacher_logits=logits)
        return [float(run(outputs, context, pairing=pairing)[0]) for pairing in PAIRINGS]

    np.testing.assert_allclose(values(equal), values(equal)[0], rtol=1e-5)
    for first, second in itertools.combinations(values(teachers), 2):
        assert abs(first - second) > 1e-3


def test_loss_sends_no_gradient_to_the_teachers():
    method = create('ekd', **settings(3, 3))
    outputs, labels = random_outputs(3), random_labels()

    def loss(logits, teachers):
        context = methods.Context(labels, teacher_logits=teachers)
        return method.loss(with_logits(outputs, logits), context)[0]

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(outputs.logits, frozen_logits(3))
    assert np.abs(gradients[0]).min() > 0
    assert not np.any(gradients[1])


def test_one_to_one_without_a_teacher_for_every_branch_is_an_error():
    with pytest.raises(ConfigError) as raised:
        create('ekd', **settings(3, 2))
    assert raised.value.field == 'method.teachers'
    assert '3 folders, one for each branch' in str(raised.value)
    assert 'set model.num_branches=2' in str(raised.value)
    create('ekd', **settings(3, 2, pairing='all_to_all'))


@pytest.mark.parametrize(
    ('field', 'value'),
    [('pairing', 'some_to_some'), ('squared_error_weight', float('inf')), ('teachers', '')],
)
def test_field_with_a_wrong_value_is_an_error(field, value):
    with pytest.raises(ConfigError) as raised:
        create('ekd', **{**settings(3, 3), field: value})
    assert raised.value.field == f'method.{field}'
