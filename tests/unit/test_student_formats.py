"""Folding, quantisation, the self-check, latency, and folders that appear whole or not at all."""

import jax
import ml_dtypes
import numpy as np
import pytest
from student_fixtures import generated_config, make_ensemble, random_variables

from one_jax import config as config_lib
from one_jax import methods, models
from one_jax.errors import ConfigError, UserError
from one_jax.students import (
    batch_norm_folding,
    folder,
    quantisation,
    selection,
    self_check,
    torch_interop,
)

SHAPE = (8, 8, 3)


def logits_of(network, variables, images):
    apply = jax.jit(lambda variables, x: network.apply(variables, x, train=False).logits)
    return np.asarray(apply(variables, images))


FOLDABLE = {
    'bottlenecks in groups': lambda: models.make_backbone('resnext11_2x8d', 7)(),
    'convolutions with a bias': lambda: models.make_backbone('vgg6_tiny', 7)(),
    'stacked branches': lambda: make_ensemble(['resnet8'] * 2),
    'heterogeneous branches': lambda: make_ensemble(['resnet8', 'resnet8@0.5'], 0, True),
}


@pytest.mark.parametrize('case', FOLDABLE)
def test_folded_network_computes_the_same(case):
    network = FOLDABLE[case]()
    variables = random_variables(network, (32, 32, 3))
    images = np.random.default_rng(1).normal(size=(3, 32, 32, 3)).astype(np.float32)
    folded = batch_norm_folding.fold(network, variables, images)
    assert not folded['batch_stats']
    expected = logits_of(network, variables, images)
    actual = logits_of(batch_norm_folding.FoldedNetwork(network), folded, images)
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def test_folded_student_has_the_names_of_a_network_without_batch_normalisation():
    network = models.make_backbone('resnet8', 7)()
    variables = random_variables(network, SHAPE)
    folded = batch_norm_folding.fold(network, variables, jax.ShapeDtypeStruct((1, *SHAPE), 'f4'))
    state_dict = torch_interop.to_state_dict(folded)
    convolutions = ['conv1', *(f'layer{i}.0.conv{j}' for i in (1, 2, 3) for j in (1, 2))]
    convolutions += ['layer2.0.downsample.0', 'layer3.0.downsample.0']
    assert state_dict.keys() == {
        f'{module}.{leaf}' for module in [*convolutions, 'fc'] for leaf in ('weight', 'bias')
    }
    norm, statistics = (
        variables[name]['layer2_0']['downsample_1'] for name in ('params', 'batch_stats')
    )
    scale = norm['scale'] / np.sqrt(statistics['var'] + 1e-5)
    kernel = variables['params']['layer2_0']['downsample_0']['kernel'][0, 0, 3, 5]
    weight, bias = (state_dict[f'layer2.0.downsample.0.{leaf}'] for leaf in ('weight', 'bias'))
    np.testing.assert_allclose(weight[5, 3, 0, 0], kernel * scale[5], rtol=1e-5)
    expected = norm['bias'] - statistics['mean'] * scale
    np.testing.assert_allclose(bias, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('name', ['wrn10_1', 'densenet16_4'])
def test_folding_a_pre_activation_network_is_an_error(name):
    network = models.make_backbone(name, 7)()
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), 'f4')
    with pytest.raises(UserError, match=r'bn1 follows no convolution.*export without it'):
        batch_norm_folding.fold(network, random_variables(network, (32, 32, 3)), images)


def make_state_dict():
    generator = np.random.default_rng(0)
    return {
        'conv1.weight': generator.normal(size=(4, 3, 3, 3)).astype(np.float32),
        'fc.weight': generator.normal(size=(5, 4)).astype(np.float32),
        'fc.bias': generator.normal(size=5).astype(np.float32),
    }


@pytest.mark.parametrize(('weights', 'bits'), [('float16', 11), ('bfloat16', 8)])
def test_half_precision_rounds_kernels_only(weights, bits):
    state_dict = make_state_dict()
    encoded = quantisation.encode(state_dict, weights)
    assert encoded['fc.weight'].dtype == getattr(ml_dtypes, weights, np.float16)
    decoded = quantisation.decode(encoded)
    np.testing.assert_array_equal(decoded['fc.bias'], state_dict['fc.bias'], strict=True)
    for name in ('conv1.weight', 'fc.weight'):
        assert decoded[name].dtype == np.float32
        assert (decoded[name] != state_dict[name]).any()
        np.testing.assert_allclose(decoded[name], state_dict[name], rtol=2.0**-bits)


def test_int8_is_within_half_a_step_of_each_channel():
    state_dict = make_state_dict()
    state_dict['conv1.weight'][1] *= 1000
    state_dict['conv1.weight'][2] = 0
    encoded = quantisation.encode(state_dict, 'int8')
    assert encoded['conv1.weight'].dtype == np.int8
    assert encoded['conv1.weight_scale'].shape == (4,)
    decoded = quantisation.decode(encoded)
    assert decoded.keys() == state_dict.keys()
    for channel in range(4):
        own, back = (tree['conv1.weight'][channel] for tree in (state_dict, decoded))
        assert np.abs(own - back).max() <= 0.501 * np.abs(own).max() / 127


def test_weights_that_cannot_be_stored_or_read_are_an_error():
    state_dict = make_state_dict()
    state_dict['fc.weight'][0, 0] = 1e5
    with pytest.raises(ConfigError, match=r"weights='float16'.*bfloat16.*fc\.weight overflows"):
        quantisation.encode(state_dict, 'float16')
    encoded = quantisation.encode(state_dict, 'int8')
    del encoded['fc.weight_scale']
    with pytest.raises(ConfigError, match=r'shape of fc\.weight_scale=None is not allowed: \(5,\)'):
        quantisation.decode(encoded)


def test_self_check_fails_if_a_format_differs():
    pixels = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1)
    images = self_check.Images(pixels, np.array([0, 1, 1]))

    def reference(images):
        return np.stack([2.0 - images[:, 0, 0, 0], images[:, 0, 0, 0]], axis=1)

    def compare(rounded=False, **formats):
        return self_check.compare(formats, reference, rounded, images)

    checks = compare(good=lambda x: reference(x) + 1e-5)
    assert checks['top1'] == pytest.approx(100 * 2 / 3)
    assert checks['formats']['good']['largest_difference'] == pytest.approx(1e-5)
    for wrong in (lambda x: reference(x) + 0.1, lambda x: reference(x) * np.nan):
        with pytest.raises(RuntimeError, match='bad differs from the network in training'):
            compare(good=reference, bad=wrong)
    # Rounded weights may differ from the run's, but all files must agree.
    swapped = compare(
        True, weights=lambda x: reference(x)[:, ::-1], program=lambda x: reference(x)[:, ::-1]
    )
    assert swapped['formats']['program']['same_argmax'] == pytest.approx(100 / 3)
    with pytest.raises(RuntimeError, match='program differs'):
        compare(True, weights=lambda x: reference(x) + 0.1, program=reference)


def test_latency_is_measured_for_every_format_and_batch_size(monkeypatch):
    monkeypatch.setattr(folder, 'BATCH_SIZES', (1, 3))
    calls = []

    def predict(images):
        calls.append(images.shape)
        return images.sum(axis=(1, 2, 3))

    measured = folder.measure_latency({'a': predict, 'ensemble a': predict}, (4, 2))
    assert set(calls) == {(1, 4, 2, 3), (3, 4, 2, 3)}
    for name in ('a', 'ensemble a'):
        assert measured[name].keys() == {'1', '3'}
        assert min(measured[name].values()) > 0


def test_failed_export_leaves_nothing(tmp_path):
    def fail():
        with folder.whole_or_not_at_all(tmp_path / 'student') as temporary:
            (temporary / 'config.json').write_text('{}')
            raise RuntimeError('mismatch')

    with pytest.raises(RuntimeError, match='mismatch'):
        fail()
    assert not list(tmp_path.iterdir())


def make_method(name, num_branches=2):
    config = generated_config(**{'method.name': name, 'model.num_branches': num_branches})
    return methods.create(config_lib.resolve(config))


def test_branch_defaults_to_what_the_method_deploys():
    assert selection.parse_branch(None, make_method('one')) == 0
    assert selection.parse_branch('1', make_method('one')) == 1
    assert selection.parse_branch('teacher', make_method('one')) == 'teacher'
    assert selection.parse_branch(None, make_method('joint_average')) == 'ensemble'


@pytest.mark.parametrize('name', ['independent', 'dml', 'plain'])
def test_teacher_without_an_aggregator_is_an_error(name):
    method = make_method(name, 1 if name == 'plain' else 2)
    with pytest.raises(ConfigError, match=r"branch='teacher' is not allowed.*nothing weights"):
        selection.parse_branch('teacher', method)


def test_branch_beyond_the_last_is_an_error():
    with pytest.raises(ConfigError, match=r"branch='2' is not allowed: 0 to 1, or 'ensemble'"):
        selection.parse_branch('2', make_method('one'))
