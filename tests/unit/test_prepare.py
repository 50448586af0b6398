"""`one_jax.prepare`: what it reports of prepared sets, and what it requires before a download."""

import dataclasses
import fcntl
import socket
import sys
from pathlib import Path

import pytest
from tfds_fixtures import cifar10_splits, write_set

from one_jax import data, prepare
from one_jax.data import preparation
from one_jax.data.table import CIFAR10_CLASSES
from one_jax.errors import UserError


@pytest.fixture(scope='module')
def mnist5k_dir(tmp_path_factory) -> Path:
    data_dir = tmp_path_factory.mktemp('prepared')
    preparation.prepare('mnist5k', str(data_dir))
    return data_dir


def assert_error(name: str, data_dir: Path, message: str) -> str:
    with pytest.raises(UserError, match=message) as error:
        preparation.prepare(name, str(data_dir))
    assert '\n' not in str(error.value)
    return str(error.value)


def test_prepare_prepared_set_verifies_and_does_not_change_it(mnist5k_dir, capsys):
    files = {path: path.stat().st_mtime_ns for path in mnist5k_dir.rglob('*')}
    prepare.main(['mnist5k', f'--data_dir={mnist5k_dir}'])
    output = capsys.readouterr().out
    assert 'mnist5k is prepared in' in output
    assert '(test 1000, train 4000 images)' in output
    assert {path: path.stat().st_mtime_ns for path in mnist5k_dir.rglob('*')} == files


def test_list_shows_which_sets_are_prepared(mnist5k_dir, tmp_path, capsys):
    write_set(tmp_path, 'cifar10', cifar10_splits(), CIFAR10_CLASSES)
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
    assert set(data.DATASETS) - set(lines) == {'image_folder'}


def test_prepare_incomplete_set_is_an_error(tmp_path):
    folder = write_set(tmp_path, 'cifar10', cifar10_splits(), CIFAR10_CLASSES)
    message = r'40 training and 20 test images in place of 50000 and 10000: delete .* prepare'
    assert str(folder) in assert_error('cifar10', tmp_path, message)
    (shard,) = folder.glob('*train*')
    shard.unlink()
    assert_error('cifar10', tmp_path, f'{shard.name} is missing')


@pytest.mark.parametrize('name', ['no_such_set', '../up', 'two words', ''])
def test_prepare_unknown_name_is_an_error_that_lists_the_table(tmp_path, name):
    message = assert_error(name, tmp_path / 'data', 'is not a data set')
    assert all(known in message for known in data.DATASETS)
    assert not (tmp_path / 'data').exists()


def test_prepare_image_folder_explains_data_root(tmp_path):
    assert_error('image_folder', tmp_path, r'--config\.data\.root=DIR')


def test_prepare_without_tensorflow_is_an_error_before_download(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorflow', None)
    assert_error('svhn', tmp_path, r"pip install 'one_jax\[tensorflow\]'")
    assert list(tmp_path.iterdir()) == []


def test_prepare_on_full_disk_is_an_error_before_download(tmp_path, monkeypatch):
    plan = dataclasses.replace(preparation.PREPARATIONS['cifar100'], size=10**18)
    monkeypatch.setitem(preparation.PREPARATIONS, 'cifar100', plan)
    data_dir = tmp_path / 'not' / 'yet'
    message = r'cifar100 takes 1000000000\.17 GB of disk, but .* GB are free'
    assert str(tmp_path) in assert_error('cifar100', data_dir, message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('name', 'file'),
    [('cifar10', 'cifar-10-binary.tar.gz'), ('svhn', 'train_32x32.mat')],
)
def test_prepare_without_network_is_an_error_that_names_the_files(
    tmp_path, monkeypatch, name, file
):
    def no_network(*arguments, **keywords):
        raise socket.gaierror('no network')

    monkeypatch.setattr(socket, 'getaddrinfo', no_network)
    message = assert_error(name, tmp_path, 'cannot be downloaded .*no network')
    assert file in message
    assert str(tmp_path / 'downloads' / 'manual') in message


def test_prepare_into_unwritable_directory_is_an_error(tmp_path):
    (tmp_path / 'file').write_text('')
    assert_error('mnist5k', tmp_path / 'file' / 'data', 'is not writable')


def test_prepare_during_another_preparation_is_an_error(tmp_path):
    (tmp_path / 'mnist5k').mkdir()
    with (tmp_path / 'mnist5k' / 'one_jax.prepare.lock').open('w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert_error('mnist5k', tmp_path, 'is being prepared by another process')
    preparation.prepare('mnist5k', str(tmp_path))


def test_prepare_imagenet_without_or_with_wrong_archives_is_an_error(tmp_path):
    message = assert_error('imagenet2012', tmp_path, r'image-net\.org')
    manual = tmp_path / 'downloads' / 'manual'
    assert 'ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar' in message
    assert str(manual) in message
    manual.mkdir(parents=True)
    for name in ('train', 'val'):
        (manual / f'ILSVRC2012_img_{name}.tar').write_bytes(b'too short')
    assert_error('imagenet2012', tmp_path, r'_train\.tar of 147897477120 bytes, not 9: download')
