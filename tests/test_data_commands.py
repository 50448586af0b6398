"""Training, as a user starts it, from every kind of data on disk: files of the real formats."""

import json
import shutil

import numpy as np
import pytest
from commands import assert_same_run, run
from PIL import Image
from test_streaming import encode, write_imagenet
from tfds_fixtures import CIFAR10_NAMES, random_split, write_set

from one_jax.student import load_student

SHORT = (
    '--config.data.generated_examples=0',
    '--config.data.batch_size=8',
    '--config.data.eval_batch_size=8',
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


@pytest.mark.parametrize('stream', [False, True])
def test_a_folder_of_images_becomes_a_student_that_knows_its_classes(tmp_path, folder, stream):
    workdir = tmp_path / 'run'
    flags = [
        '--config=configs/image_folder.py:smoke',
        *SHORT,
        f'--config.data.root={folder}',
        f'--config.data.stream={stream}',
        '--config.train.steps=12',
        '--config.optimizer.warmup_epochs=0',
        '--config.optimizer.learning_rate=0.05',
    ]
    run('main', *flags, f'--workdir={workdir}')
    result = read_result(workdir)
    assert result['teacher_top1'] > 60
    student = tmp_path / 'student'
    run('export', f'--workdir={workdir}', f'--output={student}')
    names = load_student(student).label_names
    assert names == ['blue things', 'green', 'red']
    assert json.loads((student / 'config.json').read_text())['input_size'] == [32, 32]
    output, _ = run('evaluate', f'--student={student}', *flags[:5])
    assert f'{result["deployed_top1"]:.2f}' in output
    assert f'{result["deployed_nll"]:.4f}' in output


def test_a_broken_image_of_a_folder_is_named_and_nothing_is_written(tmp_path, folder):
    broken = folder / 'train/green/3.png'
    broken.write_bytes(broken.read_bytes()[:50])
    flags = ['--config=configs/image_folder.py:smoke', *SHORT, f'--config.data.root={folder}']
    _, errors = run('main', *flags, f'--workdir={tmp_path / "run"}', status=1)
    assert 'green/3.png' in errors.splitlines()[-1]
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('file_format', 'stream'), [('array_record', False), ('tfrecord', False), ('tfrecord', True)]
)
def test_cifar10_on_disk(tmp_path, file_format, stream):
    splits = {
        'train': random_split(24, (32, 32, 3), 10, seed=0),
        'test': random_split(11, (32, 32, 3), 10, seed=1),
    }
    write_set(tmp_path / 'data', 'cifar10', splits, CIFAR10_NAMES, file_format=file_format)
    workdir = tmp_path / 'run'
    flags = ['--config=configs/cifar10_resnet32.py:smoke', *SHORT]
    if stream:
        flags += ['--config.data.stream=True', '--config.data.image_size=24']
    run('main', *flags, f'--config.data.data_dir={tmp_path / "data"}', f'--workdir={workdir}')
    # Eleven images, in batches of eight: each is worth 1 / 11.
    for top1 in read_result(workdir)['branch_top1']:
        assert top1 * 11 / 100 == pytest.approx(round(top1 * 11 / 100), abs=1e-6)


def test_imagenet_is_streamed_and_resumed_bit_for_bit(tmp_path):
    """A tiny imagenet2012 in TFDS's format, grey, CMYK and PNG images among it."""
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
