"""Classifying image files of many kinds, against the student itself."""

import json

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from student_fixtures import generated_config, write_student

from one_jax import load_student, predict
from one_jax.errors import UserError


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A student of 8x8 images with ten classes and random weights."""
    folder = tmp_path_factory.mktemp('students') / 'student'
    names = [f'class {label}' for label in range(10)]
    return write_student(folder, generated_config(), label_names=names)


def save_images(directory, count, size=(8, 8)):
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, size[1], size[0], 3), np.uint8)
    for index, image in enumerate(images):
        Image.fromarray(image).save(directory / f'{index:03}.png')
    return images


def softmax(logits):
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def test_folder_is_predicted_in_batches_with_a_padded_last_one(folder, tmp_path):
    student = load_student(folder)
    images = save_images(tmp_path / 'a' / 'b', 7)
    (tmp_path / 'a' / 'notes.txt').write_text('no image')
    paths = predict.find_images([tmp_path / 'a'])
    predictions = list(predict.predict(student, paths, top=3, batch_size=4))
    assert [entry['file'] for entry in predictions] == [str(path) for path in paths]
    probabilities = softmax(np.asarray(student(images)))
    for row, entry in zip(probabilities, predictions, strict=True):
        labels = np.argsort(-row)[:3]
        assert [best['label'] for best in entry['classes']] == labels.tolist()
        assert [best['name'] for best in entry['classes']] == [f'class {x}' for x in labels]
        given = [best['probability'] for best in entry['classes']]
        np.testing.assert_allclose(given, row[labels], atol=1e-5)


def test_command_prints_a_table_or_json_lines(folder, tmp_path, capsys):
    save_images(tmp_path / 'images', 2, size=(20, 12))
    predict.main([str(tmp_path / 'images'), f'--student={folder}', '--top=2'])
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ['file', 'class', 'probability']
    assert len(table) == 2 + 2 * 2
    predict.main([str(tmp_path / 'images/001.png'), f'--student={folder}', '--json'])
    (line,) = capsys.readouterr().out.splitlines()
    assert len(json.loads(line)['classes']) == 5


def test_names_with_control_characters_are_escaped(tmp_path, capsys):
    names = [f'\x1b[31m{label}\n' for label in range(10)]
    folder = write_student(tmp_path / 'student', generated_config(), label_names=names)
    save_images(tmp_path / 'images', 1)
    predict.main([str(tmp_path / 'images'), f'--student={folder}', '--top=1'])
    output = capsys.readouterr().out
    assert '\x1b' not in output
    assert r'\x1b[31m' in output
    assert len(output.splitlines()) == 3


def test_logits_that_are_not_finite_are_an_error(tmp_path):
    folder = write_student(tmp_path / 'student', generated_config())
    weights = safetensors.numpy.load_file(folder / 'student.safetensors')
    for name in ('layer3.0.bn2.weight', 'fc.weight'):
        weights[name][:] = 9e19
    safetensors.numpy.save_file(weights, folder / 'student.safetensors')
    save_images(tmp_path / 'images', 1)
    with pytest.raises(UserError, match=r'student=.*student.* a student with finite logits'):
        predict.main([str(tmp_path / 'images'), f'--student={folder}'])


def test_program_with_the_name_of_an_image_is_not_run(folder, tmp_path):
    """Pillow reads PostScript by running it, whatever the name says."""
    path = tmp_path / 'image.png'
    Image.new('RGB', (8, 8)).save(path, format='EPS')
    with pytest.raises(UserError, match='cannot identify image file'):
        list(predict.predict(load_student(folder), [path]))


def test_file_that_is_no_image_is_named(folder, tmp_path):
    damaged = tmp_path / 'damaged.png'
    save_images(tmp_path, 1)
    damaged.write_bytes((tmp_path / '000.png').read_bytes()[:60])
    with pytest.raises(UserError, match=r"damaged.png' cannot be read as an image: "):
        list(predict.predict(load_student(folder), [damaged]))
    with pytest.raises(UserError, match=r"nowhere': no such file or folder"):
        predict.find_images([tmp_path / 'nowhere'])
    with pytest.raises(UserError, match='no such file or folder'):
        predict.find_images(['x' * 5000])
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='holds no image'):
        predict.find_images([tmp_path / 'empty'])
    with pytest.raises(UserError, match=r'--top=0 is not allowed: at least 1'):
        predict.main(['x.png', f'--student={folder}', '--top=0'])
