"""ONE's ablations on the method's own interface; its loss is in test_losses.py."""

import jax
import numpy as np
import pytest
from method_fixtures import create, gradient_norms, random_labels, random_outputs

from one_jax import losses, methods
from one_jax.errors import ConfigError


def distillation(method, outputs, context):
    return method.loss(outputs, context)[1]['distillation'].sum()


def branch_cross_entropy(method, outputs, context):
    return method.loss(outputs, context)[1]['branch_cross_entropy'][1]


def teacher_cross_entropy(method, outputs, context):
    return method.loss(outputs, context)[1]['teacher_cross_entropy']


def test_who_gets_gradient_from_which_term():
    norms = gradient_norms(branch_cross_entropy, 'one', 3)
    assert norms['trunk'] > 0
    assert norms['head'][1] > 0
    assert norms['head'][0] == norms['head'][2] == 0
    assert norms['aggregator/linear'] == norms['aggregator/bn'] == 0

    norms = gradient_norms(teacher_cross_entropy, 'one', 3)
    assert min(norms['trunk'], *norms['head'], norms['aggregator/linear']) > 0

    norms = gradient_norms(distillation, 'one', 3)
    assert min(norms['trunk'], *norms['head']) > 0
    assert norms['aggregator/linear'] == norms['aggregator/bn'] == 0
    # The ablation: the divergence pulls the gate too.
    norms = gradient_norms(distillation, 'one', 3, detach_teacher=False)
    assert norms['aggregator/linear'] > 0


def test_uniform_gate_is_the_mean():
    outputs = random_outputs()
    mean = create('one', teacher='mean').make_aggregator()
    aggregate = mean.apply({}, None, outputs, True)
    uniform = np.full((outputs.logits.shape[1], 3), 1 / 3)
    np.testing.assert_allclose(
        aggregate.teacher_logits,
        losses.ensemble_logits(outputs.logits, uniform),
        rtol=1e-5,
        atol=1e-6,
    )
    assert aggregate.weights is None
    outputs = outputs.replace(teacher_logits=aggregate.teacher_logits)
    _, terms = create('one', teacher='mean').loss(outputs, methods.Context(random_labels()))
    assert 'gate_weights' not in terms


@pytest.mark.parametrize('num_branches', range(2, 9))
def test_any_number_of_branches(num_branches):
    method = create('one', **{'model.num_branches': num_branches})
    outputs = random_outputs(num_branches)
    outputs = outputs.replace(teacher_logits=outputs.logits.mean(axis=0))
    _, terms = method.loss(outputs, methods.Context(random_labels()))
    assert terms['distillation'].shape == terms['branch_cross_entropy'].shape == (num_branches,)


def test_one_branch_is_the_plain_network():
    one, plain = create('one', **{'model.num_branches': 1}), create('plain')
    assert one.make_aggregator is None
    outputs, context = random_outputs(1), methods.Context(random_labels())
    assert float(one.loss(outputs, context)[0]) == float(plain.loss(outputs, context)[0])


def test_no_distillation_and_no_ramp():
    outputs = random_outputs()
    outputs = outputs.replace(teacher_logits=outputs.logits.mean(axis=0))
    start = methods.Context(random_labels(), progress=0.0)
    end = start.replace(progress=1.0)

    def value(context, **fields):
        return float(jax.device_get(create('one', **fields).loss(outputs, context)[0]))

    assert value(start) < value(end)
    assert value(start, rampup_fraction=0.0) == pytest.approx(value(end))
    assert value(start, distill_weight=0.0) == pytest.approx(value(end, distill_weight=0.0))
    assert value(end, distill_weight=0.0) < value(end)


def test_a_teacher_there_is_not_is_refused():
    with pytest.raises(ConfigError, match=r"method.teacher='max' is not allowed: .*'gate'"):
        create('one', teacher='max')
