"""Weights trained elsewhere: files that are read and refused, ONE's checkpoints, the command."""

import hashlib
import io
import json
import os
import pickle
import sys
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from commands import REPOSITORY, run
from student_fixtures import random_variables

from one_jax import config as config_lib
from one_jax import fine_tuning, methods, models, student, teachers, torch_interop
from one_jax.data import datasets
from one_jax.errors import ConfigError, UserError
from one_jax.import_weights import import_student

KIND = {'network': 'resnet8', 'num_classes': 10}


def make_one(num_branches=3):
    """ONE on ResNet-8 as it is trained."""
    ensemble = {
        'members': ['resnet8'] * num_branches,
        'share_stages': 2,
        'share_stem': False,
        'aggregator': {'method': 'one', 'settings': {}},
    }
    return student.make_network({**KIND, 'ensemble': ensemble})


def batch_norm(prefix, width):
    """PyTorch's names and shapes of a batch normalisation."""
    return {
        f'{prefix}.{name}': (width,) for name in ('weight', 'bias', 'running_mean', 'running_var')
    }


def block(prefix, width_in, width):
    """PyTorch's names and shapes of a basic block, with a projection where the width changes."""
    shapes = {
        f'{prefix}.conv1.weight': (width, width_in, 3, 3),
        f'{prefix}.conv2.weight': (width, width, 3, 3),
        **batch_norm(f'{prefix}.bn1', width),
        **batch_norm(f'{prefix}.bn2', width),
    }
    if width_in != width:
        shapes[f'{prefix}.downsample.0.weight'] = (width, width_in, 1, 1)
        shapes |= batch_norm(f'{prefix}.downsample.1', width)
    return shapes


def test_names_and_shapes_are_those_of_the_authors_checkpoint():
    expected = {'conv1.weight': (16, 3, 3, 3), **batch_norm('bn1', 16)}
    expected |= block('layer1.0', 16, 16) | block('layer2.0', 16, 32)
    expected |= {'control_v1.weight': (3, 32), 'control_v1.bias': (3,), **batch_norm('bn_v1', 3)}
    for number in (1, 2, 3):
        expected |= block(f'layer3_{number}.0', 32, 64)
        expected[f'classfier3_{number}.weight'] = (10, 64)
        expected[f'classfier3_{number}.bias'] = (10,)
    variables = random_variables(make_one())
    state_dict = torch_interop.to_one_checkpoint(variables, 3)
    assert {name: array.shape for name, array in state_dict.items()} == expected

    params = variables['params']
    kernel = params['head']['layer3_0']['conv1']['kernel']
    assert state_dict['layer3_2.0.conv1.weight'][5, 3, 0, 2] == kernel[1, 0, 2, 3, 5]
    assert state_dict['classfier3_3.bias'][4] == params['head']['fc']['bias'][2, 4]
    assert state_dict['control_v1.weight'][1, 7] == params['aggregator']['linear']['kernel'][7, 1]
    statistics = variables['batch_stats']['aggregator']['bn']['var']
    np.testing.assert_array_equal(state_dict['bn_v1.running_var'], statistics)


def test_the_round_trip_of_eleven_branches_is_exact(tmp_path):
    """Ten and two are not in the order of their names; DataParallel's prefix comes off."""
    variables = random_variables(make_one(11))
    state_dict = torch_interop.to_one_checkpoint(variables, 11)
    saved = {f'module.{name}': array for name, array in state_dict.items()}
    saved['module.bn_v1.num_batches_tracked'] = np.asarray(3)
    safetensors.numpy.save_file(saved, tmp_path / 'one.safetensors')
    read = torch_interop.read_state_dict(tmp_path / 'one.safetensors')
    template = jax.eval_shape(lambda: variables)
    imported = torch_interop.from_one_checkpoint(read, template, 11)
    chex.assert_trees_all_equal(imported, variables)
    chex.assert_trees_all_equal(torch_interop.to_one_checkpoint(imported, 11), state_dict)


def test_all_of_a_checkpoint_that_does_not_fit_is_listed():
    variables = random_variables(make_one())
    state_dict = torch_interop.to_one_checkpoint(variables, 3)
    del state_dict['bn_v1.bias']
    state_dict['layer3_4.0.conv1.weight'] = np.zeros(3)
    state_dict['classfier3_2.weight'] = np.zeros((100, 64))
    with pytest.raises(UserError) as raised:
        torch_interop.from_one_checkpoint(state_dict, variables, 3)
    for problem in (
        'missing bn_v1.bias',
        'unknown layer3_4.0.conv1.weight',
        'classfier3_2.weight has shape (100, 64) and not (10, 64)',
    ):
        assert problem in str(raised.value)


def test_low_precision_and_prefixes(tmp_path):
    path = tmp_path / 'weights.safetensors'
    values = np.array([0.5, -3.0])
    halves = {'module.a': values.astype(np.float16), 'module.b': values.astype(jnp.bfloat16)}
    safetensors.numpy.save_file({**halves, 'module.c': values}, path)
    read = torch_interop.read_state_dict(path)
    assert {name: array.dtype.name for name, array in read.items()} == {
        'a': 'float32',
        'b': 'float32',
        'c': 'float64',
    }
    for array in read.values():
        np.testing.assert_array_equal(array, values)
    # A prefix that not all names have is part of the names.
    safetensors.numpy.save_file({'module.a': values, 'b': values}, path)
    assert torch_interop.read_state_dict(path).keys() == {'module.a', 'b'}


# A file of eight numbers of eight bits each.
HEADER = b'{"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}'
EIGHT_BITS = len(HEADER).to_bytes(8, 'little') + HEADER + bytes(8)
UNREADABLE = {
    'missing.safetensors': (None, 'there is no such file'),
    'truncated.safetensors': (safetensors.numpy.save({'a': np.ones(99)})[:200], 'is damaged'),
    'pickled.safetensors': (pickle.dumps({'a': np.ones(3)}), 'is damaged'),
    'empty.safetensors': (b'', 'is damaged'),
    'nothing.safetensors': (safetensors.numpy.save({}), 'holds no state dict'),
    'fp8.safetensors': (EIGHT_BITS, 'is damaged'),
    'weights.h5': (b'\x89HDF', 'a file that ends in one of .safetensors, .pth, .pt, .pth.tar'),
}


@pytest.mark.parametrize('name', UNREADABLE)
def test_a_file_that_is_no_weights_is_a_clear_error(tmp_path, name):
    content, words = UNREADABLE[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as raised:
        torch_interop.read_state_dict(tmp_path / name)
    assert words in str(raised.value)
    assert name in str(raised.value)
    assert '\n' not in str(raised.value)


@pytest.mark.parametrize(
    ('module', 'words'),
    [
        # What `import torch` meets where it is not installed.
        (None, 'pip install torch, or save it as .safetensors'),
        (types.SimpleNamespace(__version__='2.5.1+cpu'), "pip install 'torch>=2.6'"),
    ],
)
def test_a_pickled_file_needs_a_pytorch_that_reads_it_safely(tmp_path, monkeypatch, module, words):
    monkeypatch.setitem(sys.modules, 'torch', module)
    (tmp_path / 'weights.pth').write_bytes(b'')
    with pytest.raises(UserError) as raised:
        torch_interop.read_state_dict(tmp_path / 'weights.pth')
    assert words in str(raised.value)


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def saved(content, **options):
    """The bytes that `torch.save` writes."""
    file = io.BytesIO()
    pytest.importorskip('torch').save(content, file, **options)
    return file.getvalue()


@pytest.mark.parametrize('wrapped', [lambda x: x, lambda x: {'a': x}, lambda x: {'state_dict': x}])
@pytest.mark.parametrize('form', ['zip', 'legacy', 'pickle', 'pickle of protocol 4'])
def test_code_in_a_file_is_not_run(tmp_path, wrapped, form):
    content = wrapped(Evil(tmp_path / 'evil'))
    data = {
        'zip': lambda: saved(content),
        'legacy': lambda: saved(content, _use_new_zipfile_serialization=False),
        'pickle': lambda: pickle.dumps(content, 2),
        'pickle of protocol 4': lambda: pickle.dumps(content, 4),
    }[form]()
    pytest.importorskip('torch')
    (tmp_path / 'weights.pth').write_bytes(data)
    with pytest.raises(UserError) as raised:
        torch_interop.read_state_dict(tmp_path / 'weights.pth')
    assert not (tmp_path / 'evil').exists()
    assert '\n' not in str(raised.value)
    if form in ('zip', 'legacy'):
        assert 'mkdir), and nothing in a file is ever run' in str(raised.value)
    # The pickle is what it claims to be.
    pickle.loads(pickle.dumps(content))
    assert (tmp_path / 'evil').is_dir()


def test_state_dicts_of_pytorch_are_taken_out_of_their_checkpoints(tmp_path):
    torch = pytest.importorskip('torch')
    weights = {
        'module.conv.weight': torch.arange(6.0).reshape(2, 3).requires_grad_(),
        'module.bn.running_mean': torch.tensor([0.5, 2.0], dtype=torch.bfloat16),
        'module.bn.num_batches_tracked': torch.tensor(7),
    }
    for name, content in {
        'bare.pth': weights,
        'checkpoint.pth.tar': {'epoch': 3, 'state_dict': weights, 'optimizer': {'lr': 0.1}},
        'model.pt': {'model': weights, 'args': None},
    }.items():
        (tmp_path / name).write_bytes(saved(content))
        read = torch_interop.read_state_dict(tmp_path / name)
        assert read.keys() == {'conv.weight', 'bn.running_mean', 'bn.num_batches_tracked'}
        np.testing.assert_array_equal(read['conv.weight'], [[0, 1, 2], [3, 4, 5]], strict=False)
        np.testing.assert_array_equal(read['bn.running_mean'], np.float32([0.5, 2.0]), strict=True)
        assert read['bn.num_batches_tracked'] == 7


def test_files_of_pytorch_without_a_state_dict_are_clear_errors(tmp_path):
    torch = pytest.importorskip('torch')
    whole = saved({'a': torch.ones(1000)})
    for content, words in (
        (saved(torch.nn.Linear(2, 2)), 'save network.state_dict() alone'),
        (saved(torch.ones(3)), "'all of it' (Tensor)"),
        (saved({'epoch': 3, 'loss': 0.5}), "'epoch' (int), 'loss' (float)"),
        (saved({}), 'it is empty'),
        (whole[: len(whole) // 2], 'is damaged, or not a file of PyTorch'),
        (b'not weights', 'is damaged, or not a file of PyTorch'),
        (b'', 'is damaged, or not a file of PyTorch'),
    ):
        (tmp_path / 'weights.pth').write_bytes(content)
        with pytest.raises(UserError) as raised:
            torch_interop.read_state_dict(tmp_path / 'weights.pth')
        assert words in str(raised.value)
        assert '\n' not in str(raised.value)


def run_example(heading, folder, images):
    """The logits that the code under a heading of docs/students.md makes of images."""
    page = (REPOSITORY / 'docs/students.md').read_text()
    section = page.split(f'## {heading}\n')[1].split('\n## ')[0]
    code = section.split('```python\n')[1].split('```')[0]
    variables = {'images': images}
    exec(code.replace('students/one', str(folder)), variables)
    return np.asarray(variables['logits'])


def make_config(**fields):
    """A config whose data set is generated."""
    config = config_lib.default_config()
    data = {'data.name': 'cifar10', 'data.generated_examples': 16}
    config.update_from_flattened_dict(
        {'model.name': 'resnet8', 'method.name': 'plain', **data, **fields}
    )
    return config


def write_plain(path):
    """The weights of a ResNet-8 in a file, and its variables."""
    variables = random_variables(models.make_backbone('resnet8', 10)(), (32, 32, 3))
    safetensors.numpy.save_file(torch_interop.to_state_dict(variables), path)
    return variables


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)


def test_the_command_makes_a_student_a_teacher_and_a_start(tmp_path, images):
    variables = write_plain(tmp_path / 'weights.safetensors')
    folder = tmp_path / 'student'
    output, _ = run(
        'import_weights',
        f'--weights={tmp_path / "weights.safetensors"}',
        '--network=resnet8',
        '--config=configs/cifar10_resnet32.py:smoke',
        '--config.data.data_dir=here',
        f'--output={folder}',
    )
    assert f'{folder}: resnet8, 78,042 parameters' in output
    assert output.splitlines()[-1] == (
        f'python -m one_jax.evaluate --student={folder} --config=configs/cifar10_resnet32.py '
        '--config.data.data_dir=here'
    )
    imported = student.load_student(folder)
    chex.assert_trees_all_equal(imported.variables, variables)
    config = json.loads((folder / 'config.json').read_text())
    assert config['metric'] is None
    assert config['label_names'] == [str(label) for label in range(10)]
    assert (config['input_size'], config['mean']) == ([32, 32], [0.4914, 0.4822, 0.4465])
    assert config['data']['generated_examples'] == 0
    assert config['checks']['formats'].keys() == {'student.safetensors', 'student.stablehlo'}
    card = (folder / 'README.md').read_text()
    digest = hashlib.sha256((tmp_path / 'weights.safetensors').read_bytes()).hexdigest()
    size = (folder / 'student.safetensors').stat().st_size
    for words in (
        '| file | `weights.safetensors` |',
        f'| its SHA-256 | `{digest}` |',
        'Nothing was evaluated.',
        'on 8 random images',
        f'78,042 parameters; {config["flops"]:,} FLOPs an image',
        f'| `student.safetensors` | {size:,} |',
        'Latency: not measured\n',
    ):
        assert words in card
    for heading in ('With one_jax', 'In JAX without one_jax'):
        logits = run_example(heading, folder, images)
        np.testing.assert_allclose(logits, imported(images), rtol=1e-4, atol=1e-4)

    config = make_config(**{'method.name': 'kd', 'method.teachers': str(folder)})
    spec = datasets.describe(config.data)
    (teacher,) = teachers.load(methods.create(config), spec)
    chex.assert_trees_all_equal(teacher.variables, variables)
    config = make_config(**{'model.init_from': str(folder)})
    start = fine_tuning.load(config, methods.create(config))
    chex.assert_trees_all_equal(start.variables, variables)


def test_what_the_branches_and_the_teacher_of_a_checkpoint_say(tmp_path, images):
    network = make_one()
    variables = random_variables(network, (32, 32, 3))
    weights = tmp_path / 'one.safetensors'
    safetensors.numpy.save_file(torch_interop.to_one_checkpoint(variables, 3), weights)
    config = make_config()

    def imported(branch):
        output = tmp_path / f'student-{branch}'
        return import_student(weights, 'resnet8', config, output, 'one', branch)

    spec = datasets.describe(config.data)
    normalised = (images / 255 - np.array(spec.mean)) / np.array(spec.std)
    outputs = jax.jit(lambda v, x: network.apply(v, x, train=False))(
        variables, normalised.astype(np.float32)
    )
    for branch, expected in (
        (1, outputs.logits[1]),
        ('ensemble', outputs.logits.mean(axis=0)),
        ('teacher', outputs.teacher_logits),
    ):
        made = imported(branch)
        assert made.config['branch'] == branch
        assert made.config['method'] == 'one'
        scale = np.abs(expected).max()
        np.testing.assert_allclose(made(images), expected, rtol=1e-4, atol=1e-4 * scale)
    with pytest.raises(ConfigError, match='branch=3 is not allowed: 0 to 2, or'):
        imported(3)


REFUSED = {
    'unknown network': ({'network': 'resnet9'}, "network='resnet9' is not allowed"),
    'other network': ({'network': 'resnet14'}, 'missing layer1.1.bn1.bias'),
    'unknown layout': ({'layout': 'two'}, "layout='two' is not allowed: one of 'plain', 'one'"),
    'a branch of one network': ({'branch': '1'}, "branch='1' is not allowed"),
    'not of the authors': ({'layout': 'one'}, 'they have no layer3_1'),
    'not of CIFAR': ({'layout': 'one', 'network': 'resnet18'}, 'a CIFAR ResNet'),
    'other classes': (
        {'config': make_config(**{'data.name': 'cifar100'})},
        'fc.weight has shape (10, 64) and not (100, 64)',
    ),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path, case):
    arguments, words = REFUSED[case]
    weights, output = tmp_path / 'weights.safetensors', tmp_path / 'student'
    write_plain(weights)
    arguments = {'network': 'resnet8', 'config': make_config(), **arguments}
    with pytest.raises(UserError) as raised:
        import_student(weights, output=output, **arguments)
    assert words in str(raised.value)
    assert not output.exists()


IMPOSSIBLE = {
    'diverged': ('layer2.0.bn1.bias', np.nan, 'NaN or infinity in layer2.0.bn1.bias'),
    # A number that only the file's float64 can hold.
    'too large': ('fc.bias', 1e300, 'NaN or infinity in fc.bias'),
    'no variance': ('bn1.running_var', -1e-3, 'negative variances in bn1.running_var'),
    'no real number': ('fc.weight', 1j, 'complex64 in place of real numbers in fc.weight'),
    'overflow': ('fc.weight', 3e38, 'the network says NaN or infinity of random images'),
}


@pytest.mark.parametrize('case', IMPOSSIBLE)
def test_numbers_that_no_network_can_have_are_refused(tmp_path, case):
    name, value, words = IMPOSSIBLE[case]
    weights, output = tmp_path / 'weights.safetensors', tmp_path / 'student'
    write_plain(weights)
    state_dict = safetensors.numpy.load_file(weights)
    dtype = {'too large': np.float64, 'no real number': np.complex64}.get(case, np.float32)
    state_dict[name] = state_dict[name].astype(dtype)
    state_dict[name][:] = value
    safetensors.numpy.save_file(state_dict, weights)
    with pytest.raises(UserError) as raised:
        import_student(weights, 'resnet8', make_config(), output)
    assert words in str(raised.value)
    assert str(weights) in str(raised.value)
    assert not output.exists()


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / 'note').write_text('mine')
    write_plain(tmp_path / 'weights.safetensors')
    with pytest.raises(UserError, match='nothing is overwritten'):
        import_student(tmp_path / 'weights.safetensors', 'resnet8', make_config(), tmp_path)
