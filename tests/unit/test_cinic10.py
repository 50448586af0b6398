"""CINIC-10 from an archive in miniature, in the layout of the real one."""

import dataclasses
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tfds_fixtures import data_config

from one_jax import data
from one_jax.data import preparation
from one_jax.data.builders import cinic10
from one_jax.data.table import CIFAR10_CLASSES
from one_jax.errors import UserError

PER_CLASS = 3


@pytest.fixture(autouse=True)
def miniature(monkeypatch):
    """Three images of each class, in place of 9,000."""
    monkeypatch.setattr(cinic10, 'IMAGES_PER_CLASS', PER_CLASS)
    split_size = PER_CLASS * len(CIFAR10_CLASSES)
    for name, splits in (('cinic10', 1), ('cinic10_train_valid', 2)):
        spec = data.DATASETS[name]
        spec = dataclasses.replace(spec, num_train=splits * split_size, num_test=split_size)
        monkeypatch.setitem(data.DATASETS, name, spec)


def image_of(split: str, label: int, number: int) -> np.ndarray:
    seed = [cinic10.SPLITS.index(split), label, number]
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, 'PNG')
    return buffer.getvalue()


def members(prefix: str) -> dict[str, bytes]:
    """The files of the archive by name."""
    files = {f'{prefix}README.md': b'CINIC-10', f'{prefix}imagenet-contributors.csv': b'a,b'}
    for split in cinic10.SPLITS:
        for label, name in enumerate(CIFAR10_CLASSES):
            for number in range(PER_CLASS):
                # The same names in all classes, unlike the real ones: keys must differ.
                path = f'{prefix}{split}/{name}/n{number}.png'
                files[path] = png(image_of(split, label, number))
    return files


def write_archive(data_dir: Path, files: dict[str, bytes]) -> Path:
    path = data_dir / 'downloads' / 'manual' / cinic10.ARCHIVE
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w:gz') as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def assert_examples(examples: data.Examples, splits: tuple[str, ...]) -> None:
    expected = {
        image_of(split, label, number).tobytes(): label
        for split in splits
        for label in range(10)
        for number in range(PER_CLASS)
    }
    assert len(examples) == len(expected)
    found = {
        image.tobytes(): label
        for image, label in zip(examples.images, examples.labels.tolist(), strict=True)
    }
    assert found == expected


@pytest.mark.parametrize('prefix', ['./', ''])
def test_prepare_archive_makes_a_set_with_its_splits_and_names(tmp_path, prefix, capsys):
    write_archive(tmp_path, members(prefix))
    preparation.prepare('cinic10', str(tmp_path))
    assert 'test 30, train 30, valid 30 images' in capsys.readouterr().out
    source = data.open(data_config(name='cinic10', data_dir=str(tmp_path)))
    assert source.label_names == CIFAR10_CLASSES
    assert_examples(source.examples('train'), ('train',))
    assert_examples(source.examples('test'), ('test',))
    assert source.spec.mean == (0.47889522, 0.47227842, 0.43047404)
    assert (source.spec.augment, source.spec.padding) == ('pad_crop_flip', 4)
    both = data.open(data_config(name='cinic10_train_valid', data_dir=str(tmp_path)))
    assert both.spec.num_train == 60
    assert_examples(both.examples('train'), ('train', 'valid'))
    assert_examples(both.examples('test'), ('test',))


@pytest.mark.parametrize('folder', ['CINIC-10', '.'])
def test_prepare_extracted_tree_makes_the_same_set(tmp_path, folder):
    for name, content in members('').items():
        path = tmp_path / 'downloads' / 'manual' / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    preparation.prepare('cinic10_train_valid', str(tmp_path))
    source = data.open(data_config(name='cinic10_train_valid', data_dir=str(tmp_path)))
    assert_examples(source.examples('train'), ('train', 'valid'))


def test_prepare_without_archive_is_an_error_with_source_and_destination(tmp_path):
    with pytest.raises(UserError, match=r'datashare\.ed\.ac\.uk/handle/10283/3192') as error:
        preparation.prepare('cinic10', str(tmp_path))
    assert str(tmp_path / 'downloads' / 'manual') in str(error.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r'python -m one_jax\.prepare cinic10_train_valid'):
        data.open(data_config(name='cinic10_train_valid', data_dir=str(tmp_path)))


def assert_error(data_dir: Path, message: str) -> None:
    """The error is one line, and nothing is left that looks like a data set."""
    with pytest.raises(UserError, match=message) as error:
        preparation.prepare('cinic10', str(data_dir))
    assert '\n' not in str(error.value)
    assert list((data_dir / 'cinic10').iterdir()) == []


def test_prepare_archive_with_too_few_images_is_an_error(tmp_path):
    files = members('./')
    del files['./valid/cat/n1.png']
    write_archive(tmp_path, files)
    assert_error(tmp_path, r'has 2 images in valid/cat in place of 3')


def test_prepare_truncated_archive_is_an_error(tmp_path):
    archive = write_archive(tmp_path, members('./'))
    os.truncate(archive, archive.stat().st_size // 2)
    assert_error(tmp_path, r'CINIC-10\.tar\.gz is damaged or incomplete, download it again: ')


@pytest.mark.parametrize('content', [b'', png(np.zeros((32, 32, 3), np.uint8))[:50]])
def test_prepare_damaged_image_is_an_error_that_names_it(tmp_path, content):
    write_archive(tmp_path, members('') | {'train/ship/n2.png': content})
    assert_error(tmp_path, r'train/ship/n2\.png cannot be read')


def test_prepare_image_of_another_size_is_an_error_that_names_it(tmp_path):
    wrong = png(np.zeros((28, 32, 3), np.uint8))
    write_archive(tmp_path, members('') | {'test/dog/n0.png': wrong})
    assert_error(tmp_path, r'test/dog/n0\.png is \(28, 32, 3\), not \(32, 32, 3\)')
