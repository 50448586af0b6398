"""ONE's ablations; the loss itself is in test_losses.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_fixtures import create, random_labels, random_outputs, softmax

from one_jax import losses, methods
from one_jax.errors import ConfigError


def test_mean_teacher_equals_a_uniform_gate():
    outputs = random_outputs()
    mean = create('one', teacher='mean').make_aggregator()
    aggregate = mean.apply({}, None, outputs.heads, True)
    uniform = np.full((outputs.logits.shape[1], 3), 1 / 3)
    expected = losses.ensemble_logits(outputs.logits, uniform)
    np.testing.assert_allclose(aggregate.teacher_logits, expected, rtol=1e-5, atol=1e-6)
    outputs = outputs.replace(aggregate=aggregate)
    _, terms = create('one', teacher='mean').loss(outputs, methods.Context(random_labels()))
    assert 'gate_weights' not in terms


def test_one_branch_is_the_plain_network():
    one, plain = create('one', **{'model.num_branches': 1}), create('plain')
    assert one.make_aggregator is None
    outputs, context = random_outputs(1), methods.Context(random_labels())
    assert float(one.loss(outputs, context)[0]) == float(plain.loss(outputs, context)[0])


def test_distill_weight_and_ramp_scale_the_divergence():
    outputs = random_outputs()
    outputs = random_outputs(teacher_logits=outputs.logits.mean(axis=0))
    start = methods.Context(random_labels(), progress=0.0)
    end = start.replace(progress=1.0)

    def value(context, **fields):
        return float(create('one', **fields).loss(outputs, context)[0])

    assert value(start) < value(end)
    assert value(start, rampup_fraction=0.0) == pytest.approx(value(end))
    assert value(start, distill_weight=0.0) == pytest.approx(value(end, distill_weight=0.0))
    assert value(end, distill_weight=0.0) < value(end)


def test_target_epsilon_is_added_to_the_teachers_probabilities():
    """T^2 sum of (q + e) (log(q + e) - log p), without a normalisation of q + e."""
    outputs, labels = random_outputs(), random_labels()
    teacher = outputs.logits.mean(axis=0)
    outputs = random_outputs(teacher_logits=teacher)
    method = create('one', target_epsilon=0.03, temperature=2.0)
    _, terms = method.loss(outputs, methods.Context(labels))
    target = softmax(teacher / 2) + 0.03
    expected = [
        4 * (target * np.log(target / softmax(z / 2))).sum(axis=-1).mean() for z in outputs.logits
    ]
    np.testing.assert_allclose(terms['distillation'], expected, rtol=1e-5)


def test_gate_scale_is_1_or_drawn_from_0_to_1_and_changes_no_other_parameter():
    maps, heads = jnp.zeros((4, 2, 2, 6)), random_outputs(50).heads
    params = {}
    for kind in ('ones', 'uniform'):
        gate = create('one', gate_scale=kind, **{'model.num_branches': 50}).make_aggregator()
        params[kind] = gate.init(jax.random.key(0), maps, heads, True)['params']
    np.testing.assert_array_equal(params['ones']['bn'].pop('scale'), 1)
    scale = params['uniform']['bn'].pop('scale')
    assert 0 <= scale.min() < 0.15 < 0.85 < scale.max() < 1
    jax.tree.map(np.testing.assert_array_equal, params['ones'], params['uniform'])


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'teacher': 'max'}, r"method.teacher='max' is not allowed: one of 'gate', 'mean'"),
        ({'temperature': 0.0}, r'method.temperature=0.0 is not allowed: at least 0.01'),
        ({'distill_weight': -1.0}, r'method.distill_weight=-1.0 is not allowed: at least 0'),
        ({'distill_weight': np.inf}, r'method.distill_weight=inf is not allowed'),
        ({'rampup_fraction': 1.5}, r'method.rampup_fraction=1.5 is not allowed: .* at most 1'),
        ({'target_epsilon': -1e-7}, r'method.target_epsilon=-1e-07 .* at least 0 and below 1'),
        ({'gate_scale': 'normal'}, r"method.gate_scale='normal' .* one of 'ones', 'uniform'"),
        ({'pairing': 'all_to_all'}, r"method.pairing='all_to_all' .*'one' reads temperature, "),
        ({'model.share_stages': 3}, r'model.share_stages=3 .* resnet8 has 3 stages'),
    ],
)
def test_field_with_a_wrong_value_is_an_error(fields, message):
    with pytest.raises(ConfigError, match=message):
        create('one', **fields)
