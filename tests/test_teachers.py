"""Frozen teachers: arguments of the step, never changed, checked before anything is done."""

import functools
import json
import re
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from method_fixtures import kl_divergence
from student_fixtures import write_student

from one_jax import config as config_lib
from one_jax import parallel, train
from one_jax.data import augment, datasets
from one_jax.errors import ConfigError
from one_jax.state import init_state
from one_jax.student import load_student


def make_config(folders, **fields):
    """KD of ResNet-8 on a few generated images, two steps an epoch for two epochs."""
    config = config_lib.default_config()
    config.update_from_flattened_dict(
        {
            'model.name': 'resnet8',
            'method.name': 'kd',
            'method.teachers': ','.join(map(str, folders)),
            'data.name': 'cifar10',
            'data.generated_examples': 16,
            'data.batch_size': 8,
            'data.eval_batch_size': 16,
            'data.augment': 'none',
            'train.epochs': 2,
            'train.compilation_cache_dir': '',
            **fields,
        }
    )
    return config


class Setting:
    """The compiled step with one frozen teacher, and its arguments."""

    def __init__(self, folder, network):
        config = make_config([])
        write_student(folder, config, network=network)
        config = config_lib.resolve(make_config([folder]))
        dataset = datasets.load(config.data)
        batches = dataset.train_batches(config.data.batch_size, config.seed)
        self.recipe = train.make_recipe(config, dataset.spec, batches.steps_per_epoch)
        self.mesh = parallel.make_mesh(jax.devices()[:1])
        self.step = train.make_train_step(self.recipe, self.mesh)
        self.batch = {name: array[None] for name, array in batches.batch(0).items()}
        self.teacher_variables = [teacher.variables for teacher in self.recipe.teachers]
        self.initialise = functools.partial(
            init_state, self.recipe.network, self.recipe.optimizer, dataset.spec.image_shape, 0
        )


def largest_constant(closed):
    """The size of the largest array that a jaxpr, or one inside of it, holds."""
    sizes = [np.size(constant) for constant in closed.consts]
    sizes += _literal_sizes(closed.jaxpr)
    return max(sizes, default=0)


def _literal_sizes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (np.size(v.val) for v in equation.invars if isinstance(v, core.Literal))
        for value in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: isinstance(x, core.ClosedJaxpr | core.Jaxpr),
        ):
            if isinstance(value, core.ClosedJaxpr):
                yield largest_constant(value)
            elif isinstance(value, core.Jaxpr):
                yield from _literal_sizes(value)


def test_a_teacher_is_an_argument_of_the_compiled_step(tmp_path):
    setting = Setting(tmp_path / 'teacher', 'wrn10_1')
    state = jax.eval_shape(setting.initialise)
    variables = setting.teacher_variables
    largest = max(leaf.size for leaf in jax.tree.leaves(variables))
    as_argument = jax.make_jaxpr(setting.step)(state, setting.batch, *variables)
    assert largest_constant(as_argument) < 100 < largest
    # The same program with the teacher in its closure: what must not be is seen where it is.
    closed_over = jax.make_jaxpr(lambda s, b: setting.step(s, b, *variables))(state, setting.batch)
    assert largest_constant(closed_over) == largest
    # Nothing of that size is written out in the program that goes to the compiler either: there an
    # array is a string of hexadecimal digits, eight for each number.
    program = setting.step.lower(state, setting.batch, *variables).as_text()
    arrays = re.findall(r'dense<"0x([0-9A-F]+)">', program)
    assert max(map(len, arrays), default=0) < 8 * 100


def test_a_teacher_is_evaluated_and_never_changed(tmp_path):
    setting = Setting(tmp_path / 'teacher', 'resnet8')
    recipe = setting.recipe
    state = jax.jit(setting.initialise)()
    images = augment.normalise(
        setting.batch['image'][0], recipe.spec.mean, recipe.spec.std, jnp.float32
    )

    @jax.jit
    def logits(student, teacher, images):
        own, _ = recipe.network.apply(student, images, train=True, mutable=['batch_stats'])
        network = recipe.teachers[0].network
        training, _ = network.apply(teacher, images, train=True, mutable=['batch_stats'])
        return own.logits[0], network.apply(teacher, images, train=False).logits, training.logits

    own, frozen, training = logits(state.variables, setting.teacher_variables[0], images)
    before = jax.device_get(setting.teacher_variables)
    variables = parallel.replicate(setting.teacher_variables, setting.mesh)
    for step in range(3):
        state, metrics = setting.step(state, setting.batch, *variables)
        if step == 0:
            actual = float(metrics['distillation'][0, 0])
    evaluated, trained = (
        kl_divergence(np.float64(teacher), np.float64(own), 4.0) for teacher in (frozen, training)
    )
    assert actual == pytest.approx(evaluated, rel=1e-3)
    assert abs(evaluated - trained) > 0.05 * evaluated
    chex.assert_trees_all_equal(jax.device_get(variables), before)
    chex.assert_trees_all_equal(before[0], load_student(tmp_path / 'teacher').variables)


UNSUITABLE = {
    'other classes': (
        {'num_classes': 7, 'label_names': list('abcdefg')},
        'num_classes is 7, not 10',
    ),
    'another size': ({'input_size': [28, 28]}, r'input_size is \[28, 28\], not \[32, 32\]'),
    'another mean': ({'mean': [0.5, 0.5, 0.5]}, r'mean is \(0.5, 0.5, 0.5\), not'),
    'another deviation': ({'std': [1.0, 1.0, 1.0]}, r'std is \(1.0, 1.0, 1.0\), not'),
}


@pytest.mark.parametrize('case', UNSUITABLE)
def test_a_teacher_of_other_data_is_refused(tmp_path, case):
    changes, words = UNSUITABLE[case]
    folder = write_student(tmp_path / 'teacher', make_config([]), **changes)
    with pytest.raises(ConfigError, match=words) as raised:
        train.train_and_evaluate(make_config([folder]), tmp_path / 'run')
    assert raised.value.field == 'method.teachers'
    assert raised.value.value == str(folder)
    assert not (tmp_path / 'run').exists()


def test_a_mean_that_json_rounded_is_the_same(tmp_path):
    config = make_config([])
    mean = [value + 1e-8 for value in datasets.describe(config.data).mean]
    Setting(tmp_path / 'teacher', 'resnet8')
    path = tmp_path / 'teacher/config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), 'mean': mean}))
    config = config_lib.resolve(make_config([tmp_path / 'teacher']))
    recipe = train.make_recipe(config, datasets.describe(config.data), 2)
    assert recipe.teachers[0].mean == tuple(mean)


def test_a_folder_without_a_student_is_refused(tmp_path):
    missing, empty = tmp_path / 'missing', tmp_path / 'empty'
    empty.mkdir()
    for folder in (missing, empty):
        with pytest.raises(
            ConfigError, match=r'holds no student: there is no config\.json'
        ) as error:
            train.train_and_evaluate(make_config([folder]), tmp_path / 'run')
        assert error.value.field == 'method.teachers'
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(('method', 'number'), [('kd', 0), ('meal', 0), ('ekd', 2)])
def test_a_wrong_number_of_teachers_is_refused(tmp_path, method, number):
    folders = [tmp_path / f'teacher{index}' for index in range(number)]
    with pytest.raises(ConfigError, match='folders') as raised:
        train.train_and_evaluate(make_config(folders, **{'method.name': method}), tmp_path / 'run')
    assert raised.value.field == 'method.teachers'
    assert not (tmp_path / 'run').exists()


def test_a_run_goes_on_with_the_teachers_it_began_with(tmp_path):
    """With one that was moved, and with no other and no more of them."""
    first, run = tmp_path / 'first', tmp_path / 'run'
    write_student(first, make_config([]))
    other = write_student(tmp_path / 'other', make_config([]), seed=1)
    expected = train.train_and_evaluate(make_config([first]), run)
    assert [teacher['network'] for teacher in expected['teachers']] == ['resnet8']

    # As if the run had been stopped after its first epoch.
    (run / 'result.json').unlink()
    steps = sorted((run / 'checkpoints').iterdir(), key=lambda path: path.name)
    newest = [path for path in steps if path.name.lstrip('0').startswith('4')]
    assert len(newest) == 1, steps
    shutil.rmtree(newest[0])
    for folders in ([other], [first, other]):
        with pytest.raises(ConfigError, match='the 1 with which the run began'):
            train.train_and_evaluate(make_config(folders), run)
    moved = first.rename(tmp_path / 'moved')
    result = train.train_and_evaluate(make_config([moved]), run)
    for record in (expected, result):
        del record['seconds']
    assert result == expected
