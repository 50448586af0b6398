"""BOC-KD: networks of falling width above one stem, learning together."""

import jax
import jax.numpy as jnp
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
)

from one_jax import config as config_lib
from one_jax import methods, models
from one_jax.errors import ConfigError
from one_jax.models.adapters import Adapters
from one_jax.models.backbone import HeadOutputs
from one_jax.models.multibranch import Outputs

WIDTHS = ((4, 6), (3, 5), (2, 2))
SIZES = (8, 4)


def random_members(seed=0):
    """Three members of two stages with falling widths."""
    rng = np.random.default_rng(seed)
    stages = tuple(
        tuple(
            rng.normal(size=(BATCH, size, size, width))
            for size, width in zip(SIZES, widths, strict=True)
        )
        for widths in WIDTHS
    )
    maps = tuple(member[-1] for member in stages)
    features = tuple(m.mean(axis=(1, 2)) for m in maps)
    return HeadOutputs(2 * rng.normal(size=(3, BATCH, CLASSES)), features, maps, stages)


def adapted_outputs(members):
    """The network's outputs and the adapters' kernels, {'member1_stage1': [C_1, C_0], ...}."""
    adapters = Adapters()
    params = jax.jit(adapters.init, static_argnums=3)(jax.random.key(1), None, members, True)
    aggregate = jax.jit(adapters.apply, static_argnums=3)(params, None, members, True)
    outputs = Outputs(
        members.logits,
        members.features,
        members.maps,
        members.stages,
        teacher_logits=aggregate.teacher_logits,
        extra=aggregate.extra,
    )
    kernels = {name: np.asarray(p['kernel'])[0, 0] for name, p in params['params'].items()}
    assert all(p.keys() == {'kernel'} for p in params['params'].values())
    return outputs, kernels


def run(outputs, context, **fields):
    method = create('boc_kd', **{'model.num_branches': 3}, **fields)
    return jax.device_get(jax.jit(method.loss)(outputs, context))


def feature_errors(members, kernels, examples=slice(None)):
    """By NumPy: a matrix product at every pixel, the mean square, the sum over stages."""
    errors = []
    for member in (1, 2):
        error = 0.0
        for stage in (1, 2):
            narrow = members.stages[member][stage - 1][examples]
            wide = members.stages[0][stage - 1][examples]
            mapped = np.einsum('bhwc,cd->bhwd', narrow, kernels[f'member{member}_stage{stage}'])
            error += ((mapped - wide) ** 2).mean()
        errors.append(error)
    return errors


def test_terms_are_those_of_the_formula():
    members, labels = random_members(), random_labels()
    outputs, kernels = adapted_outputs(members)
    loss, terms = run(outputs, methods.Context(labels, progress=0.0))
    mean = members.logits.mean(axis=0)
    expected = {
        'branch_cross_entropy': [cross_entropy(z, labels) for z in members.logits],
        'feature_squared_error': feature_errors(members, kernels),
        'distillation': [kl_divergence(mean, z, 2.0) for z in members.logits],
        'distill_weight': 0.15,
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-4, err_msg=name)
    total = 0.7 * sum(expected['branch_cross_entropy'])
    total += 0.15 * sum(expected['feature_squared_error']) + 0.15 * sum(expected['distillation'])
    assert loss == pytest.approx(total, rel=1e-4)


def test_weights_and_temperature_are_fields():
    members, labels = random_members(), random_labels()
    outputs, kernels = adapted_outputs(members)
    fields = {
        'cross_entropy_weight': 0.5,
        'feature_weight': 0.3,
        'distill_weight': 2.0,
        'temperature': 3.0,
        'rampup_fraction': 0.5,
    }
    loss, terms = run(outputs, methods.Context(labels, progress=0.25), **fields)
    weight = 2 * np.exp(-5 * 0.5**2)
    mean = members.logits.mean(axis=0)
    total = 0.5 * sum(cross_entropy(z, labels) for z in members.logits)
    total += 0.3 * sum(feature_errors(members, kernels))
    total += weight * sum(kl_divergence(mean, z, 3.0) for z in members.logits)
    assert loss == pytest.approx(total, rel=1e-4)
    assert terms['distill_weight'] == pytest.approx(weight, rel=1e-5)


def test_padding_counts_for_nothing():
    members, labels = random_members(), random_labels()
    outputs, kernels = adapted_outputs(members)
    _, terms = run(outputs, methods.Context(labels, mask=np.array([1, 1, 1, 0])))
    np.testing.assert_allclose(
        terms['feature_squared_error'],
        feature_errors(members, kernels, examples=slice(3)),
        rtol=1e-4,
    )
    mean, kept = members.logits.mean(axis=0)[:3], members.logits[:, :3]
    np.testing.assert_allclose(
        terms['distillation'], [kl_divergence(mean, z, 2.0) for z in kept], rtol=1e-4
    )


def test_members_are_the_network_at_falling_widths():
    method = create('boc_kd')
    assert method.members == (
        'resnet8',
        'resnet8@0.8',
        'resnet8@0.6',
        'resnet8@0.4',
        'resnet8@0.2',
    )
    assert method.share_stages == 0
    half = create('boc_kd', **{'model.name': 'resnet8@0.5', 'model.num_branches': 2})
    assert half.members == ('resnet8@0.5', 'resnet8@0.25')
    for name in ('wrn10_1', 'vgg6_tiny'):
        assert create('boc_kd', **{'model.name': name}).members[4] == f'{name}@0.2'


def test_the_network_shares_the_stem_alone():
    """Channels of every stage's convolutions, by width; the adapters lead to member 0's."""
    method = create('boc_kd')
    config = config_lib.default_config()
    config.model.update({'name': 'resnet8', 'num_branches': 5, 'share_stages': 0})
    network = models.make_network(config.model, CLASSES, method)
    params = jax.eval_shape(
        lambda key, images: network.init(key, images, train=False),
        jax.random.key(0),
        jnp.zeros((1, 8, 8, 3)),
    )['params']
    assert params['trunk'].keys() == {'conv1', 'bn1'}
    widths = [
        [params[f'head_{j}'][f'layer{s}_0']['conv1']['kernel'].shape[-1] for s in (1, 2, 3)]
        for j in range(5)
    ]
    assert widths == [[16, 32, 64], [13, 26, 51], [10, 19, 38], [6, 13, 26], [3, 6, 13]]
    adapters = {name: p['kernel'].shape for name, p in params['aggregator'].items()}
    assert adapters == {
        f'member{j}_stage{s}': (1, 1, widths[j][s - 1], widths[0][s - 1])
        for j in range(1, 5)
        for s in (1, 2, 3)
    }


def term(name, index):
    def scalar(method, outputs, context):
        return method.loss(outputs, context)[1][name][index]

    return scalar


def adapter_norms(norms):
    return [norm for name, norm in norms.items() if name.startswith('aggregator/')]


def test_the_feature_term_teaches_the_narrow_member_and_its_adapters():
    norms = gradient_norms(term('feature_squared_error', 0), 'boc_kd', 2)
    # The narrow member's own way leads through the shared stem.
    assert norms['trunk'] > 0
    assert norms['head'][1] > 0
    assert norms['head'][0] == 0
    assert len(adapter_norms(norms)) == 3
    assert min(adapter_norms(norms)) > 0


@pytest.mark.parametrize(('name', 'index'), [('branch_cross_entropy', 1), ('distillation', 0)])
def test_the_other_terms_teach_one_member_and_no_adapter(name, index):
    """The divergence too: the mean of all members is a constant in it."""
    norms = gradient_norms(term(name, index), 'boc_kd', 2)
    assert norms['trunk'] > 0
    assert [norm > 0 for norm in norms['head']] == [member == index for member in range(2)]
    assert max(adapter_norms(norms)) == 0


def test_member_0_learns_nothing_from_features():
    """The gradient at the maps themselves: none at the pivot's, some at every other's."""
    members, labels = random_members(), random_labels()
    method = create('boc_kd', **{'model.num_branches': 3})
    adapters = Adapters()
    params = jax.jit(adapters.init, static_argnums=3)(jax.random.key(1), None, members, True)

    def features(stages):
        aggregate = adapters.apply(params, None, members.replace(stages=stages), True)
        outputs = Outputs(
            members.logits,
            members.features,
            members.maps,
            stages,
            teacher_logits=aggregate.teacher_logits,
            extra=aggregate.extra,
        )
        return method.loss(outputs, methods.Context(labels))[1]['feature_squared_error'].sum()

    pivot, *others = jax.jit(jax.grad(features))(members.stages)
    assert not any(np.any(gradient) for gradient in pivot)
    assert all(np.any(gradient) for member in others for gradient in member)


@pytest.mark.parametrize(
    ('members', 'allowed'),
    [
        ('resnet8,wrn10_1', 'different widths of one network'),
        ('resnet8,resnet14', 'different widths of one network'),
        ('resnet8,resnet8', 'different widths of one network'),
        ('resnet8', 'at least 2'),
    ],
)
def test_members_must_be_widths_of_one_network(members, allowed):
    with pytest.raises(ConfigError, match=f'model.members=.*{allowed}'):
        create('boc_kd', **{'model.members': members})


def test_widths_may_be_given():
    method = create('boc_kd', **{'model.members': 'resnet8,resnet8@0.3'})
    assert method.members == ('resnet8', 'resnet8@0.3')


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        ('model.name', 'densenet16_4'),
        ('model.name', 'resnet8@much'),
        ('model.share_stages', 1),
        ('model.num_branches', 1),
        ('method.feature_weight', -1.0),
        ('method.cross_entropy_weight', float('nan')),
    ],
)
def test_what_it_cannot_work_with_is_refused(field, value):
    with pytest.raises(ConfigError) as raised:
        create('boc_kd', **{field: value})
    assert raised.value.field == field
