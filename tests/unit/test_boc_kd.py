"""BOC-KD: networks of decreasing width above one stem, learning together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_fixtures import BATCH, CLASSES, create, cross_entropy, kl_divergence, random_labels

from one_jax import config as config_lib
from one_jax import methods, models
from one_jax.errors import ConfigError
from one_jax.models.aggregators import Adapters
from one_jax.models.backbone import HeadOutputs
from one_jax.models.multibranch import Outputs

WIDTHS = ((4, 6), (3, 5), (2, 2))
SIZES = (8, 4)


def random_heads(seed=0):
    """Three branches of two stages with decreasing widths."""
    rng = np.random.default_rng(seed)
    stages = tuple(
        tuple(
            rng.normal(size=(BATCH, size, size, width))
            for size, width in zip(SIZES, widths, strict=True)
        )
        for widths in WIDTHS
    )
    maps = tuple(branch[-1] for branch in stages)
    features = tuple(m.mean(axis=(1, 2)) for m in maps)
    return HeadOutputs(2 * rng.normal(size=(3, BATCH, CLASSES)), features, maps, stages)


def adapted(heads):
    """The network's outputs and the adapters' kernels, {'member1_stage1': [C_1, C_0], ...}."""
    params = jax.jit(Adapters().init, static_argnums=3)(jax.random.key(1), None, heads, True)
    aggregate = jax.jit(Adapters().apply, static_argnums=3)(params, None, heads, True)
    kernels = {name: np.asarray(p['kernel'])[0, 0] for name, p in params['params'].items()}
    assert all(p.keys() == {'kernel'} for p in params['params'].values())
    return Outputs(heads, aggregate), kernels


def feature_errors(heads, kernels):
    """By NumPy: a matrix product at every pixel, the mean square, the sum over stages."""
    errors = []
    for branch in (1, 2):
        error = 0.0
        for stage in (1, 2):
            narrow, wide = heads.stages[branch][stage - 1], heads.stages[0][stage - 1]
            mapped = np.einsum('bhwc,cd->bhwd', narrow, kernels[f'member{branch}_stage{stage}'])
            error += ((mapped - wide) ** 2).mean()
        errors.append(error)
    return errors


@pytest.mark.parametrize(
    ('weights', 'fields'),
    [
        ((0.7, 0.15, 0.15, 2.0, 0.0), {}),
        (
            (0.5, 0.3, 2.0, 3.0, 0.5),
            {
                'cross_entropy_weight': 0.5,
                'feature_weight': 0.3,
                'distill_weight': 2.0,
                'temperature': 3.0,
                'rampup_fraction': 0.5,
            },
        ),
    ],
)
def test_loss_equals_the_formula(weights, fields):
    cross_entropy_weight, feature_weight, distill_weight, temperature, ramp = weights
    distill_weight *= np.exp(-5 * (1 - 0.25 / ramp) ** 2) if ramp else 1
    heads, labels = random_heads(), random_labels()
    outputs, kernels = adapted(heads)
    method = create('boc_kd', **{'model.num_branches': 3}, **fields)
    loss, terms = jax.jit(method.loss)(outputs, methods.Context(labels, progress=0.25))
    mean = heads.logits.mean(axis=0)
    expected = {
        'branch_cross_entropy': [cross_entropy(z, labels) for z in heads.logits],
        'feature_squared_error': feature_errors(heads, kernels),
        'distillation': [kl_divergence(mean, z, temperature) for z in heads.logits],
        'distill_weight': distill_weight,
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-4, err_msg=name)
    total = cross_entropy_weight * sum(expected['branch_cross_entropy'])
    total += feature_weight * sum(expected['feature_squared_error'])
    total += distill_weight * sum(expected['distillation'])
    assert float(loss) == pytest.approx(total, rel=1e-4)


def test_default_branches_are_the_network_at_decreasing_widths():
    method = create('boc_kd')
    widths = ('resnet8@0.8', 'resnet8@0.6', 'resnet8@0.4', 'resnet8@0.2')
    assert method.branch_networks == ('resnet8', *widths)
    assert method.share_stages == 0
    half = create('boc_kd', **{'model.name': 'resnet8@0.5', 'model.num_branches': 2})
    assert half.branch_networks == ('resnet8@0.5', 'resnet8@0.25')
    for name in ('wrn10_1', 'vgg6_tiny'):
        assert create('boc_kd', **{'model.name': name}).branch_networks[4] == f'{name}@0.2'
    given = create('boc_kd', **{'model.branch_networks': 'resnet8,resnet8@0.3'})
    assert given.branch_networks == ('resnet8', 'resnet8@0.3')


@pytest.mark.parametrize(
    ('ratio', 'channels', 'scaled'),
    # 0.29 * 100 is 28.999999999999996 in floating point.
    [(0.8, 16, 12), (0.2, 64, 12), (0.5, 64, 32), (0.01, 16, 1), (0.29, 100, 29), (1.0, 64, 64)],
)
def test_narrow_stage_has_its_share_of_the_channels_rounded_down(ratio, channels, scaled):
    assert models.network('resnet8')(num_classes=2, width_ratio=ratio).scaled(channels) == scaled


def test_network_shares_the_stem_and_adapts_to_branch_0():
    method = create('boc_kd')
    config = config_lib.default_config()
    config.model.update({'name': 'resnet8', 'num_branches': 5, 'share_stages': 0})
    network = models.make_multibranch(config.model, CLASSES, method)
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
    assert widths == [[16, 32, 64], [12, 25, 51], [9, 19, 38], [6, 12, 25], [3, 6, 12]]
    adapters = {name: p['kernel'].shape for name, p in params['aggregator'].items()}
    assert adapters == {
        f'member{j}_stage{s}': (1, 1, widths[j][s - 1], widths[0][s - 1])
        for j in range(1, 5)
        for s in (1, 2, 3)
    }


@pytest.mark.parametrize(
    ('field', 'value', 'allowed'),
    [
        ('model.branch_networks', 'resnet8,wrn10_1', 'different widths of one network'),
        ('model.branch_networks', 'resnet8,resnet8', 'different widths of one network'),
        ('model.branch_networks', 'resnet8', 'at least 2'),
        ('model.name', 'densenet16_4', 'a ResNet without groups'),
        ('model.name', 'resnet8@much', 'one of'),
        ('model.share_stages', 1, 'whole networks'),
        ('model.num_branches', 1, 'at least 2'),
        ('method.cross_entropy_weight', float('nan'), 'at least 0'),
    ],
)
def test_field_with_a_wrong_value_is_an_error(field, value, allowed):
    with pytest.raises(ConfigError, match=allowed) as raised:
        create('boc_kd', **{field: value})
    assert raised.value.field == field
