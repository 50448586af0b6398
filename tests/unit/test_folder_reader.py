"""Reading folders of images: unreadable and duplicate images, too large ones, the cached check."""

import errno
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tfds_fixtures import data_config, save, write_imagenet

from one_jax import data
from one_jax.data import folder_reader, image_decoding
from one_jax.errors import ConfigError, UserError

streams = pytest.mark.parametrize('stream', [False, True])


def pixels(seed):
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Images of two classes, ten each to train on and three for the test; an empty cache."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    for seed in range(26):
        split, number = ('train', seed % 10) if seed < 20 else ('test', seed % 3)
        name = 'ab'[seed >= 10] if seed < 20 else 'ab'[seed >= 23]
        path = tmp_path / 'root' / split / name / f'{number}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(seed)).save(path)
    return tmp_path / 'root'


def open_folder(root, **fields):
    fields = {'image_size': 8, 'augment': 'none', **fields}
    return data.open(data_config(name='image_folder', root=str(root), **fields))


def evaluation_images(source, split):
    batches = list(source.evaluation_batches(split, 8))
    return {
        name: np.concatenate([batch[name][batch['mask'] > 0] for batch in batches])
        for name in ('image', 'label')
    }


def training_images(source, count):
    batch = next(iter(source.train_batches(count, 0).iterate(0)))
    return sorted(zip(map(bytes, batch['image']), batch['label'].tolist(), strict=True))


# Images that cannot be read.


@streams
def test_open_folder_skips_unreadable_images_on_request_and_names_them(root, capsys, stream):
    for name in ('train/a/1.png', 'train/b/9.png', 'test/b/0.png'):
        (root / name).write_bytes((root / name).read_bytes()[:70])
    with pytest.raises(UserError, match=r'3 images cannot .* give data\.skip_unreadable=True'):
        open_folder(root, stream=stream)
    capsys.readouterr()
    source = open_folder(root, stream=stream, skip_unreadable=True)
    output = capsys.readouterr().out
    assert '3 images cannot be read and are skipped: ' in output
    assert all(name in output for name in ('train/a/1.png', 'train/b/9.png', 'test/b/0.png'))
    assert source.unreadable == source.fingerprint['unreadable_images'] == 3
    assert source.description()['unreadable_images'] == 3
    assert (source.spec.num_train, source.spec.num_test) == (18, 5)
    assert training_images(source, 18) == sorted(
        (pixels(seed).tobytes(), int(seed >= 10)) for seed in range(20) if seed not in (1, 19)
    )
    expected = np.stack([pixels(seed) for seed in (21, 22, 20, 25, 23, 24) if seed != 24])
    found = evaluation_images(source, 'test')
    assert found['label'].tolist() == [0, 0, 0, 1, 1]
    assert {x.tobytes() for x in found['image']} == {x.tobytes() for x in expected}


@streams
def test_open_folder_without_a_readable_image_of_a_class_is_an_error(root, stream):
    for path in (root / 'train/b').iterdir():
        path.write_bytes(b'')
    with pytest.raises(UserError, match=r'10 images .* none is left of the class of .*train/b'):
        open_folder(root, stream=stream, skip_unreadable=True)


def test_skip_unreadable_of_a_prepared_set_is_an_error():
    with pytest.raises(ConfigError, match=r'data\.skip_unreadable=True .* False unless'):
        data.open(data_config(skip_unreadable=True))


def png_without_pixels(side):
    """A PNG that says to be that large."""
    header = struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0)
    chunks = (b'IHDR' + header, b'IDAT' + zlib.compress(b''), b'IEND')
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(chunk) - 4) + chunk + struct.pack('>I', zlib.crc32(chunk))
        for chunk in chunks
    )


@streams
@pytest.mark.parametrize('side', [8193, 13_000, 40_000])
def test_open_folder_of_an_image_too_large_to_decode_is_an_error(root, stream, side):
    (root / 'train/a/huge.png').write_bytes(png_without_pixels(side))
    named = rf'huge\.png \(it has {side**2} pixels, more than 67108864: make it smaller'
    with pytest.raises(UserError, match=named):
        open_folder(root, stream=stream)
    with pytest.raises(ValueError, match=f'it has {side**2} pixels'):
        image_decoding.read_image(root / 'train/a/huge.png', (8, 8))


@pytest.mark.parametrize('augment', ['default', 'none'])
def test_streaming_a_record_too_large_to_decode_is_an_error(tmp_path, monkeypatch, augment):
    images = [save(Image.fromarray(pixels(seed))) for seed in range(4)]
    write_imagenet(tmp_path, images, range(4), num_shards=1)
    config = data_config(name='imagenet2012', data_dir=str(tmp_path), image_size=8, augment=augment)
    assert len(evaluation_images(data.open(config), 'test')['label']) == 4
    monkeypatch.setattr(image_decoding, 'MAX_PIXELS', 63)
    for batches in (
        data.open(config).evaluation_batches('test', 4),
        data.open(config).train_batches(4, 0).iterate(0),
    ):
        with pytest.raises(UserError, match=r'image \d .* it has 64 pixels, more than 63'):
            next(iter(batches))


# Images in two splits.


@streams
def test_open_folder_warns_of_images_in_two_splits(root, capsys, stream):
    open_folder(root, stream=stream)
    assert 'two splits' not in capsys.readouterr().out
    # Twice in the training images is no leak.
    (root / 'train/a/copy.png').write_bytes((root / 'train/a/3.png').read_bytes())
    open_folder(root, stream=stream)
    assert 'two splits' not in capsys.readouterr().out
    for name in ('a/copy', 'b/copy'):
        (root / f'test/{name}.png').write_bytes((root / 'train/a/3.png').read_bytes())
    for _ in range(2):
        open_folder(root, stream=stream)
        (line,) = (x for x in capsys.readouterr().out.splitlines() if 'two splits' in x)
        assert line.startswith('2 images are in two splits, such as ')
        assert 'train/a/3.png' in line
        assert 'test/a/copy.png' in line


# The check of a stream is cached.


def test_open_stream_reads_files_again_only_if_one_has_changed(root, tmp_path, monkeypatch):
    def contents():
        return {path: path.stat().st_mtime_ns for path in root.rglob('*')}

    reads, read = [], folder_reader._read
    monkeypatch.setattr(folder_reader, '_read', lambda *args: reads.append(1) or read(*args))

    def count_reads(**fields):
        reads.clear()
        source = open_folder(root, stream=True, **fields)
        assert source.spec.num_train == 20
        return len(reads), source.spec.mean

    before = contents()
    first, mean = count_reads()
    assert first == 1
    assert count_reads() == (0, mean)
    # Without statistics, it is another check.
    assert [count_reads(augment='default')[0] for _ in range(2)] == [1, 0]
    assert contents() == before
    os.utime(root / 'test/a/0.png', ns=(0, 0))
    assert [count_reads()[0] for _ in range(2)] == [1, 0]
    Image.fromarray(pixels(99)).save(root / 'train/a/0.png')
    changed, other_mean = count_reads()
    assert changed == 1
    assert other_mean != mean
    # A damaged cache is ignored, and replaced.
    for content in (b'', b'PK\3\4 no archive', b'\0' * 999):
        for path in (tmp_path / 'cache').rglob('*.npz'):
            path.write_bytes(content)
        assert [count_reads()[0] for _ in range(2)] == [1, 0]
    # One that cannot be written is ignored too.
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
    assert [count_reads() for _ in range(2)] == [(1, other_mean)] * 2


def test_open_stream_finds_the_same_damage_in_the_cache(root):
    (root / 'train/a/5.png').write_bytes(b'')
    for _ in range(2):
        with pytest.raises(UserError, match=r'1 images cannot .*5\.png \(empty file\)'):
            open_folder(root, stream=True)
    assert open_folder(root, stream=True, skip_unreadable=True).unreadable == 1


# Subsets, statistics and what is printed.


def test_stream_of_a_subset_has_the_images_of_memory(root):
    fields = {'validation_fraction': 0.25, 'examples_per_class': 4, 'subset_seed': 3}
    memory, stream = (open_folder(root, stream=stream, **fields) for stream in (False, True))
    assert (memory.spec.mean, memory.spec.std) == (stream.spec.mean, stream.spec.std)
    assert memory.evaluation_splits == stream.evaluation_splits == ('validation', 'test')
    for split, count in (('validation', 4), ('test', 6)):
        found = evaluation_images(stream, split)
        assert len(found['label']) == count
        for name, expected in evaluation_images(memory, split).items():
            np.testing.assert_array_equal(found[name], expected)
    assert training_images(stream, 8) == training_images(memory, 8)
    other = open_folder(root, stream=True, **{**fields, 'subset_seed': 4})
    assert training_images(other, 8) != training_images(memory, 8)
    with pytest.raises(ConfigError, match=r'data\.examples_per_class=11 .*0 \(all\) to 10'):
        open_folder(root, stream=True, examples_per_class=11)


def test_summary_of_a_folder_names_classes_splits_and_preprocessing(root):
    summary = open_folder(root, validation_fraction=0.2, augment='pad_crop').summary
    first, second = summary.splitlines()
    assert (
        first == "data: image_folder, 2 classes ('a', 'b'); images: train 16, test 6, validation 4"
    )
    assert second.startswith("pixels: 8x8, centre squares, data.augment='pad_crop'; mean 0.")
    assert second.endswith("(the training images')")
    second = open_folder(root, stream=True, augment='default').summary.splitlines()[1]
    assert second == (
        'pixels: 8x8, random-resized crops and flips; evaluation 0.875; '
        "mean 0.485, 0.456, 0.406, deviation 0.229, 0.224, 0.225 (ImageNet's)"
    )


def test_open_stream_reads_a_file_again_that_could_not_be_opened(root, monkeypatch):
    """Permission comes without a change of its size and time."""
    read_bytes = Path.read_bytes

    def denied(path):
        if path.name == '5.png':
            raise PermissionError(errno.EACCES, 'Permission denied', str(path))
        return read_bytes(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, 'read_bytes', denied)
        with pytest.raises(UserError, match=r'2 images cannot .*5\.png \(Permission denied\)'):
            open_folder(root, stream=True)
    assert open_folder(root, stream=True).unreadable == 0
