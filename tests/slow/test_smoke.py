"""One short run for each network family: the `:smoke` variant of its recipe, start to end."""

import importlib

import numpy as np
import pytest

from one_jax import train


@pytest.mark.parametrize(
    'name', ['cifar10_resnet110', 'cifar10_resnext29', 'svhn_densenet190', 'imagenet_seresnet18']
)
def test_smoke_run_of_a_network_family_starts_near_chance(name, tmp_path):
    config = importlib.import_module(f'configs.{name}').get_config('smoke')
    config.model.num_branches = 2
    config.train.steps = 1
    result = train.train_and_evaluate(config, tmp_path)
    chance = np.log(1000 if 'imagenet' in name else 10)
    assert (result['step'], result['network']) == (1, config.model.name)
    assert all(0.7 * chance < nll < 3 * chance for nll in result['branch_nll'])
