"""Configuration: options, validation, and every file in configs/."""

import functools
import importlib.util
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from one_jax import config as config_lib
from one_jax import models, parallel, recipe, train
from one_jax.data import datasets, resident
from one_jax.errors import ConfigError, UserError
from one_jax.models import aggregators, cost, multibranch
from one_jax.state import init_state

CONFIGS = sorted((Path(__file__).parent.parent / 'configs').glob('*.py'))


def get_config(path, options=''):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(options), module.__doc__


def valid(**fields):
    config = config_lib.default_config()
    config.update_from_flattened_dict({'data.generated_examples': 64, **fields})
    return config


def test_every_field_of_the_default_has_a_comment():
    source = Path(config_lib.__file__).read_text().splitlines()
    for number, line in enumerate(source):
        words = line.split()
        if len(words) > 2 and words[1] == '=' and words[0].count('.') == 1 and line[4] != ' ':
            previous = source[number - 1]
            assert 'ConfigDict()' in line or previous.strip().startswith('# '), line


def test_the_default_is_valid_and_its_derived_values_follow_overrides():
    config = valid()
    spec = config_lib.validate(config)
    assert (spec.name, spec.num_classes, spec.image_shape) == ('cifar100', 100, (32, 32, 3))
    assert config_lib.resolve(config).method.temperature == 3.0
    config.method.temperature = 4.0
    resolved = config_lib.resolve(config)
    assert resolved.method.temperature == 4.0
    assert resolved.method.distill_weight == 1.0
    # What JSON gives back is the same config.
    assert config_lib.differences(json.loads(resolved.to_json()), resolved.to_dict()) == []


BAD = {
    'seed': [-1, 2**32],
    'model.name': ['resnet', ''],
    'model.num_branches': [0, -3],
    'model.share_stages': [-1, 3],
    'model.dtype': ['float16'],
    'model.branch_conv': ['sparse'],
    'method.name': ['on'],
    'method.temperature': [0.0, -1.0, float('nan'), float('inf')],
    'method.distill_weight': [-0.1, float('nan')],
    'method.rampup_fraction': [-0.1, 1.1],
    'data.name': ['cifar', '../cifar10'],
    'data.batch_size': [0, 6],
    'data.eval_batch_size': [0, 6],
    'data.augment': ['flip'],
    'data.padding': [-2, 32],
    'data.validation_fraction': [-0.1, 1.0],
    'data.examples_per_class': [-1],
    'data.generated_examples': [-1],
    'data.mixup_alpha': [-0.1],
    'data.cutmix_alpha': [float('nan')],
    'optimizer.learning_rate': [-0.1, float('inf')],
    'optimizer.momentum': [1.0, -0.1],
    'optimizer.weight_decay': [-1e-4],
    'optimizer.schedule': ['linear'],
    'optimizer.milestones': [(0.5, 1.0), (0.0,)],
    'optimizer.warmup_epochs': [-1.0],
    'train.epochs': [0],
    'train.label_smoothing': [1.0, -0.1],
    'train.ema_decay': [1.0, -0.1],
    'train.steps': [-1],
    'train.log_every': [0],
    'train.eval_every_epochs': [0],
    'train.checkpoint_every_epochs': [0],
    'train.keep_checkpoints': [0],
    'train.steps_per_call': [0],
}


@pytest.mark.parametrize(('field', 'value'), [(f, v) for f, values in BAD.items() for v in values])
def test_a_value_that_is_not_allowed_is_named(field, value):
    config = valid()
    # An unknown data set cannot be generated, which would be the error then.
    real = {'data.generated_examples': 0} if field == 'data.name' else {}
    config.update_from_flattened_dict({**real, field: value})
    with pytest.raises(ConfigError) as raised:
        config_lib.validate(config, num_devices=4)
    assert raised.value.field == field
    assert str(raised.value).startswith(f'{field}={value!r} is not allowed: ')
    assert '\n' not in str(raised.value)


def test_plain_has_one_branch():
    config_lib.validate(valid(**{'method.name': 'plain', 'model.num_branches': 1}))
    assert config_lib.resolve(valid(**{'method.name': 'plain'})).model.num_branches == 1
    with pytest.raises(ConfigError, match='num_branches=3 is not allowed: exactly 1'):
        config_lib.validate(valid(**{'method.name': 'plain', 'model.num_branches': 3}))


def test_differences_pass_over_where_things_are():
    config = config_lib.resolve(valid()).to_dict()
    other = config_lib.resolve(
        valid(**{'data.data_dir': '/elsewhere', 'optimizer.momentum': 0.8})
    ).to_dict()
    assert config_lib.differences(config, other) == [
        'optimizer.momentum: 0.9 in the workdir, 0.8 now'
    ]


def test_a_config_of_before_a_field_existed_has_its_default():
    stored = config_lib.resolve(valid()).to_dict()
    del stored['train']['ema_decay']
    assert config_lib.differences(stored, config_lib.resolve(valid()).to_dict()) == []
    config = config_lib.resolve(valid(**{'train.ema_decay': 0.9})).to_dict()
    assert config_lib.differences(stored, config) == [
        'train.ema_decay: 0.0 in the workdir, 0.9 now'
    ]


def test_options_are_applied_in_their_order_and_unknown_ones_refused():
    config = config_lib.apply_options(
        config_lib.default_config(), 'smoke,plain', smoke={'train.steps': 2}
    )
    assert config.method.name == 'plain'
    assert config_lib.resolve(config).model.num_branches == 1
    assert config.train.steps == 2
    assert config.data.generated_examples > 0
    with pytest.raises(UserError, match="option 'smok' is not one of 'plain', 'smoke'"):
        config_lib.apply_options(config_lib.default_config(), 'smok')


@functools.cache
def parameters(network, num_branches, num_classes, image_shape):
    """Of the network with a gate, or of the plain one; by abstract evaluation."""
    make_backbone = models.make_backbone(network, num_classes)
    if num_branches == 1:
        return cost.forward_cost(make_backbone(), image_shape)[0]
    gate = functools.partial(aggregators.Gate, num_branches)
    return cost.forward_cost(
        multibranch.MultiBranch((make_backbone,), num_branches, 2, make_aggregator=gate),
        image_shape,
    )[0]


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_every_config_says_what_it_is(path):
    config, header = get_config(path)
    for part in ('Source:', 'Recipe:', 'Expect:', f'--config=configs/{path.name}', 'Variants:'):
        assert part in header
    config = config_lib.resolve(config)
    assert config.model.share_stages == 2
    plain = config_lib.resolve(get_config(path, 'plain')[0])
    assert (plain.method.name, plain.model.num_branches) == ('plain', 1)
    changed = {
        line.partition(':')[0] for line in config_lib.differences(config.to_dict(), plain.to_dict())
    }
    changed = {field for field in changed if not field.startswith('method.')}
    assert changed == {'model.num_branches'}

    counts = re.search(r'([\d,]+) parameters\s+deployed \(([\d,]+) in\s+training\)', header)
    if counts:
        spec = datasets.DATASETS[config.data.name]
        shape = (spec.num_classes, spec.image_shape)
        assert counts[1] == f'{parameters(config.model.name, 1, *shape):,}'
        assert counts[2] == f'{parameters(config.model.name, 3, *shape):,}'
    else:
        assert path.stem in ('image_folder', 'mnist5k_resnet8')


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_every_config_takes_a_smoke_step(path):
    for options in ('smoke,plain', 'plain,smoke'):
        config_lib.validate(get_config(path, options)[0])
    config, _ = get_config(path, 'smoke')
    spec = config_lib.validate(config)
    assert config.train.steps <= 4
    assert spec.num_classes == datasets.DATASETS[config.data.name].num_classes
    dataset = datasets.load(config.data)
    batches = resident.ResidentBatches(dataset.splits['train'], config.data.batch_size, config.seed)
    made = recipe.make_recipe(config_lib.resolve(config), dataset.spec, batches.steps_per_epoch)
    assert cost.forward_cost(made.network, spec.image_shape)[0] < 1_300_000
    mesh = parallel.make_mesh(jax.devices()[:1])
    state = jax.jit(lambda: init_state(made.network, made.optimizer, spec.image_shape, 0))()
    batch = {name: array[None] for name, array in batches.batch(0).items()}
    state, metrics = train.make_train_step(made, mesh)(parallel.replicate(state, mesh), batch)
    assert int(state.step) == 1
    assert np.isfinite(metrics['loss']).all()
    # The untrained network is near chance: three branches and the teacher.
    chance = 4 * np.log(spec.num_classes)
    assert 0.7 * chance < metrics['loss'][0] < 2.5 * chance
