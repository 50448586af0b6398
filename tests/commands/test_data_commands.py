"""Commands on every kind of data on disk: files of the real formats."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from command_helpers import REPOSITORY, cache_flag, run
from PIL import Image
from tfds_fixtures import cifar10_splits, encode, write_imagenet, write_set
from training_fixtures import assert_same_run

from configs import image_folder
from one_jax import train
from one_jax.errors import UserError
from one_jax.students.student import load_student

SHORT = (
    '--config.data.generated_examples=0',
    '--config.data.batch_size=8',
    '--config.data.eval_batch_size=8',
    cache_flag(),
)


def read_result(workdir):
    return json.loads((workdir / 'result.json').read_text())


@pytest.fixture
def folder(tmp_path):
    """Three classes, told apart by their colour: 16 images each to train on and 4 for the test."""
    generator = np.random.default_rng(0)
    root = tmp_path / 'images'
    for split, count in (('train', 16), ('test', 4)):
        for channel, name in enumerate(('red', 'green', 'blue things')):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 120, (40, 36, 3), np.uint8)
                pixels[..., channel] += 130
                suffix = 'png' if number % 2 else 'jpg'
                Image.fromarray(pixels).save(root / split / name / f'{number}.{suffix}')
    (root / 'train/red/notes.txt').write_text('not an image')
    return root


def test_streamed_folder_becomes_a_student_with_its_class_names(tmp_path, folder):
    workdir = tmp_path / 'run'
    (folder / 'train/red/empty.png').write_bytes(b'')
    flags = [
        '--config=configs/image_folder.py:smoke',
        *SHORT,
        f'--config.data.root={folder}',
        '--config.data.stream=True',
        '--config.data.skip_unreadable=True',
        '--config.train.steps=12',
        '--config.optimizer.warmup_epochs=0',
        '--config.optimizer.learning_rate=0.05',
    ]
    output, _ = run('main', *flags, f'--workdir={workdir}')
    assert (
        "data: image_folder, 3 classes ('blue things', 'green', 'red'); images: train 48," in output
    )
    assert 'pixels: 32x32, random-resized crops and flips; evaluation 0.875; mean 0.485' in output
    assert 'red/empty.png (empty file)' in output
    result = read_result(workdir)
    assert result['unreadable_images'] == 1
    assert result['teacher_top1'] > 60
    student = tmp_path / 'student'
    run('export', f'--workdir={workdir}', f'--output={student}')
    names = load_student(student).label_names
    assert names == ['blue things', 'green', 'red']
    assert json.loads((student / 'config.json').read_text())['input_size'] == [32, 32]
    output, _ = run('evaluate', f'--student={student}', *flags[:8])
    assert f'{result["deployed_top1"]:.2f}' in output
    assert f'{result["deployed_nll"]:.4f}' in output


def test_training_on_a_damaged_image_is_an_error_and_writes_nothing(tmp_path, folder):
    broken = folder / 'train/green/3.png'
    broken.write_bytes(broken.read_bytes()[:50])
    config = image_folder.get_config('smoke')
    fields = {'generated_examples': 0, 'batch_size': 8, 'eval_batch_size': 8, 'root': str(folder)}
    config.data.update(fields)
    with pytest.raises(UserError, match=r'green/3\.png'):
        train.train_and_evaluate(config, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_training_on_prepared_cifar10_evaluates_every_test_image(tmp_path):
    splits = cifar10_splits()
    images, labels = splits['test']
    splits['test'] = images[:11], labels[:11]
    write_set(tmp_path / 'data', 'cifar10', splits)
    workdir = tmp_path / 'run'
    flags = ['--config=configs/cifar10_resnet32.py:smoke', *SHORT]
    run('main', *flags, f'--config.data.data_dir={tmp_path / "data"}', f'--workdir={workdir}')
    # Eleven images, in batches of eight: each is worth 1 / 11.
    for top1 in read_result(workdir)['branch_top1']:
        assert top1 * 11 / 100 == pytest.approx(round(top1 * 11 / 100), abs=1e-6)


def test_training_on_streamed_imagenet_resumes_bit_for_bit(tmp_path):
    """On a tiny imagenet2012 with grey, CMYK and PNG images."""
    labels = [index * 2 for index in range(21)]
    images = [encode(index, label) for index, label in enumerate(labels)]
    write_imagenet(tmp_path / 'data', images, labels)
    whole, resumed = tmp_path / 'whole', tmp_path / 'resumed'
    flags = [
        '--config=configs/imagenet_resnet18.py:smoke',
        *SHORT,
        f'--config.data.data_dir={tmp_path / "data"}',
        '--config.data.image_size=64',
        '--config.train.steps=4',
    ]
    run('main', *flags, f'--workdir={whole}')
    result = read_result(whole)
    assert (result['dataset'], result['step'], result['epochs']) == ('imagenet2012', 4, 2)
    # As if it had been killed after the first of two epochs.
    shutil.copytree(whole, resumed)
    (resumed / 'result.json').unlink()
    shutil.rmtree(resumed / 'checkpoints/4')
    output, _ = run('main', *flags, f'--workdir={resumed}')
    assert 'resumes after step 2' in output
    assert_same_run(resumed, whole)


def test_prepare_prints_one_line_and_exits_with_one(tmp_path):
    _, errors = run('prepare', 'cinic10', f'--data_dir={tmp_path}', status=1)
    assert errors.startswith('error: cinic10 is downloaded by hand: put CINIC-10.tar.gz')
    assert len(errors.splitlines()) == 1


def test_data_imports_neither_tfds_nor_tensorflow_until_needed(tmp_path):
    """And opening ArrayRecord files touches neither TensorFlow nor the network."""
    write_set(tmp_path, 'cifar10', cifar10_splits())
    code = """
import socket, sys
def refuse(*arguments, **keywords):
    raise AssertionError('the network was touched')
socket.socket.connect = socket.getaddrinfo = refuse
from one_jax import data
from one_jax.config import default_config
from one_jax.errors import ConfigError
config = default_config().data
def is_imported(name):
    return any(module.partition('.')[0] == name for module in sys.modules)
assert not is_imported('tensorflow_datasets')
config.generated_examples = 8
data.open(config)
assert not is_imported('tensorflow_datasets')
config.update(generated_examples=0, data_dir=sys.argv[1])
for name in ('cifar10', 'mnist5k'):
    config.name = name
    data.open(config)
config.name = 'no_such_set'
try:
    data.open(config)
except ConfigError:
    assert not is_imported('tensorflow')
    print('done')
"""
    result = subprocess.run(
        [sys.executable, '-c', code, str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.stdout.split() == ['done'], result.stderr
