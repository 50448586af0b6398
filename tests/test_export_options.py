"""What export can do to a student: fold batch normalisation, store it small, keep the teacher."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from student_fixtures import random_variables
from test_train import make_config

from one_jax import (
    batch_norm_folding,
    checkpoint,
    deployment,
    evaluate,
    export,
    latency,
    methods,
    models,
    quantisation,
    self_check,
    student_folder,
    torch_interop,
    train,
)
from one_jax.errors import ConfigError, UserError
from one_jax.student import make_network

SHAPE = (32, 32, 3)


def logits_of(network, variables, images):
    apply = jax.jit(lambda variables, x: network.apply(variables, x, train=False).logits)
    return np.asarray(apply(variables, images))


def make_ensemble(members):
    alike = len(set(members)) == 1
    ensemble = {'members': members, 'share_stages': 2 if alike else 0, 'share_stem': not alike}
    return make_network({'network': members[0], 'num_classes': 7, 'ensemble': ensemble})


FOLDABLE = {
    'basic blocks': lambda: models.make_backbone('resnet8', 7)(),
    'bottlenecks': lambda: models.make_backbone('resnet11_bottleneck', 7)(),
    'groups': lambda: models.make_backbone('resnext11_2x8d', 7)(),
    'convolutions with a bias': lambda: models.make_backbone('vgg6_tiny', 7)(),
    'stacked branches': lambda: make_ensemble(['resnet8'] * 2),
    'unlike branches': lambda: make_ensemble(['resnet8', 'resnet8@0.5']),
}


@pytest.mark.parametrize('case', FOLDABLE)
def test_a_folded_network_computes_the_same(case):
    network = FOLDABLE[case]()
    variables = random_variables(network, SHAPE)
    images = np.random.default_rng(1).normal(size=(3, *SHAPE)).astype(np.float32)
    folded = batch_norm_folding.fold(network, variables, images)
    assert not folded['batch_stats']
    expected = logits_of(network, variables, images)
    actual = logits_of(batch_norm_folding.FoldedNetwork(network), folded, images)
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def test_a_folded_student_has_the_names_of_a_network_without_batch_normalisation():
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
    np.testing.assert_allclose(
        state_dict['layer2.0.downsample.0.weight'][5, 3, 0, 0], kernel * scale[5], rtol=1e-5
    )
    np.testing.assert_allclose(
        state_dict['layer2.0.downsample.0.bias'],
        norm['bias'] - statistics['mean'] * scale,
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.parametrize('name', ['wrn10_1', 'densenet16_4'])
def test_pre_activation_networks_cannot_be_folded(name):
    network = models.make_backbone(name, 7)()
    images = jax.ShapeDtypeStruct((1, *SHAPE), jnp.float32)
    with pytest.raises(UserError, match=r'bn1 follows no convolution.*export without it'):
        batch_norm_folding.fold(network, random_variables(network, SHAPE), images)


def make_state_dict():
    generator = np.random.default_rng(0)
    return {
        'conv1.weight': generator.normal(size=(4, 3, 3, 3)).astype(np.float32),
        'fc.weight': generator.normal(size=(5, 4)).astype(np.float32),
        'fc.bias': generator.normal(size=5).astype(np.float32),
    }


@pytest.mark.parametrize(
    ('weights', 'bits'), [('float16', 11), ('bfloat16', 8)], ids=['float16', 'bfloat16']
)
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


def test_weights_that_cannot_be_stored_or_read_are_refused():
    state_dict = make_state_dict()
    state_dict['fc.weight'][0, 0] = 1e5
    with pytest.raises(ConfigError, match=r"weights='float16'.*bfloat16.*fc\.weight overflows"):
        quantisation.encode(state_dict, 'float16')
    encoded = quantisation.encode(state_dict, 'int8')
    del encoded['fc.weight_scale']
    with pytest.raises(UserError, match=r'fc\.weight_scale, of shape \(5,\), is missing'):
        quantisation.decode(encoded)


def test_a_format_that_computes_something_else_fails():
    images = self_check.Images(
        np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1), np.array([0, 1, 1])
    )

    def reference(images):
        return np.stack([2.0 - images[:, 0, 0, 0], images[:, 0, 0, 0]], axis=1)

    def compare(**formats):
        return self_check.compare(formats, reference, rounded, images)

    rounded = False
    checks = compare(good=lambda x: reference(x) + 1e-5)
    assert checks['top1'] == pytest.approx(100 * 2 / 3)
    assert checks['formats']['good']['largest_difference'] == pytest.approx(1e-5)
    for wrong in (lambda x: reference(x) + 0.1, lambda x: reference(x) * np.nan):
        with pytest.raises(RuntimeError, match='bad does not compute what the run does'):
            compare(good=reference, bad=wrong)
    # Rounded weights may differ from the run's, but all files must have the same.
    rounded = True
    checks = compare(
        weights=lambda x: reference(x)[:, ::-1], program=lambda x: reference(x)[:, ::-1]
    )
    assert checks['formats']['program']['same_argmax'] == pytest.approx(100 / 3)
    with pytest.raises(RuntimeError, match='program does not compute'):
        compare(weights=lambda x: reference(x) + 0.1, program=reference)


def test_a_failed_export_leaves_nothing(tmp_path):
    def fail():
        with student_folder.whole_or_not_at_all(tmp_path / 'student') as folder:
            (folder / 'config.json').write_text('{}')
            raise RuntimeError('mismatch')

    with pytest.raises(RuntimeError, match='mismatch'):
        fail()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', ['independent', 'dml', 'plain'])
def test_only_a_run_with_an_aggregator_has_a_teacher(name):
    config = make_config(**{'method.name': name})
    if name == 'plain':
        config.model.num_branches = 1
    with pytest.raises(ConfigError, match=r"branch='teacher' is not allowed.*nothing weighs"):
        deployment.parse_branch('teacher', methods.create(config))


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A run of ONE with its gate, and its result."""
    workdir = tmp_path_factory.mktemp('runs') / 'one'
    config = make_config(**{'train.epochs': 1, 'data.batch_size': 16, 'data.eval_batch_size': 16})
    return workdir, train.train_and_evaluate(config, workdir)


def test_the_teacher_with_its_gate(tmp_path, finished):
    workdir, result = finished
    teacher = export.export_student(workdir, tmp_path / 'teacher', 'teacher')
    assert teacher.config['parameters'] == result['parameters']
    assert teacher.config['metric']['top1'] == result['teacher_top1']
    evaluated = evaluate.evaluate_students([tmp_path / 'teacher'])
    assert evaluated['branch_top1'] == [result['teacher_top1']]
    assert evaluated['branch_nll'][0] == pytest.approx(result['teacher_nll'], rel=1e-4)
    assert abs(result['teacher_nll'] - result['ensemble_nll']) > 1e-6
    with safetensors.safe_open(tmp_path / 'teacher/student.safetensors', 'numpy') as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert shapes['aggregator.linear.weight'] == [2, 32]
    assert shapes['aggregator.bn.running_var'] == [2]
    assert shapes['branches.1.fc.weight'] == [10, 64]
    # The gate is not in the mean ensemble.
    ensemble = export.export_student(workdir, tmp_path / 'ensemble', 'ensemble')
    assert 'aggregator' not in ensemble.variables['params']
    assert 'aggregator' in teacher.variables['params']
    checks = ensemble.config['checks']
    assert checks['split'] == 'test'
    assert checks['num_images'] == 16
    assert checks['top1'] == result['ensemble_top1']
    assert checks['formats'].keys() == {'student.safetensors', 'student.stablehlo'}
    assert all(check['same_argmax'] == 100 for check in checks['formats'].values())


def test_a_small_student_is_read_back_as_it_was_checked(tmp_path, finished, monkeypatch):
    workdir, _ = finished
    monkeypatch.setattr(latency, 'BATCH_SIZES', (1, 2))
    options = export.Options(fold_batch_norm=True, weights='int8', latency=True)
    small = export.export_student(workdir, tmp_path / 'small', 1, options)
    plain = export.export_student(workdir, tmp_path / 'plain', 1)
    sizes = [
        (tmp_path / name / 'student.safetensors').stat().st_size for name in ('small', 'plain')
    ]
    assert sizes[0] < 0.35 * sizes[1]
    assert small.config['batch_norm'] == 'folded'
    assert small.config['latency'].keys() == {'device', 'milliseconds', 'ensemble_milliseconds'}
    # Each channel of the 9 convolutions has a bias in place of a scale and a bias.
    channels = 16 * 3 + 32 * 3 + 64 * 3
    assert small.config['parameters'] == plain.config['parameters'] - channels
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    expected, actual = np.asarray(plain(images)), np.asarray(small(images))
    difference = np.abs(actual - expected).max()
    assert 1e-6 < difference < 0.1 * np.abs(expected).max()
    program = student_folder.load_program(tmp_path / 'small/student.stablehlo')
    np.testing.assert_allclose(program(images), actual, rtol=1e-4, atol=1e-5)
    with checkpoint.Checkpoints(workdir / 'checkpoints', read_only=True) as checkpoints:
        assert small.config['step'] == checkpoints.read().step


def test_bfloat16_is_read_back(tmp_path, finished):
    student = export.export_student(
        finished[0], tmp_path / 's', 0, export.Options(weights='bfloat16')
    )
    kernel = np.asarray(student.variables['params']['fc']['kernel'])
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, kernel.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_without_the_data_set_random_images_are_checked(tmp_path, finished, capsys):
    workdir = tmp_path / 'run'
    shutil.copytree(finished[0], workdir)
    config = json.loads((workdir / 'config.json').read_text())
    config['data'] |= {'generated_examples': 0, 'data_dir': str(tmp_path / 'nothing')}
    (workdir / 'config.json').write_text(json.dumps(config))
    student = export.export_student(workdir, tmp_path / 'student', 0)
    assert student.config['checks']['split'] == 'random'
    assert student.config['checks']['top1'] is None
    assert 'note: random images in place of the test images' in capsys.readouterr().out
    assert 'random images' in (tmp_path / 'student/README.md').read_text()
    # Who says where the data are wants them taken.
    options = export.Options(data_dir=str(tmp_path / 'elsewhere'))
    with pytest.raises(UserError, match=r'elsewhere.*one_jax\.prepare'):
        export.export_student(workdir, tmp_path / 'other', 0, options)
    assert not (tmp_path / 'other').exists()


def test_unknown_weights_are_refused(tmp_path, finished):
    with pytest.raises(ConfigError, match="weights='int4' is not allowed: one of 'float32'"):
        export.export_student(finished[0], tmp_path / 's', 0, export.Options(weights='int4'))
