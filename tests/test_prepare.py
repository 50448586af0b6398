"""`python -m one_jax.prepare`: what it builds, what it asks for, and what it refuses."""

import dataclasses
import fcntl
import hashlib
import io
import os
import signal
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from test_data import cifar10_splits, data_config
from tfds_fixtures import CIFAR10_NAMES, write_set

from one_jax import data, prepare
from one_jax.data import datasets
from one_jax.errors import UserError


@pytest.fixture(scope='module')
def mnist5k_dir(tmp_path_factory) -> Path:
    data_dir = tmp_path_factory.mktemp('prepared')
    prepare.prepare('mnist5k', str(data_dir))
    return data_dir


def assert_refused(name: str, data_dir: Path, message: str) -> str:
    with pytest.raises(UserError, match=message) as error:
        prepare.prepare(name, str(data_dir))
    assert '\n' not in str(error.value)
    return str(error.value)


def test_set_that_is_there_is_verified_and_left_alone(mnist5k_dir, capsys):
    files = {path: path.stat().st_mtime_ns for path in mnist5k_dir.rglob('*')}
    prepare.main(['mnist5k', f'--data_dir={mnist5k_dir}'])
    output = capsys.readouterr().out
    assert 'mnist5k is prepared in' in output
    assert '(test 1000, train 4000 images)' in output
    assert {path: path.stat().st_mtime_ns for path in mnist5k_dir.rglob('*')} == files


def test_list_tells_which_sets_are_there(mnist5k_dir, tmp_path, capsys):
    write_set(tmp_path, 'cifar10', cifar10_splits(), CIFAR10_NAMES)
    (tmp_path / 'mnist5k').symlink_to(mnist5k_dir / 'mnist5k')
    capsys.readouterr()
    prepare.main(['--list', f'--data_dir={tmp_path}'])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines['mnist5k'].endswith('yes')
    # 40 images in place of 50,000.
    assert lines['cifar10'].endswith('damaged')
    assert lines['svhn'].endswith('no')
    assert {'604388', '26032'} <= set(lines['svhn'].split())
    assert '154.64 GB by hand' in lines['imagenet2012']
    assert set(datasets.DATASETS) - set(lines) == {'image_folder'}


def test_prepared_set_of_other_numbers_or_with_missing_files_is_refused(tmp_path):
    folder = write_set(tmp_path, 'cifar10', cifar10_splits(), CIFAR10_NAMES)
    message = r'40 images in train in place of 50000: delete .* prepare it again'
    assert str(folder) in assert_refused('cifar10', tmp_path, message)
    (shard,) = folder.glob('*train*')
    shard.unlink()
    assert_refused('cifar10', tmp_path, f'{shard.name} is missing')


@pytest.mark.parametrize('name', ['no_such_set', '../up', 'two words', ''])
def test_unknown_name_is_refused_with_the_table(tmp_path, name):
    message = assert_refused(name, tmp_path / 'data', 'is not a data set')
    assert all(known in message for known in datasets.DATASETS)
    assert not (tmp_path / 'data').exists()


def test_folder_of_images_needs_no_preparation(tmp_path):
    assert_refused('image_folder', tmp_path, r'--config\.data\.root=DIR')


def test_missing_tensorflow_is_reported_before_anything_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorflow', None)
    assert_refused('svhn', tmp_path, r"pip install 'one_jax\[tensorflow\]'")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_reported_before_anything_is_downloaded(tmp_path, monkeypatch):
    plan = dataclasses.replace(prepare.PREPARATIONS['cifar100'], size=10**18)
    monkeypatch.setitem(prepare.PREPARATIONS, 'cifar100', plan)
    data_dir = tmp_path / 'not' / 'yet'
    message = r'cifar100 takes 1000000000\.17 GB of disk, but .* GB are free'
    assert str(tmp_path) in assert_refused('cifar100', data_dir, message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('name', 'file'),
    [('cifar10', 'cifar-10-binary.tar.gz'), ('svhn', 'train_32x32.mat')],
)
def test_no_network_is_reported_at_once_with_what_to_download(tmp_path, monkeypatch, name, file):
    def no_network(*arguments, **keywords):
        raise socket.gaierror('no network')

    monkeypatch.setattr(socket, 'getaddrinfo', no_network)
    message = assert_refused(name, tmp_path, 'cannot be downloaded .*no network')
    assert file in message
    assert str(tmp_path / 'downloads' / 'manual') in message


def test_directory_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / 'file').write_text('')
    assert_refused('mnist5k', tmp_path / 'file' / 'data', 'cannot be written')


def test_command_ends_with_one_line_and_status_one(tmp_path):
    command = [sys.executable, '-m', 'one_jax.prepare', 'cinic10', f'--data_dir={tmp_path}']
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 1
    assert result.stderr.startswith('error: cinic10 is downloaded by hand: put CINIC-10.tar.gz')
    assert len(result.stderr.splitlines()) == 1


# Interrupted preparations.


def test_killed_preparation_is_cleared_and_starts_anew(tmp_path, capsys):
    code = """
import os, signal, sys
from one_jax import prepare
from one_jax.data.builders.mnist5k import Mnist5k
generate = Mnist5k._generate_examples
def killed(self, *arguments):
    for index, example in enumerate(generate(self, *arguments)):
        if index == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        yield example
Mnist5k._generate_examples = killed
prepare.prepare('mnist5k', sys.argv[1])
"""
    foreign = tmp_path / 'mnist5k' / 'incomplete.ABCDEF_1.0.0'
    foreign.mkdir(parents=True)
    os.utime(foreign, (0, 0))
    killed = subprocess.run([sys.executable, '-c', code, str(tmp_path)], check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    (left,) = set((tmp_path / 'mnist5k').glob('incomplete.*')) - {foreign}
    prepare.prepare('mnist5k', str(tmp_path))
    assert f'removing {left}' in capsys.readouterr().out
    # What was there before is not ours to remove.
    assert {path.name for path in (tmp_path / 'mnist5k').iterdir()} == {'1.0.0', foreign.name}
    config = data_config(name='mnist5k', data_dir=str(tmp_path))
    assert len(data.load(config).splits['train']) == 4000


def test_preparation_at_work_keeps_a_second_one_away(tmp_path):
    (tmp_path / 'mnist5k').mkdir()
    with (tmp_path / 'mnist5k' / 'one_jax.prepare.lock').open('w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert_refused('mnist5k', tmp_path, 'is being prepared by another process')
    prepare.prepare('mnist5k', str(tmp_path))


# TFDS's own builders, on small archives in the layout of the real ones.


def test_archive_put_there_by_hand_takes_the_place_of_the_download(tmp_path, monkeypatch):
    def no_network(*arguments, **keywords):
        raise socket.gaierror('no network')

    monkeypatch.setattr(socket, 'getaddrinfo', no_network)
    spec = dataclasses.replace(datasets.DATASETS['cifar10'], num_train=10, num_test=2)
    monkeypatch.setitem(datasets.DATASETS, 'cifar10', spec)
    batches = ['test_batch', *(f'data_batch_{number}' for number in range(1, 6))]
    images = np.random.default_rng(0).integers(0, 256, (len(batches), 2, 3, 32, 32), np.uint8)
    files = {
        f'cifar-10-batches-bin/{name}.bin': b''.join(
            bytes([label]) + image.tobytes() for label, image in enumerate(batch)
        )
        for name, batch in zip(batches, images, strict=True)
    }
    files['cifar-10-batches-bin/batches.meta.txt'] = '\n'.join(CIFAR10_NAMES).encode()
    archive = tmp_path / 'downloads' / 'manual' / 'cifar-10-binary.tar.gz'
    write_tar(archive, files, mode='w:gz')
    # It is not the real one.
    assert_refused('cifar10', tmp_path, 'has wrong checksum')
    builder = tfds.builder_cls('cifar10')
    ((url, info),) = builder.url_infos.items()
    content = archive.read_bytes()
    info = dataclasses.replace(
        info, size=len(content), checksum=hashlib.sha256(content).hexdigest()
    )
    monkeypatch.setattr(builder, 'url_infos', {url: info})
    prepare.prepare('cifar10', str(tmp_path))
    assert len(list(tmp_path.glob('cifar10/*/*-train.array_record-*'))) == 1
    dataset = data.load(data_config(name='cifar10', data_dir=str(tmp_path)))
    assert dataset.label_names == tuple(CIFAR10_NAMES)
    found = {image.tobytes() for image in dataset.splits['train'].images}
    expected = images[1:].reshape(10, 3, 32, 32).transpose(0, 2, 3, 1)
    assert found == {np.ascontiguousarray(image).tobytes() for image in expected}


def write_tar(path: Path, files: dict[str, bytes], mode: str = 'w') -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    shape = (20 + seed, 30, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    Image.fromarray(pixels).save(buffer, 'JPEG')
    return buffer.getvalue()


def test_imagenet_is_asked_for_by_hand_and_its_archives_are_measured(tmp_path):
    message = assert_refused('imagenet2012', tmp_path, r'image-net\.org')
    manual = tmp_path / 'downloads' / 'manual'
    assert 'ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar' in message
    assert str(manual) in message
    for name in ('train', 'val'):
        write_tar(manual / f'ILSVRC2012_img_{name}.tar', {})
    assert_refused('imagenet2012', tmp_path, r'_train\.tar has \d+ bytes in place of 147897477120')


def test_imagenet_is_built_as_tfrecord_and_streamed(tmp_path, monkeypatch):
    manual = tmp_path / 'downloads' / 'manual'
    synsets = {}
    for number, synset in enumerate(('n01440764', 'n01443537')):
        write_tar(tmp_path / synset, {f'{synset}_{i}.JPEG': jpeg(4 * number + i) for i in (0, 1)})
        synsets[f'{synset}.tar'] = (tmp_path / synset).read_bytes()
    write_tar(manual / 'ILSVRC2012_img_train.tar', synsets)
    write_tar(
        manual / 'ILSVRC2012_img_val.tar',
        {f'ILSVRC2012_val_{i:08d}.JPEG': jpeg(i) for i in range(1, 4)},
    )
    files = tuple((path.name, path.stat().st_size) for path in manual.iterdir())
    plan = dataclasses.replace(prepare.PREPARATIONS['imagenet2012'], size=0, manual_files=files)
    monkeypatch.setitem(prepare.PREPARATIONS, 'imagenet2012', plan)
    spec = dataclasses.replace(datasets.DATASETS['imagenet2012'], num_train=4, num_test=3)
    monkeypatch.setitem(datasets.DATASETS, 'imagenet2012', spec)
    prepare.prepare('imagenet2012', str(tmp_path))
    assert len(list(tmp_path.glob('imagenet2012/*/*-train.tfrecord-*'))) == 1
    config = data_config(name='imagenet2012', data_dir=str(tmp_path))
    described = data.describe(config)
    assert (described.num_train, described.num_test) == (spec.num_train, spec.num_test)
    assert (described.image_shape, described.mean) == (spec.image_shape, spec.mean)
    dataset = data.load(config)
    assert isinstance(dataset, datasets.StreamedDataset)
    (batch,) = dataset.evaluation_batches('test', 4)
    assert batch['image'].shape == (4, 224, 224, 3)
    assert batch['mask'].tolist() == [1, 1, 1, 0]
