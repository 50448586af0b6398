"""`config.model.init_from`: a run that starts from an exported student."""

import chex
import jax
import numpy as np
import pytest
from student_fixtures import write_student
from training_fixtures import Setting, small_config

from one_jax import config as config_lib
from one_jax import methods
from one_jax.errors import ConfigError
from one_jax.models.multibranch import student_variables
from one_jax.students.student import load_student
from one_jax.training import initialisation

PLAIN = {'method.name': 'plain', 'model.num_branches': None, 'train.ema_decay': 0.9}


def write(folder, **changes):
    return write_student(folder, small_config(**{'data.name': 'cifar10'}), **changes)


def initial_state(**fields):
    return jax.device_get(Setting(**fields).initial_state(np.uint32(0)))


def without_classifier(tree):
    return {name: module for name, module in tree.items() if name != 'fc'}


def test_init_from_fills_every_branch_but_not_its_classifier(tmp_path):
    student = load_student(write(tmp_path / 'student', seed=3))
    state = initial_state(**{'model.init_from': str(tmp_path / 'student')})
    fresh = initial_state()
    for branch in range(2):
        own = student_variables(state.variables, branch)
        for collection, tree in student.variables.items():
            chex.assert_trees_all_equal(
                without_classifier(own[collection]), without_classifier(tree)
            )
        random = student_variables({'params': fresh.params}, branch)['params']['fc']
        chex.assert_trees_all_equal(own['params']['fc'], random)
    chex.assert_trees_all_equal(state.params['aggregator'], fresh.params['aggregator'])


def test_init_from_same_classes_fills_the_classifier_of_a_single_branch(tmp_path):
    student = load_student(write(tmp_path / 'student', seed=3))
    state = initial_state(**PLAIN, **{'model.init_from': str(tmp_path / 'student')})
    chex.assert_trees_all_equal(student_variables(state.variables, 0), dict(student.variables))
    chex.assert_trees_all_equal(state.averages, state.variables)


def test_init_from_other_classes_leaves_the_classifier_random(tmp_path):
    student = load_student(write(tmp_path / 'student', label_names=list('abcdefghij')))
    state = initial_state(**PLAIN, **{'model.init_from': str(tmp_path / 'student')})
    own = student_variables(state.variables, 0)['params']
    chex.assert_trees_all_equal(own['conv1'], student.variables['params']['conv1'])
    assert not np.array_equal(own['fc']['kernel'], student.variables['params']['fc']['kernel'])


def test_init_from_classes_in_another_order_permutes_the_classifier(tmp_path):
    names = [str(label) for label in range(10)][::-1]
    student = load_student(write(tmp_path / 'student', label_names=names))
    state = initial_state(**PLAIN, **{'model.init_from': str(tmp_path / 'student')})
    own = student_variables(state.variables, 0)['params']
    for name, leaf in student.variables['params']['fc'].items():
        np.testing.assert_array_equal(own['fc'][name], leaf[..., ::-1])
    chex.assert_trees_all_equal(own['conv1'], student.variables['params']['conv1'])


@pytest.mark.parametrize(
    ('folder', 'reason'),
    [
        ('other', 'a student that is resnet8, not resnet14'),
        ('folded', 'without --fold_batch_norm'),
        ('nowhere', 'an exported student: .*holds no student'),
    ],
)
def test_init_from_unsuitable_student_is_an_error(tmp_path, folder, reason):
    if folder == 'other':
        write(tmp_path / 'other', network='resnet14')
    elif folder == 'folded':
        write(tmp_path / 'folded')
        student = load_student(tmp_path / 'folded')
        student.config['batch_norm'] = 'folded'
    config = small_config(**{'model.init_from': str(tmp_path / folder)})
    method = methods.create(config_lib.resolve(config))
    with pytest.MonkeyPatch.context() as patch:
        if folder == 'folded':
            patch.setattr(initialisation.teachers, 'load_student', lambda *_: student)
        with pytest.raises(ConfigError, match=reason) as raised:
            initialisation.load_student(config, method, ())
    assert raised.value.field == 'model.init_from'
