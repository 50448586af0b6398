"""The student folder: PyTorch names and layout, exact round trip, errors for damaged ones."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from one_jax import models, torch_interop
from one_jax.errors import UserError
from one_jax.student import load_student


def make_variables(name='resnet14', num_classes=7):
    network = models.make_backbone(name, num_classes)()
    images = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    template = jax.eval_shape(
        lambda key, x: network.init(key, x, train=False), jax.random.key(0), images
    )
    generator = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: generator.normal(size=x.shape).astype(x.dtype), template)
    return {**variables, 'batch_stats': jax.tree.map(np.abs, variables['batch_stats'])}


def test_names_and_shapes_are_those_of_pytorchs_cifar_resnet():
    """Written out from the network's definition in PyTorch, not from ours."""

    def block(prefix, width_in, width, projected):
        yield f'{prefix}.conv1.weight', (width, width_in, 3, 3)
        yield f'{prefix}.conv2.weight', (width, width, 3, 3)
        norms = [f'{prefix}.bn1', f'{prefix}.bn2']
        if projected:
            yield f'{prefix}.downsample.0.weight', (width, width_in, 1, 1)
            norms.append(f'{prefix}.downsample.1')
        for norm in norms:
            yield from batch_norm(norm, width)

    def batch_norm(prefix, width):
        for name in ('weight', 'bias', 'running_mean', 'running_var'):
            yield f'{prefix}.{name}', (width,)

    expected = {
        'conv1.weight': (16, 3, 3, 3),
        **dict(batch_norm('bn1', 16)),
        **dict(block('layer1.0', 16, 16, False)),
        **dict(block('layer1.1', 16, 16, False)),
        **dict(block('layer2.0', 16, 32, True)),
        **dict(block('layer2.1', 32, 32, False)),
        **dict(block('layer3.0', 32, 64, True)),
        **dict(block('layer3.1', 64, 64, False)),
        'fc.weight': (7, 64),
        'fc.bias': (7,),
    }
    state_dict = torch_interop.to_state_dict(make_variables())
    assert {name: array.shape for name, array in state_dict.items()} == expected


def test_kernels_are_transposed_to_pytorchs_layout():
    variables = make_variables()
    state_dict = torch_interop.to_state_dict(variables)
    kernel = variables['params']['layer2_0']['conv1']['kernel']
    assert state_dict['layer2.0.conv1.weight'][5, 3, 0, 2] == kernel[0, 2, 3, 5]
    assert state_dict['fc.weight'][2, 40] == variables['params']['fc']['kernel'][40, 2]
    variance = variables['batch_stats']['layer3_0']['downsample_1']['var']
    np.testing.assert_array_equal(state_dict['layer3.0.downsample.1.running_var'], variance)


@pytest.mark.parametrize('name', ['resnet14', 'resnet11_bottleneck'])
def test_the_round_trip_is_exact(name):
    variables = make_variables(name)
    state_dict = torch_interop.to_state_dict(variables)
    state_dict['bn1.num_batches_tracked'] = np.asarray(3)
    chex.assert_trees_all_equal(torch_interop.from_state_dict(state_dict, variables), variables)


def test_all_that_does_not_fit_is_listed():
    variables = make_variables()
    state_dict = torch_interop.to_state_dict(variables)
    del state_dict['layer1.0.bn2.bias']
    state_dict['layer4.0.conv1.weight'] = np.zeros(3)
    state_dict['fc.weight'] = state_dict['fc.weight'].T
    with pytest.raises(UserError) as raised:
        torch_interop.from_state_dict(state_dict, variables)
    for problem in (
        'missing layer1.0.bn2.bias',
        'unknown layer4.0.conv1.weight',
        'fc.weight has shape (64, 7) and not (7, 64)',
    ):
        assert problem in str(raised.value)


@pytest.fixture
def folder(tmp_path):
    """A student's folder without the program."""
    config = {
        'network': 'resnet14',
        'num_classes': 7,
        'label_names': list('abcdefg'),
        'input_size': [16, 16],
        'mean': [0.5, 0.4, 0.3],
        'std': [0.2, 0.25, 0.3],
    }
    (tmp_path / 'config.json').write_text(json.dumps(config))
    weights = torch_interop.to_state_dict(make_variables())
    safetensors.numpy.save_file(weights, tmp_path / 'student.safetensors')
    return tmp_path


def test_a_student_takes_images_as_they_are(folder):
    student = load_student(folder)
    assert student.label_names == list('abcdefg')
    images = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3), np.uint8)
    normalised = (images / 255 - np.array([0.5, 0.4, 0.3])) / np.array([0.2, 0.25, 0.3])
    normalised = normalised.astype(np.float32)
    expected = student.network.apply(student.variables, normalised, train=False).logits
    tolerance = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(student(images), expected, rtol=1e-3, atol=tolerance)


# A file of eight numbers of eight bits each.
HEADER = b'{"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}'
EIGHT_BITS = len(HEADER).to_bytes(8, 'little') + HEADER + bytes(8)


def _write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def _truncate(folder):
    path = folder / 'student.safetensors'
    path.write_bytes(path.read_bytes()[:5000])


def _change(name, place, value):
    """Puts a number into a tensor."""

    def damage(folder):
        path = folder / 'student.safetensors'
        weights = safetensors.numpy.load_file(path)
        weights[name][place] = value
        safetensors.numpy.save_file(weights, path)

    return damage


def _set(field, value):
    """Changes a field of config.json."""

    def damage(folder):
        path = folder / 'config.json'
        path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))

    return damage


ENSEMBLE = {'members': [], 'share_stages': 2, 'share_stem': False}
DAMAGE = {
    'no config': (lambda folder: (folder / 'config.json').unlink(), 'there is no config.json'),
    'no weights': (
        lambda folder: (folder / 'student.safetensors').unlink(),
        'there is no student.safetensors',
    ),
    'config is not JSON': (_write('config.json', b'{"network":'), 'not JSON'),
    'config of something else': (_write('config.json', b'{"model": 3}'), 'describes no student'),
    'unknown network': (
        _write('config.json', b'{"network": "vgg19", "num_classes": 7, "input_size": [16, 16]}'),
        "model.name='vgg19' is not allowed",
    ),
    'other classes': (
        _write('config.json', b'{"network": "resnet14", "num_classes": 5, "input_size": [16, 16]}'),
        'fc.bias has shape (7,) and not (5,)',
    ),
    'config is a list': (_write('config.json', b'[1]'), 'holds a list in place of fields'),
    'network of a wrong type': (_set('network', 3), 'network=3 is not allowed'),
    'a file for a network': (_set('network', '../vgg16'), "model.name='../vgg16' is not allowed"),
    'no classes': (_set('num_classes', -1), 'num_classes=-1 is not allowed'),
    'a huge image': (_set('input_size', [10**9, 16]), 'whole numbers from 1 to 16,384'),
    'one mean': (_set('mean', [0.5]), 'mean=[0.5] is not allowed: three numbers'),
    'no deviation': (_set('std', [0.2, 0, 0.2]), 'three numbers above 0'),
    'too few names': (_set('label_names', ['a']), 'label_names has 1 names for num_classes=7'),
    'no crop': (_set('crop', 0), 'crop=0 is not allowed: a number above 0, at most 1'),
    'an unknown data field': (_set('data', {'name': 'mnist5k', 'url': 'x'}), 'the fields name, '),
    'brackets without end': (_write('config.json', b'[' * 100_000), 'cannot be read'),
    'an ensemble of none': (_set('ensemble', ENSEMBLE), 'describes no student'),
    'a type that NumPy has not': (
        _write('student.safetensors', EIGHT_BITS),
        "student.safetensors' is damaged",
    ),
    'truncated weights': (_truncate, 'is damaged'),
    'weights that diverged': (_change('fc.weight', (2, 3), np.inf), 'NaN or infinity in fc.weight'),
    'a variance that cannot be': (
        _change('layer1.0.bn2.running_var', 5, -0.1),
        'negative variances in layer1.0.bn2.running_var',
    ),
    'weights that are none': (_write('student.safetensors', b'\x80\x04K\x01.'), 'is damaged'),
}


@pytest.mark.parametrize('case', DAMAGE)
def test_a_damaged_folder_is_a_clear_error(folder, case):
    damage, words = DAMAGE[case]
    damage(folder)
    with pytest.raises(UserError) as raised:
        load_student(folder)
    assert words in str(raised.value)
    assert '\n' not in str(raised.value)
