"""Frozen teachers: which exported students a method accepts."""

import json

import numpy as np
import pytest
from student_fixtures import write_student
from training_fixtures import small_config

from one_jax import methods
from one_jax.data.table import DATASETS
from one_jax.errors import ConfigError
from one_jax.training import teachers

SPEC = DATASETS['cifar10']


def make_config(folders, **fields):
    fields = {'method.teachers': ','.join(map(str, folders)), **fields}
    kd = {'method.name': 'kd', 'model.num_branches': None}
    kd |= {'data.name': 'cifar10', 'data.image_size': 0}
    return small_config(**{**kd, **fields})


NUMBERS = [str(label) for label in range(10)]


def load(folder, label_names=NUMBERS):
    return teachers.load(methods.create(make_config([folder])), SPEC, label_names)


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'num_classes': 7, 'label_names': list('abcdefg')}, 'num_classes is 7, not 10'),
        ({'input_size': [28, 28]}, r'input_size is \[28, 28\], not \[32, 32\]'),
        ({'mean': [0.5, 0.5, 0.5]}, r'mean is \(0.5, 0.5, 0.5\), not'),
        ({'std': [1.0, 1.0, 1.0]}, r'std is \(1.0, 1.0, 1.0\), not'),
    ],
)
def test_teacher_of_other_data_is_an_error(tmp_path, changes, words):
    folder = write_student(tmp_path / 'teacher', make_config([]), **changes)
    with pytest.raises(ConfigError, match=words) as raised:
        load(folder)
    assert (raised.value.field, raised.value.value) == ('method.teachers', str(folder))


def test_teacher_of_classes_in_another_order_has_its_logits_permuted(tmp_path, capsys):
    names = list('abcdefghij')
    folder = write_student(tmp_path / 'teacher', make_config([]), label_names=names)
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    (plain,), (turned,) = load(folder, names), load(folder, names[::-1])
    assert capsys.readouterr().out.count('another order: matched by name') == 1
    expected, actual = (teachers.logits((t,), (t.variables,), images) for t in (plain, turned))
    np.testing.assert_array_equal(actual, expected[..., ::-1])
    with pytest.raises(
        ConfigError, match="the student lacks 'k'; the data set lacks 'a'"
    ) as raised:
        load(folder, [*names[1:], 'k'])
    assert (raised.value.field, raised.value.value) == ('method.teachers', str(folder))


def test_teacher_mean_rounded_by_json_is_the_same(tmp_path):
    folder = write_student(tmp_path / 'teacher', make_config([]))
    path, mean = folder / 'config.json', [value + 1e-8 for value in SPEC.mean]
    path.write_text(json.dumps({**json.loads(path.read_text()), 'mean': mean}))
    (teacher,) = load(folder)
    assert tuple(teacher.mean) == tuple(mean)


def test_teacher_folder_without_a_student_is_an_error(tmp_path):
    (tmp_path / 'empty').mkdir()
    for folder in (tmp_path / 'missing', tmp_path / 'empty'):
        with pytest.raises(ConfigError, match=r'holds no student: there is no config\.json') as e:
            load(folder)
        assert e.value.field == 'method.teachers'


@pytest.mark.parametrize(('method', 'number'), [('kd', 0), ('meal', 0), ('ekd', 2)])
def test_teachers_of_a_wrong_number_are_an_error(method, number):
    config = make_config([f'teacher{n}' for n in range(number)], **{'method.name': method})
    with pytest.raises(ConfigError, match='folders') as raised:
        methods.create(config)
    assert raised.value.field == 'method.teachers'
