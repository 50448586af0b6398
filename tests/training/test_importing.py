"""Students of weights trained elsewhere: logits, what is written, and what is an error."""

import re

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy
from student_fixtures import generated_config, make_one, random_variables, run_example

from one_jax import config as config_lib
from one_jax import data, methods, models
from one_jax.errors import ConfigError, UserError
from one_jax.runtime import files
from one_jax.students import folder, torch_interop
from one_jax.students.importing import import_student
from one_jax.training import teachers


def write_plain(path):
    """Writes the weights of a ResNet-8 and returns its variables."""
    variables = random_variables(models.make_backbone('resnet8', 10)())
    safetensors.numpy.save_file(torch_interop.to_state_dict(variables), path)
    return variables


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)


def test_imported_student_predicts_and_teaches(tmp_path, images):
    variables = write_plain(tmp_path / 'weights.safetensors')
    output = tmp_path / 'student'
    config = generated_config()
    student = import_student(tmp_path / 'weights.safetensors', 'resnet8', config.data, output)
    chex.assert_trees_all_equal(student.variables, variables)
    written = files.read_json(output / 'config.json')
    assert written['metric'] is None
    assert written['label_names'] == [str(label) for label in range(10)]
    assert written['data']['generated_examples'] == 0
    assert written['checks']['formats'].keys() == {'student.safetensors', 'student.stablehlo'}
    card = (output / 'README.md').read_text()
    size = (output / 'student.safetensors').stat().st_size
    for words in (
        '| file | `weights.safetensors` |',
        f'| SHA-256 | `{written["imported"]["sha256"]}` |',
        'Not evaluated.',
        'on 8 random images',
        f'78,042 parameters; {written["flops"]:,} FLOPs per image',
        f'| `student.safetensors` | {size:,} |',
        'Latency: not measured\n',
    ):
        assert words in card
    for heading in ('With one_jax', 'In JAX without one_jax'):
        logits = run_example(heading, output, images)
        np.testing.assert_allclose(logits, student(images), rtol=1e-4, atol=1e-4)

    config.update_from_flattened_dict({'method.name': 'kd', 'method.teachers': str(output)})
    method = methods.create(config_lib.resolve(config))
    source = data.open(config.data)
    (teacher,) = teachers.load(method, source.spec, source.label_names)
    chex.assert_trees_all_equal(teacher.variables, variables)


def test_names_of_other_cifar_code_are_read(tmp_path):
    variables = write_plain(tmp_path / 'weights.safetensors')
    weights = safetensors.numpy.load_file(tmp_path / 'weights.safetensors')
    renamed = {
        re.sub(r'^fc\.', 'linear.', name.replace('.downsample.', '.shortcut.')): array
        for name, array in weights.items()
    }
    assert {'linear.weight', 'layer2.0.shortcut.0.weight'} <= renamed.keys()
    safetensors.numpy.save_file(renamed, tmp_path / 'theirs.safetensors')
    config = generated_config().data
    student = import_student(tmp_path / 'theirs.safetensors', 'resnet8', config, tmp_path / 's')
    chex.assert_trees_all_equal(student.variables, variables)
    # Two classifiers are ambiguous.
    both = {**renamed, 'fc.weight': weights['fc.weight'], 'fc.bias': weights['fc.bias']}
    safetensors.numpy.save_file(both, tmp_path / 'both.safetensors')
    with pytest.raises(UserError, match=r'unknown linear\.bias'):
        import_student(tmp_path / 'both.safetensors', 'resnet8', config, tmp_path / 't')


def type_a_network(torch, blocks, classes):
    """Builds a CIFAR ResNet with type A shortcuts, named as in common PyTorch code."""
    from torch import nn

    class Block(nn.Module):
        def __init__(self, inputs, width):
            super().__init__()
            self.stride, self.padding = width // inputs, (width - inputs) // 2
            self.conv1 = nn.Conv2d(inputs, width, 3, self.stride, 1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
            self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

        def forward(self, x):
            y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
            x = x[:, :, :: self.stride, :: self.stride]
            return (y + nn.functional.pad(x, (0, 0, 0, 0, self.padding, self.padding))).relu()

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
            for stage, inputs, width in ((1, 16, 16), (2, 16, 32), (3, 32, 64)):
                rest = [Block(width, width) for _ in range(blocks - 1)]
                setattr(self, f'layer{stage}', nn.Sequential(Block(inputs, width), *rest))
            self.linear = nn.Linear(64, classes)

        def forward(self, x):
            x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())))
            return self.linear(x.mean((2, 3)))

    torch.manual_seed(0)
    network = Network()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


@pytest.mark.parametrize(('name', 'blocks'), [('resnet8', 1), ('resnet14', 2)])
def test_type_a_shortcuts_become_projections_with_the_same_logits(
    tmp_path, images, capsys, name, blocks
):
    torch = pytest.importorskip('torch')
    theirs = type_a_network(torch, blocks, 10)
    state_dict = {f'module.{name}': values for name, values in theirs.state_dict().items()}
    torch.save({'state_dict': state_dict, 'best_prec1': 91.7}, tmp_path / 'weights.th')
    student = import_student(
        tmp_path / 'weights.th', name, generated_config().data, tmp_path / 'student'
    )
    assert 'taken as type A' in capsys.readouterr().out
    normalised = (images / 255 - np.array(student.mean)) / np.array(student.std)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(normalised.transpose(0, 3, 1, 2)).float()).numpy()
    assert np.abs(student(images) - expected).max() < 1e-5 * np.abs(expected).max()


def test_folder_that_another_export_wrote_meanwhile_is_kept(tmp_path):
    def write(folder_name):
        with folder.whole_or_not_at_all(tmp_path / folder_name) as temporary:
            (temporary / 'mine').write_text('2')
            (tmp_path / folder_name).mkdir()
            (tmp_path / folder_name / 'theirs').write_text('1')

    with pytest.raises(UserError, match='nothing is overwritten'):
        write('student')
    assert [path.name for path in tmp_path.rglob('*')] == ['student', 'theirs']


@pytest.mark.parametrize('branch', ['1', 'ensemble', 'teacher'])
def test_branch_of_a_one_checkpoint_has_the_logits_of_the_network(tmp_path, images, branch):
    network = make_one()
    variables = random_variables(network)
    weights, config = tmp_path / 'one.safetensors', generated_config()
    safetensors.numpy.save_file(torch_interop.to_one_checkpoint(variables, 3), weights)
    student = import_student(weights, 'resnet8', config.data, tmp_path / 's', 'one', branch)
    assert (student.config['branch'], student.config['method']) == (
        int(branch) if branch == '1' else branch,
        'one',
    )
    normalised = (images / 255 - np.array(student.mean)) / np.array(student.std)
    outputs = jax.jit(lambda v, x: network.apply(v, x, train=False))(
        variables, normalised.astype(np.float32)
    )
    expected = {
        '1': outputs.logits[1],
        'ensemble': outputs.logits.mean(axis=0),
        'teacher': outputs.teacher_logits,
    }[branch]
    scale = np.abs(expected).max()
    np.testing.assert_allclose(student(images), expected, rtol=1e-4, atol=1e-4 * scale)


ERRORS = {
    'unknown network': ({'network': 'resnet9'}, "network='resnet9': "),
    'other network': ({'network': 'resnet14'}, 'missing layer1.1.bn1.bias'),
    'one shortcut of two': (
        {'without': 'layer3.0.downsample'},
        'missing layer3.0.downsample.0.weight',
    ),
    'unknown layout': ({'layout': 'two'}, "layout='two' is not allowed: one of 'plain', 'one'"),
    'branch of one network': ({'branch': '1'}, "branch='1' is not allowed: 0 to 0"),
    'layout of one network': ({'layout': 'one'}, 'have no layer3_1'),
    'no CIFAR network': ({'layout': 'one', 'network': 'resnet18'}, 'except for CIFAR'),
    'other classes': (
        {'data_config': generated_config(**{'data.name': 'cifar100', 'data.image_size': 0}).data},
        'fc.weight has shape (10, 64) and not (100, 64)',
    ),
}


@pytest.mark.parametrize('case', ERRORS)
def test_import_that_does_not_fit_writes_nothing(tmp_path, case):
    arguments, words = ERRORS[case]
    weights, output = tmp_path / 'weights.safetensors', tmp_path / 'student'
    write_plain(weights)
    arguments = {'network': 'resnet8', 'data_config': generated_config().data, **arguments}
    if without := arguments.pop('without', None):
        state_dict = safetensors.numpy.load_file(weights)
        kept = {name: x for name, x in state_dict.items() if not name.startswith(without)}
        safetensors.numpy.save_file(kept, weights)
    with pytest.raises(UserError) as raised:
        import_student(weights, output=output, **arguments)
    assert words in str(raised.value)
    assert not output.exists()


@pytest.mark.parametrize(
    ('value', 'words'), [(np.nan, 'NaN, infinity or'), (3e38, 'above 1e20 in fc')]
)
def test_import_of_weights_that_diverged_writes_nothing(tmp_path, value, words):
    weights, output = tmp_path / 'weights.safetensors', tmp_path / 'student'
    write_plain(weights)
    state_dict = safetensors.numpy.load_file(weights)
    state_dict['fc.weight'][:] = value
    safetensors.numpy.save_file(state_dict, weights)
    with pytest.raises(UserError) as raised:
        import_student(weights, 'resnet8', generated_config().data, output)
    assert words in str(raised.value)
    assert str(weights) in str(raised.value)
    assert not output.exists()


def test_import_overwrites_nothing(tmp_path):
    (tmp_path / 'note').write_text('mine')
    write_plain(tmp_path / 'weights.safetensors')
    with pytest.raises(ConfigError, match='nothing is overwritten'):
        import_student(
            tmp_path / 'weights.safetensors', 'resnet8', generated_config().data, tmp_path
        )
