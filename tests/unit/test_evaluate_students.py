"""Students on a folder of images: classes matched by name, and logits that are finite."""

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from student_fixtures import generated_config, write_student

from one_jax.errors import ConfigError
from one_jax.runtime import files
from one_jax.students.evaluation import evaluate_students

NAMES = ['bird', 'cat', 'dog']


def write_images(root, names):
    """Writes images of three classes, the same ones in the same order whatever the names are."""
    generator = np.random.default_rng(0)
    for split, name in [(split, name) for split in ('train', 'test') for name in names]:
        (root / split / name).mkdir(parents=True)
        for index in range(4):
            image = Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8))
            image.save(root / split / name / f'{index}.png')
    return root


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / 'images', NAMES)


@pytest.fixture
def student(tmp_path, images):
    config = generated_config(**{'data.generated_examples': 0, 'data.root': str(images)})
    return write_student(tmp_path / 'student', config)


def change(folder, name, value):
    path = folder / 'student.safetensors'
    weights = safetensors.numpy.load_file(path)
    weights[name] = value(weights[name])
    safetensors.numpy.save_file(weights, path)


def set_fields(folder, **fields):
    files.write_json(folder / 'config.json', files.read_json(folder / 'config.json') | fields)


def test_classes_in_another_order_evaluate_to_the_same(student, images, capsys):
    expected = evaluate_students([student], data_root=str(images))
    assert 0 < expected['branch_top1'][0] < 100
    set_fields(student, label_names=NAMES[::-1])
    # Another assignment of names to logits is another classifier ...
    assert evaluate_students([student], data_root=str(images)) != expected
    # ... and the same one with its rows in the same order.
    for name in ('fc.weight', 'fc.bias'):
        change(student, name, lambda rows: rows[::-1].copy())
    actual = evaluate_students([student], data_root=str(images))
    assert actual['branch_top1'] == expected['branch_top1']
    np.testing.assert_allclose(actual['branch_nll'], expected['branch_nll'], rtol=1e-6)
    assert 'another order: matched by name' in capsys.readouterr().out


def test_renamed_class_is_an_error(student, tmp_path):
    renamed = write_images(tmp_path / 'renamed', ['bird', 'cat', 'hound'])
    with pytest.raises(
        ConfigError, match="the student lacks 'hound'; the data set lacks 'dog'"
    ) as raised:
        evaluate_students([student], data_root=str(renamed))
    assert (raised.value.field, raised.value.value) == ('student', str(student))


def test_folder_of_images_must_be_given(student):
    with pytest.raises(ConfigError, match=r"--data_root=DIR .* classes 'bird', 'cat', 'dog'"):
        evaluate_students([student])


def test_logits_that_are_not_finite_are_an_error(student, images):
    for name in ('layer3.0.bn2.weight', 'fc.weight'):
        change(student, name, lambda values: np.full_like(values, 9e19))
    with pytest.raises(ConfigError, match='a student with finite logits') as raised:
        evaluate_students([student], data_root=str(images))
    assert raised.value.value == str(student)
