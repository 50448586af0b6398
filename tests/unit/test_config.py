"""The fields of the configuration: defaults, validation, stored configs."""

import json
from pathlib import Path

import pytest

from one_jax import config as config_lib
from one_jax import fields, methods
from one_jax.errors import ConfigError
from one_jax.methods import base


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


# Every field that is a number, its type, and a method that reads it.
NUMBERS = [
    *(
        (field, type(value), 'one')
        for field, value in fields.flatten(config_lib.default_config()).items()
        if type(value) in (int, float)
    ),
    ('model.num_branches', int, 'one'),
    ('model.share_stages', int, 'one'),
    *(
        (f'method.{field}', type(value), name)
        for name, method in methods.registered().items()
        for field, value in base.defaults(method).items()
        if type(value) in (int, float)
    ),
]
# Below and above every bound, and no numbers.
NASTY = {
    int: (10**20, -(10**20), 10**400),
    float: (1e300, -1e300, float('nan'), float('inf'), -float('inf'), 1e-300),
}


@pytest.mark.parametrize(('field', 'kind', 'method'), NUMBERS)
def test_validate_of_a_number_out_of_all_bounds_names_the_field(field, kind, method):
    teachers = {'method.teachers': 'a,b,c'} if methods.registered()[method].min_teachers else {}
    for value in NASTY[kind]:
        with pytest.raises(ConfigError) as raised:
            config_lib.validate(valid(**{'method.name': method, **teachers, field: value}))
        assert raised.value.field == field


BAD = {
    'seed': [-1, 2**32, None, True],
    'sync_batch_norm': [None],
    'model.name': ['resnet', ''],
    'model.num_branches': [0, -3, 65, 300, 4294967296, True],
    'model.branch_networks': [None, 'resnet33', 'resnet8@2'],
    'model.share_stages': [-1, 3],
    'model.dtype': ['float16', 'float64'],
    'model.branch_conv': ['sparse'],
    'model.remat': ['all'],
    'method.name': ['on'],
    'method.temperature': [0.0, -1.0, 1000.0, float('nan'), float('inf')],
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
    'optimizer.milestones': [
        *((0.5, 1.0), (0.0,), (0.75, 0.5), (0.5, 0.5), (float('nan'),)),
        *(None, ('a',), (None,), ((0.5,),), (True,)),
    ],
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
    shown = list(value) if isinstance(value, tuple) else value
    assert str(raised.value).startswith((f'{field}={value!r} is', f'{field}={shown!r} is'))
    assert '\n' not in str(raised.value)


# A field, a value without effect, and what gives it one.
WITHOUT_EFFECT = {
    'milestones': ({'optimizer.milestones': (0.3,)}, {'optimizer.schedule': 'step'}),
    'decay factor': ({'optimizer.decay_factor': 0.2}, {'optimizer.schedule': 'step'}),
    'root': ({'data.root': 'images'}, {'data.name': 'image_folder'}),
    'data_dir': ({'data.data_dir': 'images'}, {'data.name': 'cifar10'}),
    'image_size': ({'data.image_size': 64}, {'data.stream': True}),
    'stream': ({'data.stream': True}, {'data.generated_examples': 0}),
    'padding': ({'data.padding': 2}, {'data.augment': 'pad_crop'}),
    'skip_unreadable': (
        {'data.skip_unreadable': True},
        {'data.name': 'image_folder', 'data.root': 'x', 'data.generated_examples': 0},
    ),
    'subset_seed': ({'data.subset_seed': 1}, {'data.validation_fraction': 0.1}),
    'mixup': ({'data.mixup_alpha': 0.2}, {'data.batch_size': 2}),
    'cutmix': ({'data.cutmix_alpha': 0.2}, {'data.batch_size': 2}),
    'label smoothing': ({'train.label_smoothing': 0.1}, {'method.name': 'kd'}),
    'leader weight': ({'method.leader_weight': 0.5}, {'method.leader': True}),
}
# Settings under which those values change nothing.
IDLE = {
    'data_dir': {'data.name': 'image_folder'},
    'stream': {'data.generated_examples': 64},
    'mixup': {'data.batch_size': 1},
    'cutmix': {'data.batch_size': 1},
    'label smoothing': {'method.name': 'meal', 'method.teachers': 'teacher'},
    'leader weight': {'method.name': 'okddip', 'method.leader': False},
}
USUAL_IDLE = {
    'optimizer.schedule': 'cosine',
    'data.name': 'svhn',
    'data.generated_examples': 0,
}


@pytest.mark.parametrize('case', WITHOUT_EFFECT)
def test_validate_of_a_field_without_effect_is_an_error_unless_told_otherwise(case):
    settings, effective = WITHOUT_EFFECT[case]
    idle = {**USUAL_IDLE, **IDLE.get(case, {}), **settings}
    with pytest.raises(ConfigError, match=r'is not allowed: its default, .*, unless ') as raised:
        config_lib.validate(valid(**idle))
    assert raised.value.field == next(iter(settings))
    # The run of an earlier version can be evaluated, also from its resolved config.
    config_lib.validate(config_lib.resolve(valid(**idle)), effects=False)
    config_lib.validate(valid(**{**idle, **effective}))


def test_every_field_in_the_table_of_effects_has_a_case():
    covered = {next(iter(settings)) for settings, _ in WITHOUT_EFFECT.values()}
    assert config_lib._EFFECTS.keys() == covered


def test_validate_of_plain_with_branches_is_an_error():
    config_lib.validate(valid(**{'method.name': 'plain', 'model.num_branches': 1}))
    assert config_lib.resolve(valid(**{'method.name': 'plain'})).model.num_branches == 1
    with pytest.raises(ConfigError, match='num_branches=3 is not allowed: exactly 1'):
        config_lib.validate(valid(**{'method.name': 'plain', 'model.num_branches': 3}))


def test_differences_leave_machine_fields_out():
    config = config_lib.resolve(valid()).to_dict()
    other = config_lib.resolve(
        valid(
            **{'data.data_dir': '/elsewhere', 'model.init_from': 'moved', 'optimizer.momentum': 0.8}
        )
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
