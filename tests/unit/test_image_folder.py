"""Folders of images: layouts, odd files, every colour mode, errors."""

import errno
import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tfds_fixtures import data_config

from one_jax import data
from one_jax.data import folder_reader, image_decoding
from one_jax.errors import ConfigError, UserError
from one_jax.predict import find_images
from one_jax.runtime import memory


def folder_config(root: Path, **fields):
    return data_config(name='image_folder', root=str(root), **fields)


def pixels(seed: int, shape: tuple[int, ...] = (8, 8, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def write(path: Path, array: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def write_tree(root: Path, counts: dict[str, int], shape: tuple[int, ...] = (8, 8, 3)) -> None:
    """PNG images, each another one, for `{'train/cat': 3, ...}`."""
    seed = 0
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            write(root / folder / f'{number}.png', pixels(seed, shape))
            seed += 1


def by_image(examples: data.Examples) -> dict[bytes, int]:
    return {
        image.tobytes(): label
        for image, label in zip(examples.images, examples.labels.tolist(), strict=True)
    }


# What is read.


@pytest.mark.parametrize('test_folder', ['test', 'val', 'validation'])
def test_open_folder_reads_images_names_and_statistics(tmp_path, capsys, test_folder):
    write_tree(
        tmp_path,
        {'train/dog': 5, 'train/cat': 3, f'{test_folder}/cat': 2, f'{test_folder}/dog': 1},
        shape=(6, 10, 3),
    )
    config = folder_config(tmp_path)
    source = data.open(config)
    spec = source.spec
    assert (spec.num_train, spec.num_test, spec.num_classes) == (8, 3, 2)
    assert spec.image_shape == (6, 10, 3)
    assert source.label_names == ('cat', 'dog')
    assert by_image(source.examples('train')) == {
        pixels(seed, (6, 10, 3)).tobytes(): int(seed < 5) for seed in range(8)
    }
    assert by_image(source.examples('test')) == {
        pixels(seed, (6, 10, 3)).tobytes(): int(seed == 10) for seed in range(8, 11)
    }
    train = np.stack([pixels(seed, (6, 10, 3)) for seed in range(8)]) / 255
    np.testing.assert_allclose(source.spec.mean, train.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(source.spec.std, train.std((0, 1, 2)), rtol=1e-12)
    assert capsys.readouterr().out == ''


def test_open_folder_without_test_images_holds_out_a_fifth_of_every_class(tmp_path, capsys):
    write_tree(tmp_path, {'train/a': 20, 'train/b': 10, 'train/c': 2})
    source = data.open(folder_config(tmp_path))
    (line,) = capsys.readouterr().out.splitlines()
    assert '7 images of train, 20% of every class' in line
    train, test = source.examples('train'), source.examples('test')
    assert np.bincount(train.labels).tolist() == [16, 8, 1]
    assert np.bincount(test.labels).tolist() == [4, 2, 1]
    assert (source.spec.num_train, source.spec.num_test) == (25, 7)
    assert not by_image(train).keys() & by_image(test).keys()
    assert len(by_image(train) | by_image(test)) == 32
    again = data.open(folder_config(tmp_path))
    np.testing.assert_array_equal(again.examples('test').images, test.images)
    other = data.open(folder_config(tmp_path, subset_seed=1))
    assert by_image(other.examples('test')) != by_image(test)


def test_open_folder_with_subsets_takes_them_from_train(tmp_path):
    write_tree(tmp_path, {'train/a': 10, 'train/b': 10, 'test/a': 1, 'test/b': 1})
    splits = data.open(
        folder_config(tmp_path, validation_fraction=0.2, examples_per_class=3)
    ).splits
    assert {name: len(split) for name, split in splits.items()} == {
        'train': 6,
        'test': 2,
        'validation': 4,
    }


# Modes, orientation and size of images.


def test_read_image_of_every_mode_returns_rgb(tmp_path):
    grey, rgb = pixels(0, (8, 8)), pixels(1)
    alpha = pixels(2, (8, 8))
    cases = {
        'L.png': (Image.fromarray(grey), np.repeat(grey[..., None], 3, -1)),
        'LA.png': (
            Image.merge('LA', (Image.fromarray(grey), Image.fromarray(alpha))),
            np.repeat(grey[..., None], 3, -1),
        ),
        'RGBA.png': (Image.fromarray(np.dstack([rgb, alpha])), rgb),
        'RGBA.webp': (Image.fromarray(np.dstack([rgb, alpha | 1])), rgb),
        'rgb.BMP': (Image.fromarray(rgb), rgb),
        '1.png': (
            Image.fromarray(grey > 127),
            np.repeat(np.where(grey > 127, 255, 0)[..., None], 3, -1),
        ),
        '16bit.png': (
            Image.fromarray(grey.astype(np.uint16) * 256 + alpha),
            np.repeat(grey[..., None], 3, -1),
        ),
    }
    for name, (image, expected) in cases.items():
        options = {'lossless': True, 'exact': True} if name.endswith('webp') else {}
        image.save(tmp_path / name, **options)
        np.testing.assert_array_equal(
            image_decoding.read_image(tmp_path / name), expected, err_msg=name
        )


def test_read_image_of_transparent_palette_keeps_colours_without_warning(tmp_path):
    palette = np.arange(256 * 3).astype(np.uint8)
    indices = pixels(3, (8, 8))
    image = Image.fromarray(indices)
    image = image.convert('P')
    image.putpalette(palette.tobytes())
    image.putdata(indices.ravel().tolist())
    image.save(tmp_path / 'p.png', transparency=bytes(range(256)))
    with Image.open(tmp_path / 'p.png') as saved:
        assert saved.mode == 'P'
        assert isinstance(saved.info['transparency'], bytes)
    np.testing.assert_array_equal(
        image_decoding.read_image(tmp_path / 'p.png'), palette.reshape(256, 3)[indices]
    )


def test_read_image_of_grey_and_cmyk_jpegs_returns_rgb(tmp_path):
    colour = np.full((16, 16, 3), (200, 40, 90), np.uint8)
    Image.fromarray(colour).convert('CMYK').save(tmp_path / 'cmyk.jpg', quality=100)
    with Image.open(tmp_path / 'cmyk.jpg') as saved:
        assert saved.mode == 'CMYK'
    read = image_decoding.read_image(tmp_path / 'cmyk.jpg')
    np.testing.assert_allclose(read, colour, atol=4)
    Image.fromarray(colour).convert('L').save(tmp_path / 'grey.jpg')
    read = image_decoding.read_image(tmp_path / 'grey.jpg')
    np.testing.assert_array_equal(read[..., 0], read[..., 2])


def test_open_folder_with_exif_orientation_turns_images(tmp_path):
    # Orientation 6: the camera was turned; the image is seen after a quarter turn clockwise.
    exif = Image.Exif()
    exif[0x0112] = 6
    array = pixels(4, (6, 10, 3))
    for name in ('train/a/0.png', 'train/b/0.png', 'test/a/0.png', 'test/b/0.png'):
        write(tmp_path / name, array, exif=exif)
    source = data.open(folder_config(tmp_path))
    assert source.spec.image_shape == (10, 6, 3)
    np.testing.assert_array_equal(source.examples('train').images[0], np.rot90(array, -1))


@pytest.mark.parametrize('shape', [(64, 32, 3), (32, 96, 3), (16, 16, 3), (8, 16, 3)])
def test_read_image_with_size_resizes_and_crops_the_centre(tmp_path, shape):
    array = pixels(5, shape)
    write(tmp_path / 'image.png', array)
    scale = 16 / min(shape[:2])
    height, width = round(shape[0] * scale), round(shape[1] * scale)
    resized = np.asarray(Image.fromarray(array).resize((width, height), Image.Resampling.BILINEAR))
    top, left = (height - 16) // 2, (width - 16) // 2
    np.testing.assert_allclose(
        image_decoding.read_image(tmp_path / 'image.png', (16, 16)).astype(int),
        resized[top : top + 16, left : left + 16].astype(int),
        atol=1,
    )


def test_open_folder_of_several_sizes_requires_image_size(tmp_path):
    write_tree(tmp_path, {'train/a': 2, 'train/b': 2, 'test/a': 1, 'test/b': 1})
    write(tmp_path / 'train/b/odd.png', pixels(6, (5, 9, 3)))
    with pytest.raises(ConfigError, match=r"data\.image_size=0 .*odd\.png' is 5x9") as error:
        data.open(folder_config(tmp_path))
    assert '1 are not 8x8' in str(error.value)
    config = folder_config(tmp_path, image_size=4)
    assert data.open(config).examples('train').images.shape == (5, 4, 4, 3)


# Odd files and refusals.


def test_open_folder_notes_ignored_files(tmp_path, capsys):
    write_tree(tmp_path, {'train/a': 2, 'train/b': 2, 'test/a': 1, 'test/b': 1})
    odd = ['train/README.txt', 'train/a/.DS_Store', 'train/a/notes.txt', 'train/b/Thumbs.db']
    for name in [*odd, 'test/labels.csv', 'test/a/x.mp4']:
        (tmp_path / name).write_text('odd')
    source = data.open(folder_config(tmp_path))
    assert (len(source.examples('train')), len(source.examples('test'))) == (4, 2)
    (line,) = capsys.readouterr().out.splitlines()
    assert '(6 in all)' in line
    assert "'test/a/x.mp4', 'test/labels.csv', 'train/README.txt'" in line
    assert 'Thumbs.db' not in line


def test_open_folder_with_damaged_images_counts_all_and_names_five(tmp_path):
    write_tree(tmp_path, {'train/a': 9, 'train/b': 2, 'test/a': 1, 'test/b': 1})
    (tmp_path / 'train/a/0.png').write_bytes(b'')
    whole = (tmp_path / 'train/a/1.png').read_bytes()
    (tmp_path / 'train/a/1.png').write_bytes(whole[: len(whole) // 2])
    (tmp_path / 'train/a/2.png').write_bytes(b'no image')
    jpeg = io.BytesIO()
    Image.fromarray(pixels(7)).save(jpeg, 'JPEG')
    for number in range(3, 7):
        (tmp_path / f'train/a/{number}.jpg').write_bytes(jpeg.getvalue()[:-100])
    with pytest.raises(UserError, match='7 images cannot be read') as error:
        data.open(folder_config(tmp_path))
    message = str(error.value)
    assert '\n' not in message
    assert 'a/0.png (empty file)' in message
    assert message.count(str(tmp_path)) == 5
    assert 'train/a/6.jpg' not in message


def test_open_folder_with_wrong_root_is_an_error(tmp_path):
    for root in ('', tmp_path / 'nowhere', tmp_path):
        with pytest.raises(ConfigError, match=r'data\.root=.*a folder that holds train/<class>'):
            data.open(folder_config(root))


@pytest.mark.parametrize(
    ('counts', 'message'),
    [
        ({'train/a': 2}, r"at least two class folders, but has \['a'\]"),
        ({'train/a': 2, 'train/b': 0}, r"must hold at least \d images .* add some to 'b'"),
        ({f'train/{n}': 2 * (n == 9) for n in range(10)}, r"'0', '1', .*'4' \(9 in all\)"),
        (
            {'train/a': 2, 'train/b': 1},
            "at least 2 images .* to hold out for testing: add some to 'b'",
        ),
        ({'train/a': 2, 'train/b': 1, 'test/c': 1}, "test has classes that train lacks: 'c'"),
        ({'train/a': 2, 'train/b': 1, 'val/a': 0}, 'there is no image in val'),
    ],
)
def test_open_folder_with_empty_or_unknown_classes_is_an_error(tmp_path, counts, message):
    write_tree(tmp_path, counts)
    with pytest.raises(UserError, match=message) as error:
        data.open(folder_config(tmp_path))
    assert str(tmp_path) in str(error.value)


def test_open_folder_notes_classes_missing_in_test(tmp_path, capsys):
    write_tree(tmp_path, {'train/a': 1, 'train/b': 1, 'train/c': 1, 'test/b': 1})
    source = data.open(folder_config(tmp_path))
    assert source.examples('test').labels.tolist() == [1]
    assert "classes without an image in test: 'a', 'c'" in capsys.readouterr().out


@pytest.mark.parametrize('stream', [False, True])
def test_open_folder_with_val_and_test_validates_on_val(tmp_path, capsys, stream):
    counts = {'train/a': 3, 'train/b': 3, 'test/b': 1, 'val/a': 2, 'valid/a': 1}
    write_tree(tmp_path, counts)
    source = data.open(folder_config(tmp_path, stream=stream, image_size=8))
    assert source.evaluation_splits == ('validation', 'test')
    (batch,) = source.evaluation_batches('validation', 8)
    assert batch['label'][batch['mask'] > 0].tolist() == [0, 0]
    assert 'valid is not used, test is' in capsys.readouterr().out
    if not stream:
        data.open(folder_config(tmp_path, validation_fraction=0.4))
        assert 'val is not used, images of train are held out' in capsys.readouterr().out


def test_open_folder_of_classes_alone_holds_images_out(tmp_path, capsys, monkeypatch):
    write_tree(tmp_path / 'pets', {'cat': 5, 'dog': 5, '.git': 1})
    monkeypatch.setenv('HOME', str(tmp_path))
    source = data.open(folder_config('~/pets'))
    assert source.label_names == ('cat', 'dog')
    assert (source.spec.num_train, source.spec.num_test) == (8, 2)
    output = capsys.readouterr().out
    assert 'there is no folder train: its folders are the classes' in output
    assert "ignored files that are not images: '.git'" in output


def test_open_folder_skips_hidden_entries_and_loops_with_a_note(tmp_path, capsys):
    write_tree(tmp_path, {'train/a': 2, 'train/b': 2, 'test/a': 1, 'test/b': 1})
    write_tree(tmp_path, {'train/.ipynb_checkpoints': 2, 'test/.ipynb_checkpoints': 1})
    (tmp_path / 'train/a/._0.png').write_bytes(b'resource fork')
    (tmp_path / 'train/a/loop.png').symlink_to('loop.png')
    source = data.open(folder_config(tmp_path))
    assert source.label_names == ('a', 'b')
    assert (source.spec.num_train, source.spec.num_test) == (4, 2)
    output = capsys.readouterr().out
    for name in ('train/.ipynb_checkpoints', 'train/a/._0.png', 'train/a/loop.png'):
        assert name in output
    # Predictions are made for the same images.
    assert len(find_images([tmp_path])) == 6


@pytest.mark.parametrize('extension', ['tif', 'TIFF', 'gif', 'ppm', 'jfif', 'webp'])
def test_open_folder_reads_every_extension(tmp_path, extension):
    write_tree(tmp_path, {'train/a': 1, 'train/b': 2, 'test/a': 1})
    grey = np.full((8, 8, 3), 77, np.uint8)
    path = tmp_path / f'train/a/x.{extension}'
    form = {'jfif': 'JPEG'}.get(extension)
    Image.fromarray(grey).save(path, form, lossless=True)
    train = data.open(folder_config(tmp_path)).examples('train')
    assert (len(train), train.labels.tolist()) == (4, [0, 0, 1, 1])
    np.testing.assert_array_equal(train.images[1], grey)


@pytest.mark.parametrize('extension', ['gif', 'tif', 'webp', 'png'])
def test_read_image_of_several_frames_returns_the_first(tmp_path, extension):
    first, second = (Image.new('RGB', (8, 8), colour) for colour in ('red', 'blue'))
    options = {'save_all': True, 'append_images': [second], 'lossless': True}
    first.save(tmp_path / f'x.{extension}', **options)
    with Image.open(tmp_path / f'x.{extension}') as saved:
        assert saved.n_frames == 2
    read = image_decoding.read_image(tmp_path / f'x.{extension}')
    np.testing.assert_array_equal(read, np.full((8, 8, 3), (255, 0, 0)))


def test_read_image_of_more_than_16_bits_is_an_error(tmp_path):
    for array in (np.full((4, 4), 0.5, np.float32), np.full((4, 4), 70_000, np.int32)):
        Image.fromarray(array).save(tmp_path / 'x.tif')
        with pytest.raises(ValueError, match='more than 16 bits'):
            image_decoding.read_image(tmp_path / 'x.tif')


def test_read_image_with_unrelated_exif_damage_is_read(tmp_path):
    """A tag of a wrong type, which PIL cannot write again; and data that is no EXIF at all."""
    array = pixels(3, (6, 10, 3))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, 'maker'
    whole = exif.tobytes()
    # The maker's name is declared as an unknown type.
    broken = whole.replace(b'\x0f\x01\x02\x00', b'\x0f\x01\x63\x00')
    broken = broken.replace(b'\x01\x0f\x00\x02', b'\x01\x0f\x00\x63')
    assert broken != whole
    for data_, turns in ((whole, -1), (broken, -1), (b'Exif\0\0II*\0garbage', 0), (whole[:20], 0)):
        write(tmp_path / 'x.png', array, exif=data_)
        expected = np.rot90(array, turns)
        np.testing.assert_array_equal(image_decoding.read_image(tmp_path / 'x.png'), expected)


ORIENTATIONS = {
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: np.swapaxes(x, 0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.swapaxes(np.rot90(x, 2), 0, 1),
    8: np.rot90,
}


def photo(mode: str, seed: int) -> tuple[Image.Image, str, np.ndarray]:
    """Returns an image, its extension, and the RGB that it shows, from the values written alone."""
    array, grey = pixels(seed, (12, 20, 4)), pixels(seed, (12, 20))
    three_greys = np.repeat(grey[..., None], 3, -1)
    if mode == 'P':
        palette, image = pixels(seed + 99, (256, 3)), Image.fromarray(grey).convert('P')
        image.putpalette(palette.tobytes())
        image.putdata(grey.ravel().tolist())
        return image, 'png', palette[grey]
    if mode == 'CMYK':
        # Each ink takes its share of the light that black leaves.
        light = 255 - array[..., 3:].astype(int)
        shown = light - np.floor(array[..., :3] * light / 255 + 0.5).astype(int)
        return Image.fromarray(array, 'CMYK'), 'tif', shown.astype(np.uint8)
    if mode == 'JPEG':
        # Blocks of one colour each, which its transform keeps.
        blocks = np.kron(pixels(seed, (2, 3, 3)), np.ones((8, 8, 1), np.uint8))
        return Image.fromarray(blocks), 'jpg', blocks
    return {
        'RGB': (Image.fromarray(array[..., :3]), 'png', array[..., :3]),
        'RGBA': (Image.fromarray(array), 'png', array[..., :3]),
        'L': (Image.fromarray(grey), 'png', three_greys),
        'LA': (Image.fromarray(np.dstack([grey, array[..., 3]]), 'LA'), 'png', three_greys),
        'I;16': (Image.fromarray(grey.astype(np.uint16) * 256 + 9), 'png', three_greys),
    }[mode]


MODES = ('RGB', 'L', 'I;16', 'P', 'RGBA', 'LA', 'CMYK', 'JPEG')
NUM_PHOTOS = len(ORIENTATIONS) * len(MODES)


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """A folder with photos of every EXIF orientation and colour mode; returns their pixels."""
    root, expected = tmp_path_factory.mktemp('photos'), {}
    for split in ('train', 'test'):
        for orientation, turn in ORIENTATIONS.items():
            exif = Image.Exif()
            exif[0x0112] = orientation
            for mode in MODES:
                image, extension, shown = photo(mode, orientation + (split == 'test') * 10)
                path = root / split / 'a' / f'{orientation}{MODES.index(mode)}.{extension}'
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(
                    path,
                    exif=exif,
                    **{'quality': 100, 'subsampling': 0} if extension == 'jpg' else {},
                )
                expected[path] = turn(shown)
    write_tree(root, {'train/b': 1, 'test/b': 1})
    return root, expected


def test_read_image_of_every_orientation_and_mode_is_upright(photos):
    """Against the values written: no decoder is trusted."""
    for path, upright in photos[1].items():
        tolerance = 3 if path.suffix == '.jpg' else 0
        difference = image_decoding.read_image(path).astype(int) - upright
        assert np.abs(difference).max() <= tolerance, path.name


@pytest.mark.parametrize('augment', ['none', 'pad_crop', 'pad_crop_flip'])
def test_stream_with_chosen_augmentation_has_the_pixels_of_memory_and_predict(photos, augment):
    root, _ = photos
    fields = {'image_size': 8, 'augment': augment}
    memory_source = data.open(folder_config(root, **fields))
    stream = data.open(folder_config(root, stream=True, **fields))
    assert stream.description()['crop'] == memory_source.description()['crop'] == 1.0
    assert (stream.spec.augment, stream.spec.padding) == (augment, 1)
    assert (stream.spec.mean, stream.spec.std) == (memory_source.spec.mean, memory_source.spec.std)
    resident, streamed = (
        next(iter(source.evaluation_batches('test', NUM_PHOTOS + 1)))
        for source in (memory_source, stream)
    )
    np.testing.assert_array_equal(streamed['image'], resident['image'])
    batch = next(stream.train_batches(NUM_PHOTOS + 1, 0).iterate(0))
    assert by_image(data.Examples(batch['image'], batch['label'])) == by_image(
        memory_source.examples('train')
    )
    for path, image in zip(sorted((root / 'test/a').iterdir()), streamed['image'], strict=False):
        np.testing.assert_array_equal(image_decoding.read_image(path, (8, 8)), image)


def test_stream_with_default_crops_evaluates_the_pixels_of_predict(photos):
    root, _ = photos
    stream = data.open(folder_config(root, stream=True, image_size=8))
    crop = stream.description()['crop']
    assert crop == 0.875
    (batch,) = stream.evaluation_batches('test', NUM_PHOTOS + 1)
    for path, image in zip(sorted((root / 'test/a').iterdir()), batch['image'], strict=False):
        np.testing.assert_array_equal(image_decoding.read_image(path, (8, 8), crop), image)
    for stream in (False, True):
        config = folder_config(root, stream=stream, image_size=8, augment='none')
        (again,) = data.open(config, crop).evaluation_batches('test', NUM_PHOTOS + 1)
        np.testing.assert_array_equal(again['image'], batch['image'])
    with pytest.raises(ConfigError, match=r'data\.padding=2 .*choose data\.augment too'):
        data.open(folder_config(root, stream=True, image_size=8, padding=2))


def test_open_stream_lists_all_damaged_images_at_the_start(tmp_path):
    write_tree(tmp_path, {'train/a': 3, 'train/b': 2, 'test/a': 2, 'test/b': 1})
    jpeg = io.BytesIO()
    Image.fromarray(pixels(7, (64, 64, 3))).save(jpeg, 'JPEG')
    for name in ('train/a/1', 'test/a/1'):
        (tmp_path / f'{name}.jpg').write_bytes(jpeg.getvalue()[:-200])
    (tmp_path / 'test/b/0.png').write_bytes(b'')
    with pytest.raises(UserError, match='3 images cannot be read') as error:
        data.open(folder_config(tmp_path, stream=True, image_size=8))
    for name in ('train/a/1.jpg', 'test/a/1.jpg', 'test/b/0.png (empty file)'):
        assert name in str(error.value)


def test_open_folder_larger_than_memory_is_an_error_before_it_is_read(tmp_path, monkeypatch):
    write_tree(tmp_path, {'train/a': 2, 'train/b': 2, 'test/a': 1, 'test/b': 1})
    monkeypatch.setattr(memory, 'available_bytes', lambda: 500)
    monkeypatch.setattr(folder_reader, 'read_all', None)
    with pytest.raises(UserError, match=r'needs 0\.0 MB .*lower data\.image_size'):
        data.open(folder_config(tmp_path))


def test_generated_images_need_no_folder():
    spec = data.open(data_config(name='image_folder', generated_examples=16)).spec
    assert (spec.image_shape, spec.num_classes) == ((32, 32, 3), 10)
    config = data_config(name='image_folder', generated_examples=16, image_size=48)
    assert data.open(config).examples('train').images.shape == (16, 48, 48, 3)


@pytest.mark.parametrize('stream', [False, True])
def test_open_folder_with_postscript_is_an_error_and_runs_nothing(tmp_path, monkeypatch, stream):
    """A PostScript file is a program, whatever its name says."""
    write_tree(tmp_path, {'train/cat': 2, 'train/dog': 2})
    marker = tmp_path / 'ghostscript_was_started'
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin/gs').write_text(f'#!/bin/sh\ntouch {marker}\n')
    (tmp_path / 'bin/gs').chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path / 'bin'), prepend=os.pathsep)
    eps = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n'
    (tmp_path / 'train/cat/9.png').write_bytes(eps)
    with pytest.raises(UserError, match=r'9\.png.*cannot identify image file'):
        data.open(folder_config(tmp_path, image_size=8, stream=stream))
    with pytest.raises(OSError, match='cannot identify image file: not PNG, JPEG'):
        image_decoding.decode(eps)  # CINIC-10, prepared records and streams of TFRecords.
    assert not marker.exists()


def test_open_folder_of_nested_folders_takes_the_first_level_as_classes(tmp_path, capsys):
    counts = {'train/a': 1, 'train/a/x/y': 2, 'train/a/z': 1, 'train/b/q': 2, 'test/b/r': 1}
    write_tree(tmp_path, counts)
    write_tree(tmp_path, {'train/a/.hidden': 1})
    # A loop, and a second way to the same folder.
    (tmp_path / 'train/a/x/loop').symlink_to(tmp_path / 'train/a')
    (tmp_path / 'train/a/zz').symlink_to(tmp_path / 'train/a/z')
    source = data.open(folder_config(tmp_path))
    assert source.label_names == ('a', 'b')
    assert source.examples('train').labels.tolist() == [0] * 4 + [1] * 2
    assert len(by_image(source.examples('train'))) == 6
    output = capsys.readouterr().out
    ignored, nested = output.splitlines()[-2:]
    assert "'train/a/.hidden', 'train/a/x/loop', 'train/a/zz'" in ignored
    assert "whose images belong to the class: 'test/b/r', 'train/a/x', 'train/a/x/y'" in nested


def test_open_folder_with_odd_names_works_and_prints_one_line(tmp_path, capsys):
    write_tree(tmp_path, {'train/a': 1, 'train/b': 1, 'test/a': 1, 'test/b': 1})
    names = [b'\xff.png', b'\x1b[31m\n.png', b'x' * 251 + b'.png']
    for seed, name in enumerate(names):
        write(tmp_path / 'train/a' / os.fsdecode(name), pixels(50 + seed))
        (tmp_path / 'train/a' / os.fsdecode(name + b'.txt')[-250:]).write_text('')
    for stream in (False, True):
        source = data.open(folder_config(tmp_path, stream=stream, image_size=8))
        assert source.spec.num_train == 5
        assert len(source.fingerprint['train']) > 0
    output = capsys.readouterr().out
    output.encode()
    assert '\x1b' not in output
    assert '\\udcff.png.txt' in output
    (tmp_path / 'train/a' / os.fsdecode(names[0])).write_bytes(b'')
    with pytest.raises(UserError, match=r'udcff\.png \(empty file\)') as error:
        data.open(folder_config(tmp_path))
    str(error.value).encode()
    (tmp_path / 'train' / os.fsdecode(b'\xfe')).mkdir()
    with pytest.raises(ConfigError, match=r"names are not UTF-8: '\\udcfe'"):
        data.open(folder_config(tmp_path))
    for root in ('x' * 300, 'a\0b', '~nobody_of_this_name/x'):
        config = folder_config(root)
        assert not data.exists(config)
        with pytest.raises(UserError, match=r'data\.root='):
            data.open(config)


def test_open_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    write_tree(tmp_path, {'train/a': 1, 'train/b': 1, 'test/a': 1})

    def denied(path):
        raise PermissionError(errno.EACCES, 'Permission denied', str(path))

    monkeypatch.setattr(os, 'scandir', denied)
    with pytest.raises(UserError, match=r"data\.root=.* cannot be read: .*denied: '.*train/a'"):
        data.open(folder_config(tmp_path))


@pytest.mark.parametrize('stream', [False, True])
def test_fingerprint_of_a_folder_follows_content_not_place(tmp_path, stream):
    root = tmp_path / 'root'
    write_tree(root, {'train/a': 3, 'train/b': 2, 'test/a': 1, 'test/b': 1})

    def fingerprint(root):
        fields = {'image_size': 8, 'stream': stream}
        return data.open(folder_config(root, **fields)).fingerprint

    before = fingerprint(root)
    assert before['label_names'] == ['a', 'b']
    assert before['train'].startswith('5 images (checksum ')
    # Copied, with new times, to another place.
    shutil.copytree(root, tmp_path / 'copy', copy_function=shutil.copyfile)
    assert fingerprint(tmp_path / 'copy') == before
    # The content of two files, which have the same size, changes places; then one file is new.
    first, second = root / 'train/a/0.png', root / 'train/b/0.png'
    content = [path.read_bytes() for path in (first, second)]
    assert len(content[0]) == len(content[1])
    first.write_bytes(content[1])
    second.write_bytes(content[0])
    swapped = fingerprint(root)
    assert {name for name in before if before[name] != swapped[name]} == {'train'}
    write(root / 'test/b/new.png', pixels(99))
    assert fingerprint(root)['test'].startswith('3 images')
    assert fingerprint(root)['train'] == swapped['train']
    (root / 'train/b').rename(root / 'train/c')
    (root / 'test/b').rename(root / 'test/c')
    assert fingerprint(root)['label_names'] == ['a', 'c']


def test_exists_tells_folders_that_are_gone(tmp_path):
    assert not data.exists(folder_config(tmp_path / 'gone'))
    assert data.exists(folder_config(tmp_path))
    assert data.exists(folder_config(tmp_path / 'gone', generated_examples=8))
