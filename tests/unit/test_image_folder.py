"""Folders of images: layouts, odd files, every colour mode, errors."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tfds_fixtures import data_config

from one_jax import data
from one_jax.data import image_folder
from one_jax.errors import ConfigError, UserError
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
            image_folder.read_image(tmp_path / name), expected, err_msg=name
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
        image_folder.read_image(tmp_path / 'p.png'), palette.reshape(256, 3)[indices]
    )


def test_read_image_of_grey_and_cmyk_jpegs_returns_rgb(tmp_path):
    colour = np.full((16, 16, 3), (200, 40, 90), np.uint8)
    Image.fromarray(colour).convert('CMYK').save(tmp_path / 'cmyk.jpg', quality=100)
    with Image.open(tmp_path / 'cmyk.jpg') as saved:
        assert saved.mode == 'CMYK'
    read = image_folder.read_image(tmp_path / 'cmyk.jpg')
    np.testing.assert_allclose(read, colour, atol=4)
    Image.fromarray(colour).convert('L').save(tmp_path / 'grey.jpg')
    read = image_folder.read_image(tmp_path / 'grey.jpg')
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
        image_folder.read_image(tmp_path / 'image.png', (16, 16)).astype(int),
        resized[top : top + 16, left : left + 16].astype(int),
        atol=1,
    )


def test_open_folder_of_several_sizes_requires_image_size(tmp_path):
    write_tree(tmp_path, {'train/a': 2, 'train/b': 2, 'test/a': 1, 'test/b': 1})
    write(tmp_path / 'train/b/odd.png', pixels(6, (5, 9, 3)))
    with pytest.raises(ConfigError, match=r'data\.image_size=0 .*odd\.png is 5x9') as error:
        data.open(folder_config(tmp_path))
    assert '1 are not 8x8' in str(error.value)
    config = folder_config(tmp_path, image_size=4)
    assert data.open(config).examples('train').images.shape == (5, 4, 4, 3)


# Odd files and refusals.


def test_open_folder_notes_ignored_files(tmp_path, capsys):
    write_tree(tmp_path, {'train/a': 2, 'train/b': 2, 'test/a': 1, 'test/b': 1})
    odd = ['train/README.txt', 'train/a/.DS_Store', 'train/a/notes.txt', 'train/b/Thumbs.db']
    for name in [*odd, 'test/labels.csv', 'test/a/x.gif']:
        (tmp_path / name).write_text('odd')
    (tmp_path / 'train/a/more').mkdir()
    source = data.open(folder_config(tmp_path))
    assert (len(source.examples('train')), len(source.examples('test'))) == (4, 2)
    (line,) = capsys.readouterr().out.splitlines()
    assert '(7 in all)' in line
    assert "'test/a/x.gif', 'test/labels.csv', 'train/README.txt'" in line
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
    write_tree(tmp_path, {'train/a': 1, 'train/b': 1, 'train/c': 1, 'test/b': 1, 'val/a': 1})
    source = data.open(folder_config(tmp_path))
    assert source.examples('test').labels.tolist() == [1]
    output = capsys.readouterr().out
    assert "classes without an image in test: 'a', 'c'" in output
    assert 'val is not used, test is' in output


def test_open_folder_larger_than_memory_is_an_error_before_it_is_read(tmp_path, monkeypatch):
    write_tree(tmp_path, {'train/a': 2, 'train/b': 2, 'test/a': 1, 'test/b': 1})
    monkeypatch.setattr(memory, 'available_bytes', lambda: 500)
    monkeypatch.setattr(image_folder, 'read_all', None)
    with pytest.raises(UserError, match=r'needs 0\.0 MB .*lower data\.image_size'):
        data.open(folder_config(tmp_path))


def test_generated_images_need_no_folder():
    spec = data.open(data_config(name='image_folder', generated_examples=16)).spec
    assert (spec.image_shape, spec.num_classes) == ((32, 32, 3), 10)
    config = data_config(name='image_folder', generated_examples=16, image_size=48)
    assert data.open(config).examples('train').images.shape == (16, 48, 48, 3)


def test_read_image_of_postscript_is_an_error_whatever_its_name(tmp_path):
    """A PostScript file is a program, whatever its name says."""
    write_tree(tmp_path, {'train/cat': 2, 'train/dog': 2})
    eps = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n'
    (tmp_path / 'train/cat/9.png').write_bytes(eps)
    with pytest.raises(UserError, match=r'9\.png.*cannot identify image file'):
        data.open(folder_config(tmp_path, image_size=8))
