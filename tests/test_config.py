"""Configuration: options, validation, and every file in configs/."""

import functools
import importlib.util
import json
import re
from pathlib import Path

import commands
import jax
import numpy as np
import pytest
from commands import REPOSITORY

from one_jax import config as config_lib
from one_jax import methods, models, parallel, recipe, recipes, train
from one_jax.data import datasets, resident
from one_jax.errors import ConfigError, UserError
from one_jax.models import cost
from one_jax.state import init_state

CONFIGS = sorted((REPOSITORY / 'configs').glob('*.py'))


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
    'model.keep_activations': ['none'],
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
    'train.steps_per_call': [-1],
    'data.placement': ['gpu'],
    'data.decode_threads': [-1],
    'data.prefetch': [0],
    'profile_steps': [-1],
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


# What stands for the folders of frozen teachers, where nothing of them is read.
TEACHERS = 'first', 'second', 'third'


def with_teachers(config, folders=TEACHERS):
    """The config, with as many teachers as its method wants, if it wants any."""
    method = methods.registered()[config.method.name]
    if method.min_teachers:
        number = 3 if config.method.name == 'ekd' else method.min_teachers
        config.method.teachers = ','.join(folders[:number])
    return config


@functools.cache
def _parameters(fields, num_classes, image_shape):
    config = config_lib.default_config()
    config.update_from_flattened_dict(dict(fields))
    config = config_lib.resolve(config)
    method = methods.create(config)
    network = models.make_network(config.model, num_classes, method)
    if method.deployed == 'ensemble':
        deployed = network.clone(make_aggregator=None)
    else:
        name = method.members[int(method.deployed.removeprefix('branch '))]
        deployed = models.make_backbone(name, num_classes)()
    images = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    return [
        cost.count_parameters(
            jax.eval_shape(
                lambda key, x, module=module: module.init(key, x, train=False),
                jax.random.key(0),
                images,
            )['params']
        )
        for module in (deployed, network)
    ]


def parameters(config):
    """Of the deployed network and of the one in training; by abstract evaluation."""
    spec = datasets.DATASETS[config.data.name]
    fields = tuple(
        (f'{group}.{name}', value)
        for group in ('model', 'method')
        for name, value in config[group].items()
    )
    return _parameters(fields, spec.num_classes, spec.image_shape)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_every_config_says_what_it_is(path):
    config, header = get_config(path)
    for part in ('Source:', 'Recipe:', 'Expect:', f'--config=configs/{path.name}', 'Variants:'):
        assert part in header
    name = config.method.name
    assert name == 'one' or path.stem.endswith(f'_{name}')
    config = config_lib.resolve(with_teachers(config))
    plain = config_lib.resolve(get_config(path, 'plain')[0])
    assert (plain.method.name, plain.model.num_branches) == ('plain', 1)
    changed = {
        line.partition(':')[0] for line in config_lib.differences(config.to_dict(), plain.to_dict())
    }
    changed = {field for field in changed if not field.startswith('method.')}
    # The network and its recipe are the same; what is shared matters to branches alone.
    assert changed - {'model.share_stages'} == (
        set() if config.model.num_branches == 1 else {'model.num_branches'}
    )

    temperature = re.search(r'\bT = (\d+)', header)
    if 'temperature' in config.method and path.stem != 'image_folder':
        assert float(temperature[1]) == config.method.temperature
    if 'CIFAR' in header or 'MNIST' in header:
        assert f'weight decay {config.optimizer.weight_decay:.0e}'.replace('e-0', 'e-') in re.sub(
            r'\s+', ' ', header
        )
    reconstructed = 'as reconstructed' in header.lower()
    assert reconstructed == (name in ('mde', 'ekd', 'boc_kd'))

    counts = re.search(r'([\d,]+)\s+parameters\s+deployed\s+\(([\d,]+)\s+in\s+training\)', header)
    if counts:
        assert [counts[1], counts[2]] == [f'{number:,}' for number in parameters(config)]
    else:
        assert path.stem in ('image_folder', 'mnist5k_resnet8')


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_the_commands_and_options_of_every_header_are_there(path):
    _, header = get_config(path)
    commands = re.findall(r'--config=(configs/\w+\.py):?([\w,]*)', header)
    assert (f'configs/{path.name}', '') in commands
    defaults = config_lib.flatten(config_lib.default_config().to_dict())
    for config_path, options in commands:
        config, _ = get_config(REPOSITORY / config_path, options)
        config_lib.resolve(with_teachers(config))
    for field in re.findall(r'--config\.([\w.]+)=', header):
        assert field in defaults
    variants = header[header.index('Variants:') :]
    for option in re.findall(r'`:(\w+)`', variants):
        config, _ = get_config(path, option)
        config_lib.resolve(with_teachers(config))


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_every_smoke_variant_is_valid_and_small(path):
    for options in ('smoke,plain', 'plain,smoke'):
        config_lib.validate(get_config(path, options)[0])
    config, _ = get_config(path, 'smoke')
    spec = config_lib.validate(with_teachers(config))
    assert config.train.steps <= 4
    assert spec.num_classes == datasets.DATASETS[config.data.name].num_classes
    assert parameters(config_lib.resolve(config))[1] < 1_300_000


def test_every_method_has_its_configs():
    made = {path.stem: get_config(path)[0] for path in CONFIGS}
    for data in ('cifar100', 'mnist5k'):
        configured = {config.method.name for config in made.values() if config.data.name == data}
        # The plain network is a variant of every config.
        assert configured == set(methods.registered()) - {'plain'}


def test_a_config_without_its_teachers_says_how_to_give_them():
    for name in ('kd', 'meal', 'ekd'):
        config, _ = get_config(REPOSITORY / f'configs/mnist5k_resnet8_{name}.py', 'smoke')
        with pytest.raises(ConfigError, match=r'--config\.method\.teachers=DIR,DIR'):
            config_lib.validate(config)


def test_limited_data_take_as_many_steps_as_all():
    path = REPOSITORY / 'configs/cifar100_resnet20_ekd.py'
    for option, per_class, steps_per_epoch in (
        ('per_class_50', 50, 39),
        ('per_class_100', 100, 78),
    ):
        config, _ = get_config(path, option)
        assert config.data.examples_per_class == per_class
        # 300 epochs of 390 whole batches of 128 of the 50,000 images.
        assert config.train.steps == 300 * 390
        assert config.train.eval_every_epochs * steps_per_epoch == 390
    config, _ = get_config(REPOSITORY / 'configs/cifar10_resnet20_ekd.py', 'per_class_50')
    # 500 images, three batches.
    assert config.train.eval_every_epochs == 130


def test_the_fields_of_a_method_can_be_given_with_it():
    config = recipes.published('resnet32', 'cifar10', method='okddip', leader=False)
    method = methods.create(config)
    assert (method.name, method.deployed) == ('okddip', 'branch 0')
    assert recipes.mnist5k('few', 'dml', temperature=2.0).method.temperature == 2.0
    paper = recipes.published('resnet32', 'cifar100', 'paper', 'mde').method
    assert (paper.diversity_side, paper.diversity_norm) == ('feature', 'fro')
    assert paper.diversity_weight == 5e-8
    with pytest.raises(UserError, match="'paper' is not one of"):
        recipes.published('resnet32', 'cifar100', 'paper')


def smoke_configs():
    """One config for each network family of ONE, and one for each other method."""
    chosen = {}
    for path in CONFIGS:
        config, _ = get_config(path, 'smoke')
        name = config.method.name
        kind = config.model.name if name == 'one' else name
        small = config.data.name == 'mnist5k'
        if kind not in chosen or (small and name != 'one'):
            chosen[kind] = path
    return list(chosen.values())


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    """The folder of a tiny network, exported by the real commands."""
    folder = tmp_path_factory.mktemp('teacher')
    plain = '--config=configs/mnist5k_resnet8.py:smoke,plain'
    cache = '--config.train.compilation_cache_dir='
    commands.run('main', plain, cache, f'--workdir={folder / "run"}')
    commands.run('export', f'--workdir={folder / "run"}', f'--output={folder / "student"}')
    return str(folder / 'student')


@pytest.mark.parametrize('path', smoke_configs(), ids=lambda path: path.stem)
def test_a_config_takes_a_smoke_step(path, request):
    config, _ = get_config(path, 'smoke')
    if methods.registered()[config.method.name].min_teachers:
        with_teachers(config, (request.getfixturevalue('teacher'),) * 3)
    if config.method.name == 'boc_kd':
        # Unlike members are compiled one by one: two tell as much as five.
        config.model.num_branches = 2
    spec = config_lib.validate(config)
    dataset = datasets.load(config.data)
    batches = resident.ResidentBatches(dataset.splits['train'], config.data.batch_size, config.seed)
    made = recipe.make_recipe(config_lib.resolve(config), dataset.spec, batches.steps_per_epoch)
    mesh = parallel.make_mesh(jax.devices()[:1])
    method_state = made.method.initial_state()
    state = jax.jit(
        lambda: init_state(
            made.network, made.optimizer, spec.image_shape, 0, method_state=method_state
        )
    )()
    batch = {name: array[None] for name, array in batches.batch(0).items()}
    teachers = parallel.replicate([teacher.variables for teacher in made.teachers], mesh)
    step = train.make_train_step(made, mesh)
    state, metrics = step(parallel.replicate(state, mesh), batch, *teachers)
    assert int(state.step) == 1
    assert np.isfinite(metrics['loss']).all()
    # The untrained network is near chance: each of its branches, and ONE's teacher.
    chance = np.log(spec.num_classes)
    if 'branch_cross_entropy' in metrics:
        mean = metrics['branch_cross_entropy'].mean()
        assert 0.7 * chance < mean < 2.5 * chance
    if made.method.name == 'one':
        assert 0.7 * 4 * chance < metrics['loss'][0] < 2.5 * 4 * chance
