"""The fields of the configuration: defaults, validation, stored configs."""

import json
from pathlib import Path

import pytest

from one_jax import config as config_lib
from one_jax.errors import ConfigError


def valid(**fields):
    config = config_lib.default_config()
    config.update_from_flattened_dict({'data.generated_examples': 64, **fields})
    return config


def test_default_config_has_a_comment_above_every_field():
    source = Path(config_lib.__file__).read_text().splitlines()
    for number, line in enumerate(source):
        words = line.split()
        if len(words) > 2 and words[1] == '=' and words[0].count('.') == 1 and line[4] != ' ':
            previous = source[number - 1]
            assert 'ConfigDict()' in line or previous.strip().startswith('# '), line


def test_resolve_after_an_override_follows_it():
    config = valid()
    method = config_lib.validate(config)
    assert (method.name, method.num_branches, method.share_stages) == ('one', 3, 2)
    assert config_lib.resolve(config).method.temperature == 3.0
    config.method.temperature = 4.0
    resolved = config_lib.resolve(config)
    assert resolved.method.temperature == 4.0
    assert resolved.method.distill_weight == 1.0
    # A JSON round trip changes nothing.
    assert config_lib.differences(json.loads(resolved.to_json()), resolved.to_dict()) == []


BAD = {
    'seed': [-1, 2**32],
    'model.name': ['resnet', ''],
    'model.num_branches': [0, -3],
    'model.share_stages': [-1, 3],
    'model.dtype': ['float16', 'float64'],
    'model.branch_conv': ['sparse'],
    'model.remat': ['all'],
    'method.name': ['on'],
    'method.temperature': [0.0, -1.0, float('nan'), float('inf')],
    'method.distill_weight': [-0.1, float('nan')],
    'method.rampup_fraction': [-0.1, 1.1],
    'data.batch_size': [0, 6],
    'data.eval_batch_size': [0, 6],
    'data.augment': ['flip'],
    'data.padding': [-2],
    # Without effect on CIFAR-100, which is in memory.
    'data.root': ['images'],
    'data.image_size': [64],
    'data.validation_fraction': [-0.1, 1.0],
    'data.examples_per_class': [-1],
    'data.generated_examples': [-1],
    'data.mixup_alpha': [-0.1],
    'data.cutmix_alpha': [float('nan')],
    'optimizer.learning_rate': [-0.1, float('inf')],
    'optimizer.momentum': [1.0, -0.1],
    'optimizer.weight_decay': [-1e-4],
    'optimizer.schedule': ['linear'],
    'optimizer.milestones': [(0.5, 1.0), (0.0,), (0.75, 0.5), (0.5, 0.5)],
    'optimizer.warmup_epochs': [-1.0],
    'train.epochs': [0],
    'train.label_smoothing': [1.0, -0.1],
    'train.ema_decay': [1.0, -0.1],
    'train.steps': [-1],
    'train.log_every': [0],
    'train.eval_every_epochs': [0],
    'train.checkpoint_every_epochs': [0],
    'train.keep_checkpoints': [0],
    'train.steps_per_call': [-1],
    'data.placement': ['gpu'],
    'data.decode_threads': [-1],
    'data.prefetch': [0],
    'profile_steps': [-1],
}


@pytest.mark.parametrize(('field', 'value'), [(f, v) for f, values in BAD.items() for v in values])
def test_validate_of_a_bad_value_names_the_field(field, value):
    config = valid()
    # An unknown data set cannot be generated, which would be the error then.
    real = {'data.generated_examples': 0} if field == 'data.name' else {}
    config.update_from_flattened_dict({**real, field: value})
    with pytest.raises(ConfigError) as raised:
        config_lib.validate(config, num_devices=4)
    assert raised.value.field == field
    assert str(raised.value).startswith(f'{field}={value!r} is not allowed: ')
    assert '\n' not in str(raised.value)


def test_validate_of_plain_with_branches_is_an_error():
    config_lib.validate(valid(**{'method.name': 'plain', 'model.num_branches': 1}))
    assert config_lib.resolve(valid(**{'method.name': 'plain'})).model.num_branches == 1
    with pytest.raises(ConfigError, match='num_branches=3 is not allowed: exactly 1'):
        config_lib.validate(valid(**{'method.name': 'plain', 'model.num_branches': 3}))


def test_differences_leave_machine_fields_out():
    config = config_lib.resolve(valid()).to_dict()
    other = config_lib.resolve(
        valid(**{'data.data_dir': '/elsewhere', 'optimizer.momentum': 0.8})
    ).to_dict()
    assert config_lib.differences(config, other) == [
        'optimizer.momentum: 0.9 in the workdir, 0.8 now'
    ]


def test_differences_of_an_older_config_use_the_default_of_a_new_field():
    older = config_lib.resolve(valid()).to_dict()
    del older['train']['ema_decay']
    stored = config_lib.stored_config(older)
    assert config_lib.differences(stored, config_lib.resolve(valid()).to_dict()) == []
    config = config_lib.resolve(valid(**{'train.ema_decay': 0.9})).to_dict()
    assert config_lib.differences(stored, config) == [
        'train.ema_decay: 0.0 in the workdir, 0.9 now'
    ]
