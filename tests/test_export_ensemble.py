"""Ensembles and unlike members as students: names, round trips, the run's own accuracy."""

import chex
import jax
import numpy as np
import pytest
from student_fixtures import random_variables, write_student

from one_jax import config as config_lib
from one_jax import evaluate, export, student, torch_interop, train
from one_jax.errors import ConfigError, UserError


def make_network(members, share_stages, share_stem=False, num_classes=7):
    ensemble = {'members': members, 'share_stages': share_stages, 'share_stem': share_stem}
    description = {'network': members[0], 'num_classes': num_classes, 'ensemble': ensemble}
    return student.make_network(description)


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


STEM = {'conv1.weight': (16, 3, 3, 3), **batch_norm('bn1', 16)}


def shapes_of(network, num_branches):
    state_dict = torch_interop.ensemble_to_state_dict(random_variables(network), num_branches)
    return {name: array.shape for name, array in state_dict.items()}


def test_names_of_members_above_a_trunk():
    """The trunk has the plain network's names, a branch the same behind its number."""
    expected = {**STEM, **block('layer1.0', 16, 16)}
    for branch in ('branches.0', 'branches.1'):
        expected |= block(f'{branch}.layer2.0', 16, 32) | block(f'{branch}.layer3.0', 32, 64)
        expected |= {f'{branch}.fc.weight': (7, 64), f'{branch}.fc.bias': (7,)}
    assert shapes_of(make_network(['resnet8'] * 2, 1), 2) == expected


def test_names_of_unlike_members_above_a_stem():
    expected = dict(STEM)
    for branch, (a, b, c) in (('branches.0', (16, 32, 64)), ('branches.1', (8, 16, 32))):
        expected |= block(f'{branch}.layer1.0', 16, a)
        expected |= block(f'{branch}.layer2.0', a, b) | block(f'{branch}.layer3.0', b, c)
        expected |= {f'{branch}.fc.weight': (7, c), f'{branch}.fc.bias': (7,)}
    network = make_network(['resnet8', 'resnet8@0.5'], 0, share_stem=True)
    assert shapes_of(network, 2) == expected


@pytest.mark.parametrize(
    ('members', 'share_stages', 'share_stem'),
    [
        (['resnet8'] * 11, 2, False),
        (['resnet8'] * 2, 0, False),
        (['resnet8', 'wrn10_1'], 0, False),
        (['resnet8', 'resnet8@0.6', 'resnet8@0.3'], 0, True),
    ],
)
def test_the_round_trip_is_exact(members, share_stages, share_stem):
    """Also for more than ten branches, whose names do not sort as their numbers do."""
    variables = random_variables(make_network(members, share_stages, share_stem))
    state_dict = torch_interop.ensemble_to_state_dict(variables, len(members))
    state_dict['branches.0.layer3.0.bn1.num_batches_tracked'] = np.asarray(3)
    back = torch_interop.ensemble_from_state_dict(state_dict, variables, len(members))
    chex.assert_trees_all_equal(jax.device_get(back), variables)


def test_weights_of_another_ensemble_are_refused():
    two, three = (random_variables(make_network(['resnet8'] * number, 2)) for number in (2, 3))
    state_dict = torch_interop.ensemble_to_state_dict(three, 3)
    with pytest.raises(UserError, match=r'unknown branches\.2\.fc\.bias'):
        torch_interop.ensemble_from_state_dict(state_dict, two, 2)
    state_dict = torch_interop.ensemble_to_state_dict(two, 2)
    with pytest.raises(UserError, match=r'missing fc\.bias'):
        torch_interop.ensemble_from_state_dict(state_dict, three, 3)


def make_config(**fields):
    """Four steps of ResNet-8 on generated images."""
    config = config_lib.default_config()
    config.update_from_flattened_dict(
        {
            'model.name': 'resnet8',
            'model.num_branches': 2,
            'data.name': 'cifar10',
            'data.generated_examples': 64,
            'data.batch_size': 16,
            'data.eval_batch_size': 32,
            'train.epochs': 1,
            'train.compilation_cache_dir': '',
            **fields,
        }
    )
    return config


def assert_scores(evaluated, index, result, key):
    """What students scored when evaluated is what the run recorded."""

    def expected(name):
        return result[f'ensemble_{name}'] if key == 'ensemble' else result[f'branch_{name}'][key]

    assert evaluated['branch_top1'][index] == expected('top1')
    assert evaluated['branch_nll'][index] == pytest.approx(expected('nll'), rel=1e-4)


def test_any_member_of_unlike_ones_and_their_ensemble(tmp_path):
    result = train.train_and_evaluate(make_config(**{'method.name': 'boc_kd'}), tmp_path / 'run')
    assert result['branch_network'] == ['resnet8', 'resnet8@0.5']
    wanted = (0, 1, 'ensemble')
    folders = [tmp_path / f'student_{branch}' for branch in wanted]
    students = [
        export.export_student(tmp_path / 'run', folder, branch)
        for folder, branch in zip(folders, wanted, strict=True)
    ]
    assert [s.config['network'] for s in students] == ['resnet8', 'resnet8@0.5', 'resnet8']
    assert [s.config['parameters'] for s in students[:2]] == result['branch_parameters']
    assert students[2].config['ensemble'] == {
        'members': ['resnet8', 'resnet8@0.5'],
        'share_stages': 0,
        'share_stem': True,
    }
    # The stem, 16 x 3 x 9 weights and 32 of its normalisation, is there once.
    both = sum(result['branch_parameters'])
    assert students[2].config['parameters'] == both - (16 * 3 * 9 + 32)

    evaluated = evaluate.evaluate_students(folders)
    for index, branch in enumerate(wanted):
        assert_scores(evaluated, index, result, branch)
        metric = students[index].config['metric']
        assert metric['top1'] == evaluated['branch_top1'][index]
    assert len(set(evaluated['branch_nll'])) == 3

    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    mean = (students[0](images) + students[1](images)) / 2
    np.testing.assert_allclose(students[2](images), mean, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match=r"branch='2' is not allowed: 0 to 1, or 'ensemble'"):
        export.export_student(tmp_path / 'run', tmp_path / 'none', '2')


def test_the_ensemble_that_a_method_deploys(tmp_path):
    """EKD's branches are alike: exported without a word of the branch."""
    teacher = write_student(tmp_path / 'teacher', make_config())
    config = make_config(
        **{
            'method.name': 'ekd',
            'method.pairing': 'ensemble_to_all',
            'method.teachers': str(teacher),
        }
    )
    result = train.train_and_evaluate(config, tmp_path / 'run')
    assert result['deployed'] == 'ensemble'
    exported = export.export_student(tmp_path / 'run', tmp_path / 'student')
    assert exported.config['branch'] == 'ensemble'
    assert exported.config['ensemble']['share_stages'] == 1
    assert exported.config['parameters'] == result['deployed_parameters'] == result['parameters']
    evaluated = evaluate.evaluate_students([tmp_path / 'student'])
    assert_scores(evaluated, 0, result, 'ensemble')
    assert result['deployed_top1'] == result['ensemble_top1']
    # It may itself be a teacher.
    config.method.teachers = str(tmp_path / 'student')
    spec = config_lib.validate(config, num_devices=4)
    recipe = train.make_recipe(config_lib.resolve(config), spec, 4)
    assert recipe.teachers[0].num_branches == 2
