"""Every file in configs/ with its options: valid, resolved, and of the size its docstring gives."""

import functools
import importlib
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import common
from one_jax import config as config_lib
from one_jax import methods, models
from one_jax.data.table import DATASETS
from one_jax.errors import ConfigError, UserError
from one_jax.models import cost

FOLDER = Path(common.__file__).parent
NAMES = sorted({path.stem for path in FOLDER.glob('*.py')} - {'__init__', 'common'})
METHODS = sorted(methods.registered())
TEACHERS = ('first', 'second', 'third')
# What the released code of ONE's authors can train.
AUTHORS = [
    f'{data}_{net}' for data in ('cifar10', 'cifar100', 'svhn') for net in ('resnet32', 'resnet110')
]

# Parameters deployed and in training, which the docstrings quote.
PARAMETERS = {
    'cifar10_densenet190': (25_624_430, 44_839_109),
    'cifar10_resnet110': (1_704_154, 4_294_263),
    'cifar10_resnet20:ekd': (788_462, 788_462),
    'cifar10_resnet32': (466_906, 1_175_639),
    'cifar10_resnet32:mde': (466_906, 1_543_288),
    'cifar10_resnext29': (34_426_698, 86_943_079),
    'cifar100_densenet190': (25_821_620, 45_430_679),
    'cifar100_resnet110': (1_727_284, 4_363_653),
    'cifar100_resnet20:ekd': (806_012, 806_012),
    'cifar100_resnet32': (472_756, 1_193_189),
    'cifar100_resnet32:boc_kd': (472_756, 1_041_430),
    'cifar100_resnet32:cl_ilr': (472_756, 1_193_084),
    'cifar100_resnet32:dml': (472_756, 945_512),
    'cifar100_resnet32:independent': (472_756, 1_193_084),
    'cifar100_resnet32:joint_average': (1_193_084, 1_193_084),
    'cifar100_resnet32:kd': (472_756, 472_756),
    'cifar100_resnet32:kdcl': (472_756, 945_512),
    'cifar100_resnet32:mde': (472_756, 1_566_688),
    'cifar100_resnet32:meal': (472_756, 472_756),
    'cifar100_resnet32:okddip': (472_756, 1_554_272),
    'cifar100_resnet32:plain': (472_756, 472_756),
    'cifar100_resnext29': (34_518_948, 87_219_829),
    'cinic10_densenet190': (25_624_430, 44_839_109),
    'cinic10_resnet110': (1_704_154, 4_294_263),
    'cinic10_resnet32': (466_906, 1_175_639),
    'cinic10_resnext29': (34_426_698, 86_943_079),
    'imagenet_resnet18': (11_689_512, 33_702_785),
    'imagenet_resnext50': (25_028_904, 72_263_425),
    'imagenet_seresnet18': (11_778_592, 33_958_969),
    'mnist5k_resnet8': (78_042, 194_903),
    'mnist5k_resnet8:boc_kd': (78_042, 181_528),
    'mnist5k_resnet8:cl_ilr': (78_042, 194_798),
    'mnist5k_resnet8:dml': (78_042, 156_084),
    'mnist5k_resnet8:ekd': (223_854, 223_854),
    'mnist5k_resnet8:independent': (78_042, 194_798),
    'mnist5k_resnet8:joint_average': (194_798, 194_798),
    'mnist5k_resnet8:kd': (78_042, 78_042),
    'mnist5k_resnet8:kdcl': (78_042, 156_084),
    'mnist5k_resnet8:mde': (78_042, 266_616),
    'mnist5k_resnet8:meal': (78_042, 78_042),
    'mnist5k_resnet8:okddip': (78_042, 254_200),
    'svhn_densenet190': (25_624_430, 44_839_109),
    'svhn_resnet110': (1_704_154, 4_294_263),
    'svhn_resnet32': (466_906, 1_175_639),
    'svhn_resnext29': (34_426_698, 86_943_079),
}


def get_config(name, options=''):
    """The recipe with its options, and with names for the teachers that its method requires."""
    config = importlib.import_module(f'configs.{name}').get_config(options)
    number = methods.registered()[config.method.name].min_teachers
    if number:
        number = 3 if config.method.name == 'ekd' else number
        config.method.teachers = ','.join(TEACHERS[:number])
    return config


def apply(options, **variants):
    return common.apply_options(config_lib.default_config(), options, smoke={}, **variants)


@functools.cache
def count_parameters(name, method_name, num_classes, image_shape):
    """Counts the parameters deployed and in training, by abstract evaluation."""
    config = config_lib.default_config()
    config.model.name, config.method.name = name, method_name
    if methods.registered()[method_name].min_teachers:
        config.method.teachers = ','.join(TEACHERS)
    config = config_lib.resolve(config)
    method = methods.create(config)
    network = models.make_multibranch(config.model, num_classes, method)
    deployed = models.make_backbone(name, num_classes)()
    if method.deployed == 'ensemble':
        deployed = network.clone(make_aggregator=None)
    images = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    return tuple(
        cost.count_parameters(
            jax.eval_shape(
                lambda key, x, module=module: module.init(key, x, train=False),
                jax.random.key(0),
                images,
            )['params']
        )
        for module in (deployed, network)
    )


@pytest.mark.parametrize('case', PARAMETERS)
def test_config_has_the_parameters_of_the_table(case):
    config = get_config(*case.split(':'))
    spec = DATASETS[config.data.name]
    counts = count_parameters(
        config.model.name, config.method.name, spec.num_classes, spec.image_shape
    )
    assert counts == PARAMETERS[case]


def test_every_config_is_in_the_table():
    assert {*NAMES} - {case.partition(':')[0] for case in PARAMETERS} == {'image_folder'}


@pytest.mark.parametrize('name', NAMES)
def test_config_with_any_option_is_valid(name):
    few = {'mnist5k': ('few',)}.get(name.partition('_')[0], ())
    few = ('per_class_50', 'per_class_100') if 'resnet20' in name else few
    if name in AUTHORS:
        few = (*few, 'authors', 'authors,plain', 'authors,smoke')
    options_of_all = {'', *METHODS, 'smoke', *few, 'mde,paper', 'plain,smoke'}
    if 'resnext' in name or 'densenet' in name:
        # There are no narrow copies of these networks.
        options_of_all.remove('boc_kd')
    for options in sorted(options_of_all):
        config = get_config(name, options)
        if not config.data.generated_examples:
            config.data.generated_examples = 1000
            config.data.examples_per_class = 0
        config_lib.validate(config)
        config_lib.resolve(config)
        # A warm-up would be longer than the run.
        short = config.train.steps <= 4 and not config.optimizer.warmup_epochs
        assert 'smoke' not in options or short


@pytest.mark.parametrize('network', ['wrn40_2', 'vgg16', 'resnet56'])
def test_config_takes_any_network(network):
    for options in ('', 'smoke', 'okddip,smoke'):
        config = get_config('cifar100_resnet32', options)
        config.model.name = network
        config.data.generated_examples = 1000
        config_lib.validate(config)


def test_options_in_any_order_give_the_same_config():
    first = get_config('mnist5k_resnet8', 'mde,paper,few,smoke')
    assert first.to_dict() == get_config('mnist5k_resnet8', 'smoke,few,paper,mde').to_dict()
    assert (first.train.steps, first.data.examples_per_class) == (4, 50)
    assert (first.method.diversity_side, first.method.diversity_weight) == ('feature', 5e-8)


def test_option_of_a_method_applies_its_recipe():
    assert get_config('cifar100_resnet32', 'okddip').optimizer.weight_decay == 5e-4
    assert get_config('cifar100_resnet32', 'dml').optimizer.weight_decay == 1e-4


@pytest.mark.parametrize('name', NAMES)
def test_option_authors_takes_the_settings_of_their_code(name):
    if name not in AUTHORS:
        with pytest.raises(UserError, match="'authors' is not one of"):
            get_config(name, 'authors')
        return
    config, plain = get_config(name, 'authors'), get_config(name, 'authors,plain')
    for each in (config, plain):
        assert (each.optimizer.nesterov, each.data.drop_last) == (False, False)
        # Their epochs count from 0: the first at the lower rate is number 151.
        steps = [round(share * 300 * 391) for share in each.optimizer.milestones]
        assert steps == ([150 * 391, 225 * 391] if 'svhn' in name else [151 * 391, 225 * 391])
    assert (config.method.target_epsilon, config.method.gate_scale) == (1e-7, 'uniform')
    assert (plain.method.target_epsilon, plain.method.gate_scale) == (None, None)
    ours = config_lib.resolve(get_config(name))
    assert (ours.optimizer.nesterov, ours.data.drop_last) == (True, True)
    assert (ours.method.target_epsilon, ours.method.gate_scale) == (0, 'ones')


@pytest.mark.parametrize('name', NAMES)
def test_config_cites_the_authors_code_only_for_what_it_has(name):
    document = importlib.import_module(f'configs.{name}').__doc__
    assert ("Authors' code (Lan1991Xu/ONE_NeurIPS2018)" in document) == (name in AUTHORS)
    assert ', and\n    the authors' not in document


def test_option_plain_keeps_the_recipe_and_drops_the_method():
    config = config_lib.default_config()
    config.model.num_branches, config.method.temperature = 4, 2.0
    common.apply_options(config, 'mde,paper,plain', smoke={})
    assert (config.method.name, config.optimizer.weight_decay) == ('plain', 5e-4)
    assert {value for field, value in config.method.items() if field != 'name'} == {None}
    assert config_lib.resolve(config).model.num_branches == 1


def test_option_of_the_recipe_is_overridden_by_smoke():
    config = apply('smoke,long', long={'train.steps': 1000, 'train.epochs': 7})
    assert (config.train.steps, config.train.epochs) == (4, 7)


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        ('smok', "option 'smok' is not one of .*'okddip'.*'one'.*'long', 'smoke', 'plain'"),
        ('paper', "option 'paper' is not one of"),
        ('dml,okddip', "'dml', 'okddip': give one method"),
    ],
)
def test_option_that_does_not_apply_is_an_error(options, words):
    with pytest.raises(UserError, match=words):
        apply(options, long={})


def test_few_images_train_as_many_steps_as_all():
    cases = {('cifar100', 50): 39, ('cifar100', 100): 78, ('cifar10', 50): 3, ('cifar10', 100): 7}
    for (data, per_class), steps_per_epoch in cases.items():
        config = get_config(f'{data}_resnet20', f'ekd,per_class_{per_class}')
        assert config.data.examples_per_class == per_class
        # 300 epochs of 390 whole batches of the 50,000 images.
        assert config.train.steps == 300 * 390
        assert config.train.eval_every_epochs == 390 // steps_per_epoch


def test_config_without_its_teachers_is_an_error_with_the_flag():
    for name in ('kd', 'meal', 'ekd'):
        config = importlib.import_module('configs.mnist5k_resnet8').get_config(f'{name},smoke')
        with pytest.raises(ConfigError, match=r'--config\.method\.teachers=DIR,DIR'):
            config_lib.validate(config)
