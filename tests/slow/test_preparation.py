"""Preparation that is killed, and TFDS's own builders on small archives in the real layout."""

import dataclasses
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
from tfds_fixtures import data_config

from one_jax import data
from one_jax.data import preparation, prepared
from one_jax.data.table import CIFAR10_CLASSES
from one_jax.errors import UserError


def test_prepare_after_kill_removes_leftovers_and_starts_over(tmp_path, capsys):
    code = """
import os, signal, sys
from one_jax.data import preparation
from one_jax.data.builders.mnist5k import Mnist5k
generate = Mnist5k._generate_examples
def killed(self, *arguments):
    for index, example in enumerate(generate(self, *arguments)):
        # The train split, which comes first, is complete by then.
        if len(arguments[-1]) == 1000 and index == 500:
            os.kill(os.getpid(), signal.SIGKILL)
        yield example
Mnist5k._generate_examples = killed
preparation.prepare('mnist5k', sys.argv[1])
"""
    foreign = tmp_path / 'mnist5k' / 'incomplete.ABCDEF_1.0.0'
    foreign.mkdir(parents=True)
    os.utime(foreign, (0, 0))
    killed = subprocess.run([sys.executable, '-c', code, str(tmp_path)], check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert prepared.open_prepared('mnist5k', str(tmp_path)) is None
    (left,) = set((tmp_path / 'mnist5k').glob('incomplete.*')) - {foreign}
    preparation.prepare('mnist5k', str(tmp_path))
    assert f'removing {left}' in capsys.readouterr().out
    # What was there before is not ours to remove.
    assert {path.name for path in (tmp_path / 'mnist5k').iterdir()} == {'1.0.0', foreign.name}
    config = data_config(name='mnist5k', data_dir=str(tmp_path))
    assert len(data.open(config).splits['train']) == 4000


def test_prepare_cifar10_from_manual_archive_needs_no_network(tmp_path, monkeypatch):
    def no_network(*arguments, **keywords):
        raise socket.gaierror('no network')

    monkeypatch.setattr(socket, 'getaddrinfo', no_network)
    spec = dataclasses.replace(data.DATASETS['cifar10'], num_train=10, num_test=2)
    monkeypatch.setitem(data.DATASETS, 'cifar10', spec)
    batches = ['test_batch', *(f'data_batch_{number}' for number in range(1, 6))]
    images = np.random.default_rng(0).integers(0, 256, (len(batches), 2, 3, 32, 32), np.uint8)
    files = {
        f'cifar-10-batches-bin/{name}.bin': b''.join(
            bytes([label]) + image.tobytes() for label, image in enumerate(batch)
        )
        for name, batch in zip(batches, images, strict=True)
    }
    files['cifar-10-batches-bin/batches.meta.txt'] = '\n'.join(CIFAR10_CLASSES).encode()
    archive = tmp_path / 'downloads' / 'manual' / 'cifar-10-binary.tar.gz'
    write_tar(archive, files, mode='w:gz')
    # It is not the real one.
    with pytest.raises(UserError, match='has wrong checksum'):
        preparation.prepare('cifar10', str(tmp_path))
    builder = tfds.builder_cls('cifar10')
    ((url, info),) = builder.url_infos.items()
    content = archive.read_bytes()
    info = dataclasses.replace(
        info, size=len(content), checksum=hashlib.sha256(content).hexdigest()
    )
    monkeypatch.setattr(builder, 'url_infos', {url: info})
    preparation.prepare('cifar10', str(tmp_path))
    assert len(list(tmp_path.glob('cifar10/*/*-train.array_record-*'))) == 1
    source = data.open(data_config(name='cifar10', data_dir=str(tmp_path)))
    assert source.label_names == tuple(CIFAR10_CLASSES)
    found = {image.tobytes() for image in source.examples('train').images}
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


def test_prepare_imagenet_writes_tfrecord_that_streams(tmp_path, monkeypatch):
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
    plan = dataclasses.replace(preparation.PREPARATIONS['imagenet2012'], size=0, manual_files=files)
    monkeypatch.setitem(preparation.PREPARATIONS, 'imagenet2012', plan)
    spec = dataclasses.replace(data.DATASETS['imagenet2012'], num_train=4, num_test=3)
    monkeypatch.setitem(data.DATASETS, 'imagenet2012', spec)
    preparation.prepare('imagenet2012', str(tmp_path))
    assert len(list(tmp_path.glob('imagenet2012/*/*-train.tfrecord-*'))) == 1
    config = data_config(name='imagenet2012', data_dir=str(tmp_path))
    source = data.open(config)
    assert (source.spec.num_train, source.spec.num_test) == (4, 3)
    assert (source.spec.image_shape, source.spec.mean) == (spec.image_shape, spec.mean)
    assert source.spec.streamed
    (batch,) = source.evaluation_batches('test', 4)
    assert batch['image'].shape == (4, 224, 224, 3)
    assert batch['mask'].tolist() == [1, 1, 1, 0]
