"""ONE's ablations; the loss itself is in test_losses.py."""

import numpy as np
import pytest
from method_fixtures import create, random_labels, random_outputs

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


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'teacher': 'max'}, r"method.teacher='max' is not allowed: one of 'gate', 'mean'"),
        ({'temperature': 0.0}, r'method.temperature=0.0 is not allowed: above 0'),
        ({'distill_weight': -1.0}, r'method.distill_weight=-1.0 is not allowed: at least 0'),
        ({'distill_weight': np.inf}, r'method.distill_weight=inf is not allowed'),
        ({'rampup_fraction': 1.5}, r'method.rampup_fraction=1.5 is not allowed: 0 to 1'),
        ({'pairing': 'all_to_all'}, r"method.pairing='all_to_all' .*'one' reads temperature, "),
        ({'model.share_stages': 3}, r'model.share_stages=3 .* resnet8 has 3 stages'),
    ],
)
def test_field_with_a_wrong_value_is_an_error(fields, message):
    with pytest.raises(ConfigError, match=message):
        create('one', **fields)
