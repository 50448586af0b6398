"""Reading a student folder: the logits of uint8 images, and one clear line for a damaged one."""

import fcntl
import json
import os

import numpy as np
import pytest
import safetensors.numpy
from student_fixtures import generated_config, make_ensemble, write_student

from one_jax.errors import UserError
from one_jax.runtime import files
from one_jax.students import config as student_config
from one_jax.students import folder as folder_lib
from one_jax.students import weights_file
from one_jax.students.student import CONFIG, WEIGHTS, Student, load_student


@pytest.fixture
def folder(tmp_path):
    names, fields = list('abcdefg'), {'mean': [0.5, 0.4, 0.3], 'std': [0.2, 0.25, 0.3]}
    config = generated_config()
    return write_student(tmp_path / 's', config, num_classes=7, label_names=names, **fields)


def test_student_normalises_its_images(folder):
    student = load_student(folder)
    assert student.label_names == list('abcdefg')
    images = np.random.default_rng(1).integers(0, 256, (3, 8, 8, 3), np.uint8)
    normalised = (images / 255 - np.array([0.5, 0.4, 0.3])) / np.array([0.2, 0.25, 0.3])
    normalised = normalised.astype(np.float32)
    expected = student.network.apply(student.variables, normalised, train=False).logits
    tolerance = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(student(images), expected, rtol=1e-3, atol=tolerance)


def test_student_of_other_data_is_an_error(folder):
    spec = type('Spec', (), {'num_classes': 7, 'image_shape': (16, 8, 3), 'name': 'tall'})
    with pytest.raises(UserError, match=r"input_size': \[8, 8\]}, the data set 'tall' .*\[16, 8\]"):
        load_student(folder).check_data(spec)


@pytest.mark.parametrize(
    ('names', 'words'),
    [
        (list('abcdefX'), "the student lacks 'X'; the data set lacks 'g'"),
        (list('abcdef'), "the data set lacks 'g'"),
        ([f'class {n}' for n in range(7)], "'class 4' and 2 more; the data set lacks 'a', 'b'"),
        (list('abcdeff'), "the data set lacks 'g'"),
    ],
)
def test_student_of_other_classes_is_an_error(folder, names, words):
    with pytest.raises(UserError, match=words) as raised:
        load_student(folder).for_classes(names)
    assert str(folder) in str(raised.value)
    assert '\n' not in str(raised.value)


def test_student_of_classes_in_another_order_has_its_logits_permuted(folder, capsys):
    student = load_student(folder)
    images = np.random.default_rng(1).integers(0, 256, (3, 8, 8, 3), np.uint8)
    turned = student.for_classes(list('bcdefga'))
    assert 'another order: matched by name' in capsys.readouterr().out
    assert turned.label_names == list('bcdefga')
    np.testing.assert_array_equal(turned(images), np.roll(student(images), -1, axis=-1))
    again = turned.for_classes(list('gfedcba'))
    np.testing.assert_array_equal(again(images), student(images)[:, ::-1])


def test_student_of_numbered_classes_is_matched_by_place(folder, capsys):
    student = load_student(folder)
    assert student.for_classes(list('abcdefg')) is student
    assert student.for_classes([]) is student
    assert capsys.readouterr().out == ''
    assert student.for_classes([str(n) for n in range(7)]) is student
    assert 'note: ' in capsys.readouterr().out
    with pytest.raises(UserError, match='the student lacks'):
        student.for_classes([str(n) for n in range(8)])


def test_flipped_bit_in_weights_with_a_checksum_is_an_error(folder):
    path = folder / 'student.safetensors'
    set_fields(weights_sha256=weights_file.digest(path))(folder)
    load_student(folder)
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r'its SHA-256=.* is not allowed: .* copy the folder again'):
        load_student(folder)


def test_run_given_as_a_student_is_named_as_such(folder):
    (folder / 'checkpoints').mkdir()
    (folder / 'student.safetensors').unlink()
    with pytest.raises(UserError, match=r'is a run, not a student: python -m one_jax\.export'):
        load_student(folder)


def test_teacher_ignores_settings_that_its_method_no_longer_has():
    settings = {'teacher': 'gate', 'temperature': 4.0, 'of_an_earlier_version': 3}
    aggregator = {'method': 'one', 'settings': settings}
    network = make_ensemble(['resnet8'] * 3, aggregator=aggregator)
    ensemble = {'members': ['resnet8'] * 3, 'aggregator': aggregator}
    student = Student({'ensemble': ensemble}, network, {})
    assert student.num_branches == network.num_branches == 3
    assert network.make_aggregator(name='aggregator').num_branches == 3


# A file of eight numbers of eight bits each, which NumPy does not have.
HEADER = b'{"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}'
EIGHT_BITS = len(HEADER).to_bytes(8, 'little') + HEADER + bytes(8)


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def truncate(folder):
    path = folder / 'student.safetensors'
    path.write_bytes(path.read_bytes()[:5000])


def change(name, index, value):
    """Returns a function that puts a number into a tensor."""

    def damage(folder):
        path = folder / 'student.safetensors'
        weights = safetensors.numpy.load_file(path)
        weights[name][index] = value
        safetensors.numpy.save_file(weights, path)

    return damage


def set_fields(**fields):
    """Returns a function that changes fields of config.json."""

    def damage(folder):
        path = folder / 'config.json'
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return damage


NO_BRANCHES = {'members': [], 'share_stages': 2, 'share_stem': False}
FIVE = {'num_classes': 5, 'label_names': list('abcde')}
DAMAGE = {
    'no config': (lambda folder: (folder / 'config.json').unlink(), 'there is no config.json'),
    'no weights': (
        lambda folder: (folder / 'student.safetensors').unlink(),
        'there is no student.safetensors',
    ),
    'not JSON': (write('config.json', b'{"network":'), 'not JSON'),
    'endless brackets': (write('config.json', b'[' * 100_000), "config.json' "),
    'another config': (write('config.json', b'{"model": 3}'), "describes no student: no 'network'"),
    'a list': (write('config.json', b'[1]'), "config.json' is damaged: not an object with fields"),
    'type of network': (set_fields(network=3), 'network=3 is not allowed'),
    'unknown network': (set_fields(network='../vgg16'), "model.name='../vgg16' is not allowed"),
    'other classes': (set_fields(**FIVE), 'fc.bias has shape (7,) and not (5,)'),
    'number of classes': (set_fields(num_classes=-1), 'num_classes=-1 is not allowed'),
    'image size': (set_fields(input_size=[10**9, 16]), 'whole numbers from 1 to 4,096'),
    'one mean': (set_fields(mean=[0.5]), 'mean=[0.5] is not allowed: three numbers'),
    'no deviation': (set_fields(std=[0.2, 0, 0.2]), 'three numbers above 0'),
    'deviation of float64': (set_fields(std=[1e-40] * 3), 'three numbers above 0, in float32'),
    'too few names': (set_fields(label_names=['a']), 'label_names has 1 names'),
    'crop': (set_fields(crop=0), 'crop=0 is not allowed: a number above 0, at most 1'),
    'data field': (set_fields(data={'url': 'x'}), 'the fields name, '),
    'no branches': (set_fields(ensemble=NO_BRANCHES), 'describes no student'),
    'unknown dtype': (write('student.safetensors', EIGHT_BITS), "student.safetensors' is damaged"),
    'truncated weights': (truncate, "student.safetensors' is damaged"),
    'pickled weights': (write('student.safetensors', b'\x80\x04K\x01.'), 'is damaged'),
    'infinite weights': (
        change('fc.weight', (2, 3), np.inf),
        'NaN, infinity or numbers above 1e20 in fc.weight',
    ),
    'negative variance': (
        change('layer1.0.bn2.running_var', 5, -0.1),
        'negative variances in layer1.0.bn2.running_var',
    ),
}


@pytest.mark.parametrize('case', DAMAGE)
def test_damaged_folder_is_one_clear_line(folder, case):
    damage, words = DAMAGE[case]
    damage(folder)
    with pytest.raises(UserError) as raised:
        load_student(folder)
    assert words in str(raised.value)
    assert str(folder) in str(raised.value)
    assert '\n' not in str(raised.value)


def test_network_of_an_unknown_form_is_an_error():
    config = {'network': 'resnet8', 'num_classes': 7, 'batch_norm': 'frozen'}
    with pytest.raises(UserError, match="batch_norm='frozen' is not allowed: one of 'separate'"):
        student_config.build_network(config)


def test_folder_obeys_the_umask_and_removes_what_a_killed_export_left(tmp_path):
    output = tmp_path / 'student'
    killed, live, new = (files.temporary_beside(output) for _ in range(3))
    other = files.temporary_beside(tmp_path / 'another')
    for path in (killed, live, other):
        path.mkdir()
        (path / WEIGHTS).touch()
    new.mkdir()  # Another process is about to lock it.
    handle = os.open(live, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    before = os.umask(0o027)
    try:
        with folder_lib.whole_or_not_at_all(output) as temporary:
            files.write_json(temporary / CONFIG, {})
            assert set(tmp_path.iterdir()) == {live, new, other, temporary}
    finally:
        os.umask(before)
        os.close(handle)
    assert set(tmp_path.iterdir()) == {live, new, other, output}
    assert output.stat().st_mode & 0o777 == 0o750
    assert (output / CONFIG).stat().st_mode & 0o777 == 0o640


def fill(output, write):
    with folder_lib.whole_or_not_at_all(output) as folder:
        write(folder)


def test_folder_of_two_exports_at_once_is_the_first_ones(tmp_path):
    output = tmp_path / 'student'

    def export_meanwhile(_):
        fill(output, lambda folder: (folder / 'first').touch())

    with pytest.raises(UserError, match='a new folder: nothing is overwritten'):
        fill(output, export_meanwhile)
    assert [path.name for path in tmp_path.rglob('*')] == ['student', 'first']


def test_folder_block_that_fails_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / 'file').touch()
        raise OSError(28, 'No space left on device')

    with pytest.raises(UserError, match='No space left on device'):
        fill(tmp_path / 'student', fail)
    assert list(tmp_path.iterdir()) == []


BAD_FIELDS = [
    ('network', None, 'the name of a network'),
    ('network', [], 'the name of a network'),
    ('num_classes', 7.0, 'a whole number from 1'),
    ('num_classes', 10**400, 'a whole number from 1'),
    ('input_size', [16384, 16384], 'whole numbers from 1 to 4,096'),
    ('input_size', [[8], [8]], 'whole numbers from 1 to 4,096'),
    ('mean', [0, 0, '0'], 'three numbers'),
    ('std', [1, 1, 1e-40], 'three numbers above 0'),
    ('label_names', 'abcdefg', 'a list of names'),
    ('label_names', [[]] * 7, 'a list of names'),
    ('data', {'name': []}, 'the fields'),
    ('data', {'root': '/'}, 'the fields'),
    ('metric', 'x', 'an object with fields, or null'),
    ('metric', [1], 'an object with fields, or null'),
    ('method', {}, 'text, or null'),
    ('seed', '0', 'a whole number, or null'),
    ('ensemble', [], 'an object with fields'),
    ('weights_sha256', 5, 'text'),
    ('batch_norm', {}, 'one of'),
]


@pytest.mark.parametrize(('field', 'value', 'words'), BAD_FIELDS)
def test_config_with_a_value_of_another_kind_is_one_line(folder, field, value, words):
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(content | {field: value}))
    with pytest.raises(UserError, match=words) as error:
        load_student(folder)
    text = str(error.value)
    assert f"config.json' describes no student: {field}=" in text
    assert text.isprintable()
    assert len(text) < 1000
