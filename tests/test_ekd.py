"""EKD as reconstructed: terms, pairings, coupling, identities."""

import itertools

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
)

from one_jax import methods
from one_jax.errors import ConfigError

A, B, RHO, T = 0.4, 0.7, 1.5, 5.0
FIELDS = {
    'cross_entropy_weight': A,
    'distill_weight': B,
    'squared_error_weight': RHO,
    'temperature': T,
}


def frozen_logits(num_teachers, seed=7):
    """Logits of the teachers, [N, B, C]."""
    shape = num_teachers, BATCH, CLASSES
    return 3 * np.random.default_rng(seed).normal(size=shape)


def settings(num_branches, num_teachers, **fields):
    teachers = ','.join(f'teacher{index}' for index in range(num_teachers))
    return {'teachers': teachers, 'model.num_branches': num_branches, **fields}


def run(outputs, context, **fields):
    """Loss and terms, the numbers of branches and teachers being those of the arguments."""
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
    ('pairing', 'num_teachers'),
    [('one_to_one', 3), ('all_to_all', 2), ('all_to_all', 4), ('ensemble_to_all', 2)],
)
def test_terms_are_those_of_the_formula(pairing, num_teachers):
    outputs, labels, teachers = random_outputs(3), random_labels(), frozen_logits(num_teachers)
    context = methods.Context(labels, teacher_logits=teachers)
    loss, terms = run(outputs, context, pairing=pairing, **FIELDS)
    logits, mean, mean_teacher = outputs.logits, outputs.logits.mean(0), teachers.mean(0)
    of_branch = pairs(pairing, teachers, 3)
    expected = {
        'branch_cross_entropy': [cross_entropy(z, labels) for z in logits],
        'distillation': [
            np.mean([divergence(t, z) for t in own])
            for own, z in zip(of_branch, logits, strict=True)
        ],
        'squared_error': [
            np.mean([squared_error(t, z) for t in own])
            for own, z in zip(of_branch, logits, strict=True)
        ],
        'ensemble_cross_entropy': cross_entropy(mean, labels),
        'ensemble_distillation': divergence(mean_teacher, mean),
        'ensemble_squared_error': squared_error(mean_teacher, mean),
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-5, err_msg=name)
    total = A * expected['ensemble_cross_entropy']
    total += B * (expected['ensemble_distillation'] + RHO * expected['ensemble_squared_error'])
    for branch in range(3):
        total += A * expected['branch_cross_entropy'][branch]
        total += B * (expected['distillation'][branch] + RHO * expected['squared_error'][branch])
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


@pytest.mark.parametrize('pairing', ['one_to_one', 'all_to_all', 'ensemble_to_all'])
def test_one_branch_and_one_teacher_are_twice_the_single_network(pairing):
    outputs, labels, teachers = random_outputs(1), random_labels(), frozen_logits(1)
    context = methods.Context(labels, teacher_logits=teachers)
    fields = {'model.share_stages': 0, 'pairing': pairing, **FIELDS}
    loss, _ = run(outputs, context, **fields)
    target, logits = teachers[0], outputs.logits[0]
    single = A * cross_entropy(logits, labels)
    single += B * (divergence(target, logits) + RHO * squared_error(target, logits))
    assert loss == pytest.approx(2 * single, rel=1e-5)
    assert create('ekd', **settings(1, 1, **fields)).deployed == 'branch 0'


def test_with_equal_teachers_every_pairing_is_the_same():
    """And with different ones no two are."""
    outputs, labels, teachers = random_outputs(3), random_labels(), frozen_logits(3)
    equal = np.broadcast_to(teachers[:1], teachers.shape)

    def values(logits):
        context = methods.Context(labels, teacher_logits=logits)
        pairings = ('one_to_one', 'all_to_all', 'ensemble_to_all')
        return [float(run(outputs, context, pairing=pairing)[0]) for pairing in pairings]

    np.testing.assert_allclose(values(equal), values(equal)[0], rtol=1e-5)
    for first, second in itertools.combinations(values(teachers), 2):
        assert abs(first - second) > 1e-3


def test_padding_counts_for_nothing():
    outputs, labels, teachers = random_outputs(3), random_labels(), frozen_logits(3)
    mask = np.array([0, 1, 1, 1])
    padded = outputs.logits.copy()
    padded[:, 0] = np.nan
    context = methods.Context(labels, mask=mask, teacher_logits=teachers)
    loss, _ = run(outputs.replace(logits=padded), context)
    context = methods.Context(labels[1:], teacher_logits=teachers[:, 1:])
    expected, _ = run(outputs.replace(logits=outputs.logits[:, 1:]), context)
    assert loss == pytest.approx(expected, rel=1e-5)


def term(name, branch=None):
    def scalar(method, outputs, context):
        value = method.loss(outputs, context)[1][name]
        return value if branch is None else value[branch]

    return scalar


@pytest.mark.parametrize('name', ['branch_cross_entropy', 'distillation', 'squared_error'])
def test_a_branchs_own_terms_reach_it_and_the_trunk(name):
    norms = gradient_norms(term(name, 1), 'ekd', 3, frozen_logits(3), teachers='x,y,z')
    assert norms['trunk'] > 0
    assert norms['head'][1] > 0
    assert norms['head'][0] == norms['head'][2] == 0


@pytest.mark.parametrize(
    'name', ['ensemble_cross_entropy', 'ensemble_distillation', 'ensemble_squared_error']
)
def test_the_ensembles_terms_reach_all_branches(name):
    norms = gradient_norms(term(name), 'ekd', 3, frozen_logits(3), teachers='x,y,z')
    assert min(norms['trunk'], *norms['head']) > 0


@pytest.mark.parametrize('pairing', ['one_to_one', 'all_to_all', 'ensemble_to_all'])
def test_no_gradient_goes_to_the_teachers(pairing):
    method = create('ekd', **settings(3, 3, pairing=pairing))
    outputs, labels = random_outputs(3), random_labels()

    def loss(logits, teachers):
        context = methods.Context(labels, teacher_logits=teachers)
        return method.loss(outputs.replace(logits=logits), context)[0]

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(outputs.logits, frozen_logits(3))
    assert np.abs(gradients[0]).min() > 0
    assert not np.any(gradients[1])


@pytest.mark.parametrize('num_teachers', [1, 2, 4])
def test_one_to_one_wants_a_teacher_for_every_branch(num_teachers):
    with pytest.raises(ConfigError) as raised:
        create('ekd', **settings(3, num_teachers))
    assert raised.value.field == 'method.teachers'
    assert '3 folders, one for each branch' in str(raised.value)
    assert f'set model.num_branches={num_teachers}' in str(raised.value)
    create('ekd', **settings(3, num_teachers, pairing='all_to_all'))


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        ('pairing', 'some_to_some'),
        ('cross_entropy_weight', -0.1),
        ('squared_error_weight', float('inf')),
        ('teachers', ''),
    ],
)
def test_fields_out_of_range_are_refused(field, value):
    with pytest.raises(ConfigError) as raised:
        create('ekd', **{**settings(3, 3), field: value})
    assert raised.value.field == f'method.{field}'
