"""Reads images, and any folder of them: `ROOT/train/<class>/*.png`, `ROOT/test/<class>/*.png`."""

import contextlib
import dataclasses
import io
import multiprocessing.pool
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from one_jax.data.resident import Examples, class_ranks
from one_jax.errors import UserError, explain, require

EXTENSIONS = ('.png', '.jpg', '.jpeg', '.bmp', '.webp')
# Decoders that only decode. Pillow has others: it would run the program in a PostScript file.
FORMATS = ('PNG', 'JPEG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'PPM', 'ICO')
TEST_FOLDERS = ('test', 'val', 'validation')
# Share of the training images of every class to hold out if there is no folder of test images.
HELD_OUT_SHARE = 0.2
# Stream of random bits that chooses them; see `batches.random_bits`.
_HELD_OUT_STREAM = 2**63 + 4
# How many offending files or classes a message names.
_NAMED = 5


def open_image(file: Path | BinaryIO) -> Image.Image:
    """Opens an image without decoding it; no other function of this package opens images."""
    return Image.open(file, formats=FORMATS)


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any mode to RGB; drops transparency, and reduces 16 bits of grey to 8."""
    if image.mode.startswith('I'):
        # PIL would clip the values at 255.
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    elif 'transparency' in image.info:
        # Avoids PIL's warning about converting a palette with transparency directly.
        image = image.convert('RGBA')
    return image.convert('RGB')


def decode(data: bytes) -> np.ndarray:
    """Decodes an image, uint8 [H, W, 3]; ignores its EXIF data, as TensorFlow does."""
    with open_image(io.BytesIO(data)) as image:
        return np.asarray(to_rgb(image))


def read_image(path: Path, size: tuple[int, int] | None = None, crop: float = 1.0) -> np.ndarray:
    """Reads one image, uint8 [H, W, 3], in the orientation given by its EXIF data.

    With a `size` (H, W), crops the centre, whose shorter side is the share `crop` of the image's,
    and resizes it (bilinear, antialiased).

    Raises:
      Exception: decoders of damaged files raise anything.
    """
    with open_image(path) as file:
        image = to_rgb(ImageOps.exif_transpose(file))
    if size:
        # Crops and resizes at once, which differs by rounding only.
        bleed = (1 - crop) / 2
        image = ImageOps.fit(image, size[::-1], Image.Resampling.BILINEAR, bleed=bleed)
    return np.asarray(image)


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFiles:
    """Image files in order of class and name, and their labels int32 [N].

    Implements `streaming.EncodedExamples`; all files are one shard, shuffled together.
    """

    paths: tuple[Path, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def shard_lengths(self) -> Sequence[int]:
        return [len(self.paths)]

    def take(self, indices: np.ndarray) -> 'ImageFiles':
        """Returns the files at `indices` [M], in that order."""
        return ImageFiles(tuple(self.paths[i] for i in indices.tolist()), self.labels[indices])

    def read(self, index: int) -> tuple[bytes, int]:
        """Returns the encoded image and the label of an example."""
        with explain(f'{self.describe(index)} cannot be read', OSError):
            return self.paths[index].read_bytes(), int(self.labels[index])

    def prepare(self, indices: np.ndarray) -> None:
        """Does nothing: files need no index."""

    def describe(self, index: int) -> str:
        """Names an example in errors."""
        return f'image {str(self.paths[index])!r}'


def find(root: str, subset_seed: int) -> tuple[tuple[str, ...], dict[str, ImageFiles], list[str]]:
    """Lists a folder of images.

    Without a folder of test images, `subset_seed` chooses `HELD_OUT_SHARE` of every class of train
    to hold out.

    Returns:
      The sorted names of the classes; the splits 'train' and 'test'; and lines to show the user:
      files ignored, images held out.

    Raises:
      ConfigError: there is no such folder, fewer than two classes, or a class without images.
    """

    def check(condition: bool, message: str) -> None:
        require(condition, 'data.root', root, message)

    folder = Path(root).expanduser()
    check(
        root and (folder / 'train').is_dir(),
        'it must be a folder that holds train/<class>/*.png (or .jpg, .webp, ...) and, for test '
        'images, test/<class>/',
    )
    names = _class_folders(folder / 'train')
    check(len(names) >= 2, f'train must hold at least two class folders, but has {list(names)}')
    ignored: list[Path] = []
    train = _list_split(folder / 'train', names, ignored)
    used, *unused = [name for name in TEST_FOLDERS if (folder / name).is_dir()] or [None]
    minimum, purpose = (1, '') if used else (2, ', one of them to hold out for testing')
    counts = np.bincount(train.labels, minlength=len(names))
    few = [name for name, count in zip(names, counts, strict=True) if count < minimum]
    check(
        not few,
        f'every class folder of train must hold at least {minimum} images '
        f'({", ".join(EXTENSIONS)}){purpose}: add some to {_some(few)}, or remove it',
    )
    notes = [f'{name} is not used, {used} is' for name in unused]
    if used:
        unknown = sorted({*_class_folders(folder / used)} - {*names})
        check(not unknown, f'{used} has classes that train lacks: {_some(unknown)}')
        test = _list_split(folder / used, names, ignored)
        check(len(test) > 0, f'there is no image in {used}: add some, or remove the folder')
        missing = [name for label, name in enumerate(names) if label not in test.labels]
        if missing:
            notes.append(f'classes without an image in {used}: {_some(missing)}')
    else:
        ranks = class_ranks(train.labels, subset_seed, _HELD_OUT_STREAM)
        number = np.maximum(np.rint(HELD_OUT_SHARE * counts), 1)
        held_out = ranks < number[train.labels]
        train, test = (train.take(np.flatnonzero(part)) for part in (~held_out, held_out))
        notes.append(
            f'there is no folder test: {len(test)} images of train, {HELD_OUT_SHARE:.0%} of every '
            f'class, are held out as the test split (data.subset_seed={subset_seed})'
        )
    if ignored:
        relative = [str(path.relative_to(folder)) for path in sorted(ignored)]
        notes.append(f'ignored files that are not images: {_some(relative)}')
    notes = [f'data.root={root!r}: {note}' for note in notes]
    return names, {'train': train, 'test': test}, notes


def image_shape(files: ImageFiles, image_size: int) -> tuple[int, int, int]:
    """Returns (H, W, 3) of images in memory: `image_size` squared, or the size of the first image.

    Skips damaged images, which `read_all` reports.
    """
    if image_size:
        return image_size, image_size, 3
    for path in files.paths:
        with contextlib.suppress(Exception), open_image(path) as image:
            width, height = ImageOps.exif_transpose(image).size
            return height, width, 3
    return 0, 0, 3


def read_all(files: ImageFiles, shape: tuple[int, int, int], image_size: int) -> Examples:
    """Reads images into memory in parallel, in the order of `files`, all of the same `shape`.

    Crops and resizes them to squares of side `image_size`, unless it is 0.

    Raises:
      ConfigError: `image_size` is 0 and the images differ in size.
      UserError: some images cannot be read; all are tried, and the first few are named.
    """
    images = np.empty((len(files), *shape), np.uint8)
    size = (image_size, image_size) if image_size else None
    # Messages about the images that cannot be used, by their index.
    damaged: dict[int, str] = {}
    odd: dict[int, str] = {}

    def read(index: int) -> None:
        path = files.paths[index]
        try:
            image = read_image(path, size)
        except Exception as error:  # Decoders of damaged files raise anything.
            damaged[index] = f'{path} ({_reason(path, error)})'
        else:
            if image.shape == shape:
                images[index] = image
            else:
                odd[index] = f'{path} is {image.shape[0]}x{image.shape[1]}'

    # Decoders release the interpreter lock.
    with multiprocessing.pool.ThreadPool() as pool:
        pool.map(read, range(len(files)))
    if damaged:
        listed = _some([damaged[index] for index in sorted(damaged)])
        raise UserError(f'{len(damaged)} images cannot be read, replace or delete them: {listed}')
    first = odd.get(min(odd, default=0))
    require(
        not odd,
        'data.image_size',
        image_size,
        f'not 0 for images that differ in size ({len(odd)} are not {shape[0]}x{shape[1]}: '
        f'{first}); give the side in pixels to which to resize and crop all of them, such as 32',
    )
    return Examples(images, files.labels)


def _class_folders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))


def _list_split(folder: Path, names: Sequence[str], ignored: list[Path]) -> ImageFiles:
    """Lists the images of the classes `names`; adds all other files to `ignored`."""
    paths, labels = [], []
    ignored += [entry for entry in folder.iterdir() if not entry.is_dir()]
    for label, name in enumerate(names):
        if not (folder / name).is_dir():
            continue
        for entry in sorted(os.scandir(folder / name), key=lambda entry: entry.name):
            if entry.name.lower().endswith(EXTENSIONS) and entry.is_file():
                paths.append(Path(entry.path))
                labels.append(label)
            else:
                ignored.append(Path(entry.path))
    return ImageFiles(tuple(paths), np.array(labels, np.int32))


def _some(items: Sequence[str]) -> str:
    """Returns the first few items: "'a', 'b', 'c', 'd', 'e' (7 in all)"."""
    shown = ', '.join(map(repr, items[:_NAMED]))
    return shown + (f' ({len(items)} in all)' if len(items) > _NAMED else '')


def _reason(path: Path, error: Exception) -> str:
    if path.is_file() and path.stat().st_size == 0:
        return 'empty file'
    return str(error).partition('\n')[0].replace(str(path), 'file') or type(error).__name__
