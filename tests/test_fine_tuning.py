"""`config.model.init_from`: a run that starts from an exported student."""

import chex
import jax
import numpy as np
import pytest
from student_fixtures import write_student
from test_train import Setting, make_config, run_in

from one_jax import config as config_lib
from one_jax import fine_tuning, load_student, methods
from one_jax.errors import ConfigError
from one_jax.models.multibranch import student_variables


def start(tmp_path, method='one', label_names=None, **fields):
    """The state a run starts from, the student it starts from, and the state it would have had."""
    config = make_config()
    folder = tmp_path / 'student'
    if not folder.exists():
        write_student(folder, config, seed=3)
    setting = Setting(**{'method.name': method, 'model.num_branches': None, **fields})
    student = load_student(folder)
    fresh = setting.initial_state()
    names = tuple(student.label_names) if label_names is None else label_names
    started = jax.jit(lambda state: fine_tuning.start_from(state, student, names))(fresh)
    return started, student, fresh


def without_classifier(tree):
    return {name: module for name, module in tree.items() if name != 'fc'}


def test_every_branch_is_the_student_but_for_its_classifier(tmp_path):
    state, student, fresh = start(tmp_path)
    for branch in range(3):
        own = student_variables(state.variables, branch)
        for collection, tree in student.variables.items():
            chex.assert_trees_all_equal(
                without_classifier(own[collection]), without_classifier(tree)
            )
        random = student_variables({'params': fresh.params}, branch)['params']['fc']
        chex.assert_trees_all_equal(own['params']['fc'], random)
    chex.assert_trees_all_equal(state.params['aggregator'], fresh.params['aggregator'])


def test_the_plain_network_keeps_the_classifier_for_the_same_classes(tmp_path):
    state, student, _ = start(tmp_path, 'plain')
    chex.assert_trees_all_equal(student_variables(state.variables, 0), dict(student.variables))
    state, student, fresh = start(tmp_path, 'plain', label_names=tuple('abcdefghij'))
    kernel = state.params['head']['fc']['kernel']
    np.testing.assert_array_equal(kernel, fresh.params['head']['fc']['kernel'])


def test_averages_start_at_the_student_too(tmp_path):
    state, _, _ = start(tmp_path, **{'train.ema_decay': 0.9})
    chex.assert_trees_all_equal(state.averages, state.variables)


def test_a_run_on_other_classes(tmp_path):
    """A student of 10 classes starts a run of 100; the run resumes without it."""
    write_student(tmp_path / 'student', make_config())
    fields = {'model.init_from': str(tmp_path / 'student'), 'train.steps': 2}
    result = run_in(tmp_path / 'run', **{'data.name': 'cifar100', 'data.image_size': 0, **fields})
    assert len(result['branch_top1']) == 2


def test_a_student_that_does_not_fit_is_refused(tmp_path):
    config = make_config()
    write_student(tmp_path / 'student', config, network='resnet14')
    for directory, reason in (
        (str(tmp_path / 'student'), 'a student that is resnet8: it is resnet14'),
        (str(tmp_path / 'nowhere'), 'an exported student: .*holds no student'),
    ):
        config = make_config(**{'model.init_from': directory})
        with pytest.raises(ConfigError, match=reason):
            fine_tuning.load(config, methods.create(config_lib.resolve(config)))
