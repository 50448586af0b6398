"""KDCL in training: crops for each network, heterogeneous networks, held-out images, resuming."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from training_fixtures import (
    Setting,
    assert_same_run,
    saved_state,
    small_config,
    stopping_after,
)

from one_jax import config as config_lib
from one_jax import train
from one_jax.errors import ConfigError
from one_jax.runtime import parallel
from one_jax.runtime.interrupt import Interrupted
from one_jax.training import inputs

small = functools.partial(
    small_config,
    **{'method.name': 'kdcl', 'data.generated_examples': 50, 'data.validation_fraction': 0.2},
)


@pytest.mark.parametrize('own_augmentation', [True, False])
def test_own_augmentation_crops_images_for_each_network(own_augmentation):
    fields = {'method.own_augmentation': own_augmentation, 'data.augment': 'pad_crop_flip'}
    setting = Setting(**{'method.name': 'kdcl', 'data.padding': 2, **fields})
    mesh = parallel.make_mesh(jax.devices()[:1])
    batch = setting.host_batch(0)
    views = jax.jit(
        jax.shard_map(
            lambda images, labels: (
                inputs.training_inputs(
                    setting.experiment, mesh, jax.random.key(0), images, labels
                ).images
            ),
            mesh=mesh,
            in_specs=parallel.BATCH,
            out_specs=P(None, parallel.DATA_AXIS) if own_augmentation else parallel.BATCH,
        )
    )(batch['image'], batch['label'])
    if not own_augmentation:
        assert views.shape == (8, 8, 8, 3)
        return
    assert views.shape == (2, 8, 8, 8, 3)
    same = (np.asarray(views[0]) == np.asarray(views[1])).all(axis=(1, 2, 3))
    assert same.sum() <= 2


def test_general_teacher_without_held_out_images_is_an_error():
    config = small(**{'method.teacher': 'general', 'data.validation_fraction': 0.0})
    with pytest.raises(ConfigError, match=r'data.validation_fraction=0.0 is not allowed'):
        config_lib.validate(config, 4)
    config_lib.validate(small(**{'data.validation_fraction': 0.0}), 4)


def test_heterogeneous_networks_with_the_general_teacher_resume_bit_for_bit(tmp_path):
    """Within an epoch, with the weights of the teacher in the checkpoint."""
    networks = {'model.num_branches': None, 'model.branch_networks': 'resnet8,wrn10_1'}
    config = small(**networks, **{'method.teacher': 'general'})
    result = train.train_and_evaluate(config, tmp_path / 'whole')
    assert 'validation_deployed_top1' in result
    assert result['branch_network'] == ['resnet8', 'wrn10_1']
    state, step = saved_state(tmp_path / 'whole')
    assert step == 10
    weights = state['method.weights']
    assert weights.sum() == pytest.approx(1, rel=1e-5)
    assert abs(weights[0] - 0.5) > 1e-4
    with stopping_after(7), pytest.raises(Interrupted):
        train.train_and_evaluate(config, tmp_path / 'resumed')
    assert saved_state(tmp_path / 'resumed')[1] == 7
    train.train_and_evaluate(config, tmp_path / 'resumed')
    assert_same_run(tmp_path / 'resumed', tmp_path / 'whole')
