"""State dicts: PyTorch's names and layout, ensembles, ONE's checkpoints, exact round trips."""

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy
from student_fixtures import (
    batch_norm_shapes,
    block_shapes,
    make_ensemble,
    make_one,
    random_variables,
)

from one_jax import models
from one_jax.errors import UserError
from one_jax.students import torch_interop, weights_file

STEM = {'conv1.weight': (16, 3, 3, 3), **batch_norm_shapes('bn1', 16)}


def shapes(state_dict):
    return {name: array.shape for name, array in state_dict.items()}


def test_plain_network_has_pytorchs_names_and_layout():
    """Written out from the network's definition in PyTorch, not from ours."""
    variables = random_variables(models.make_backbone('resnet8', 7)())
    state_dict = torch_interop.to_state_dict(variables)
    expected = STEM | block_shapes('layer1.0', 16, 16) | block_shapes('layer2.0', 16, 32)
    expected |= block_shapes('layer3.0', 32, 64) | {'fc.weight': (7, 64), 'fc.bias': (7,)}
    assert shapes(state_dict) == expected
    params = variables['params']
    kernel = params['layer2_0']['conv1']['kernel']
    assert state_dict['layer2.0.conv1.weight'][5, 3, 0, 2] == kernel[0, 2, 3, 5]
    assert state_dict['fc.weight'][2, 40] == params['fc']['kernel'][40, 2]
    variance = variables['batch_stats']['layer3_0']['downsample_1']['var']
    np.testing.assert_array_equal(state_dict['layer3.0.downsample.1.running_var'], variance)


def test_identical_branches_are_numbered_behind_the_trunk():
    expected = STEM | block_shapes('layer1.0', 16, 16)
    for branch in ('branches.0', 'branches.1'):
        expected |= block_shapes(f'{branch}.layer2.0', 16, 32)
        expected |= block_shapes(f'{branch}.layer3.0', 32, 64)
        expected |= {f'{branch}.fc.weight': (7, 64), f'{branch}.fc.bias': (7,)}
    variables = random_variables(make_ensemble(['resnet8'] * 2, share_stages=1))
    assert shapes(torch_interop.to_state_dict(variables, 2)) == expected


def test_heterogeneous_branches_are_numbered_behind_the_stem():
    expected = dict(STEM)
    for branch, (a, b, c) in (('branches.0', (16, 32, 64)), ('branches.1', (8, 16, 32))):
        expected |= block_shapes(f'{branch}.layer1.0', 16, a)
        expected |= block_shapes(f'{branch}.layer2.0', a, b)
        expected |= block_shapes(f'{branch}.layer3.0', b, c)
        expected |= {f'{branch}.fc.weight': (7, c), f'{branch}.fc.bias': (7,)}
    variables = random_variables(make_ensemble(['resnet8', 'resnet8@0.5'], 0, share_stem=True))
    assert shapes(torch_interop.to_state_dict(variables, 2)) == expected


def test_one_checkpoint_has_its_authors_names():
    expected = STEM | block_shapes('layer1.0', 16, 16) | block_shapes('layer2.0', 16, 32)
    expected |= {'control_v1.weight': (3, 32), 'control_v1.bias': (3,)}
    expected |= batch_norm_shapes('bn_v1', 3)
    for number in (1, 2, 3):
        expected |= block_shapes(f'layer3_{number}.0', 32, 64)
        expected[f'classfier3_{number}.weight'] = (10, 64)
        expected[f'classfier3_{number}.bias'] = (10,)
    variables = random_variables(make_one())
    state_dict = torch_interop.to_one_checkpoint(variables, 3)
    assert shapes(state_dict) == expected
    params = variables['params']
    kernel = params['head']['layer3_0']['conv1']['kernel']
    assert state_dict['layer3_2.0.conv1.weight'][5, 3, 0, 2] == kernel[1, 0, 2, 3, 5]
    assert state_dict['classfier3_3.bias'][4] == params['head']['fc']['bias'][2, 4]
    assert state_dict['control_v1.weight'][1, 7] == params['aggregator']['linear']['kernel'][7, 1]
    statistics = variables['batch_stats']['aggregator']['bn']['var']
    np.testing.assert_array_equal(state_dict['bn_v1.running_var'], statistics)


NETWORKS = {
    'plain': lambda: models.make_backbone('resnet11_bottleneck', 7)(),
    # More than ten branches: their names do not sort as their numbers do.
    'eleven branches': lambda: make_ensemble(['resnet8'] * 11),
    'nothing shared': lambda: make_ensemble(['resnet8'] * 2, 0),
    'heterogeneous': lambda: make_ensemble(['resnet8', 'wrn10_1'], 0),
    'shared stem': lambda: make_ensemble(['resnet8', 'resnet8@0.6'], 0, share_stem=True),
    'gate': make_one,
}


@pytest.mark.parametrize('case', NETWORKS)
def test_state_dict_round_trip_is_exact(case):
    network = NETWORKS[case]()
    num_branches = getattr(network, 'num_branches', 1)
    variables = random_variables(network)
    state_dict = torch_interop.to_state_dict(variables, num_branches)
    state_dict['layer1.0.bn1.num_batches_tracked'] = np.asarray(3)
    back = torch_interop.from_state_dict(state_dict, variables, num_branches)
    chex.assert_trees_all_equal(jax.device_get(back), variables)


def test_squeeze_excitation_is_of_pointwise_convolutions_as_in_timm():
    """The linear layers of folders that earlier versions wrote are read too."""
    variables = random_variables(make_ensemble(['seresnet10_tiny'] * 2, 1), (32, 32, 3))
    state_dict = torch_interop.to_state_dict(variables, 2)
    for name in ('layer1.0', 'branches.1.layer2.0'):
        width = state_dict[f'{name}.conv2.weight'].shape[0]
        assert state_dict[f'{name}.se.fc1.weight'].shape == (width // 4, width, 1, 1)
        assert state_dict[f'{name}.se.fc2.weight'].shape == (width, width // 4, 1, 1)
        assert state_dict[f'{name}.se.fc1.bias'].shape == (width // 4,)
    earlier = {
        name: array[..., 0, 0] if '.se.' in name and array.ndim == 4 else array
        for name, array in state_dict.items()
    }
    for stored in (state_dict, earlier):
        back = torch_interop.from_state_dict(stored, variables, 2)
        chex.assert_trees_all_equal(jax.device_get(back), variables)


def test_one_checkpoint_round_trip_is_exact(tmp_path):
    """Through a file with the prefix of DataParallel."""
    variables = random_variables(make_one(11))
    state_dict = torch_interop.to_one_checkpoint(variables, 11)
    saved = {f'module.{name}': array for name, array in state_dict.items()}
    saved['module.bn_v1.num_batches_tracked'] = np.asarray(3)
    safetensors.numpy.save_file(saved, tmp_path / 'one.safetensors')
    read = weights_file.read_state_dict(tmp_path / 'one.safetensors')
    imported = torch_interop.from_one_checkpoint(read, jax.eval_shape(lambda: variables), 11)
    chex.assert_trees_all_equal(imported, variables)
    chex.assert_trees_all_equal(torch_interop.to_one_checkpoint(imported, 11), state_dict)


def test_weights_that_do_not_fit_are_all_listed():
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


def test_weights_of_another_number_of_branches_are_an_error():
    two, three = (random_variables(make_ensemble(['resnet8'] * number)) for number in (2, 3))
    with pytest.raises(UserError, match=r'unknown branches\.2\.fc\.bias'):
        torch_interop.from_state_dict(torch_interop.to_state_dict(three, 3), two, 2)
    with pytest.raises(UserError, match=r'missing branches\.2\.fc\.bias'):
        torch_interop.from_state_dict(torch_interop.to_state_dict(two, 2), three, 3)
