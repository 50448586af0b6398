"""Reads images, and any folder of them: `ROOT/train/<class>/*.png`, `ROOT/test/<class>/*.png`.

docs/data.md lists what happens to every kind of file and folder.
"""

import contextlib
import dataclasses
import io
import multiprocessing.pool
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import jax
import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from one_jax.data.resident import Examples, class_ranks
from one_jax.errors import UserError, explain, require

EXTENSIONS = tuple('.png .jpg .jpeg .jfif .bmp .webp .gif .tif .tiff .ppm'.split())  # noqa: SIM905
# Decoders that only decode. Pillow has others: it would run the program in a PostScript file.
FORMATS = ('PNG', 'JPEG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'PPM', 'ICO')
TEST_FOLDERS = ('test', 'val', 'validation', 'valid')
# Share of the training images of every class to hold out if there is no folder of test images.
HELD_OUT_SHARE = 0.2
# Stream of random bits that chooses them; see `batches.random_bits`.
_HELD_OUT_STREAM = 2**63 + 4
# Bytes without which an image has no orientation: a quick look saves parsing most files.
_ORIENTATION_MARKS = (b'Exif', b'EXIF', b'eXIf', b'exif', b'Orientation', b'XML:com.adobe.xmp')
_TRANSPOSITIONS = dict(
    enumerate(
        (
            Image.Transpose.FLIP_LEFT_RIGHT,
            Image.Transpose.ROTATE_180,
            Image.Transpose.FLIP_TOP_BOTTOM,
            Image.Transpose.TRANSPOSE,
            Image.Transpose.ROTATE_270,
            Image.Transpose.TRANSVERSE,
            Image.Transpose.ROTATE_90,
        ),
        start=2,
    )
)
# How many offending files or classes a message names.
_NAMED = 5


def open_image(file: Path | BinaryIO) -> Image.Image:
    """Opens an image without decoding it; no other function of this package opens images."""
    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise UnidentifiedImageError(
            f'cannot identify image file: not {", ".join(FORMATS)}'
        ) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any mode to RGB; drops transparency, and reduces 16 bits of grey to 8."""
    low, high = image.getextrema() if image.mode == 'I' else (0, 0)
    if image.mode == 'F' or low < 0 or high >= 2**16:
        raise ValueError('its pixels have more than 16 bits: save it with 8 bits per channel')
    if image.mode.startswith('I'):
        # PIL would clip the values at 255.
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    elif 'transparency' in image.info:
        # Avoids PIL's warning about converting a palette with transparency directly.
        image = image.convert('RGBA')
    return image.convert('RGB')


def upright(data: bytes) -> bytes:
    """Returns an encoded image, turned as its EXIF data says (then encoded as BMP, losslessly).

    Images without a readable orientation, damaged ones among them, are returned as they are.
    """
    if any(mark in data for mark in _ORIENTATION_MARKS):
        with contextlib.suppress(Exception), open_image(io.BytesIO(data)) as image:
            # Some formats have it behind the pixels; loading turns a TIFF.
            if image.format != 'JPEG':
                image.load()
            method = _TRANSPOSITIONS.get(image.getexif().get(ExifTags.Base.Orientation))
            if method is not None:
                return encode(to_rgb(image.transpose(method)))
    return data


def encode(image: Image.Image) -> bytes:
    """Encodes an RGB image quickly and without loss."""
    data = io.BytesIO()
    image.save(data, 'BMP')
    return data.getvalue()


def decode(data: bytes, size: tuple[int, int] | None = None, crop: float = 1.0) -> np.ndarray:
    """Decodes an image, uint8 [H, W, 3]; ignores its EXIF data, as TensorFlow does.

    With a `size` (H, W), crops the centre, whose shorter side is the share `crop` of the image's,
    and resizes it (bilinear, antialiased).

    Raises:
      Exception: decoders of damaged files raise anything.
    """
    with open_image(io.BytesIO(data)) as file:
        image = to_rgb(file)
    if size:
        # Crops and resizes at once, which differs by rounding only.
        bleed = (1 - crop) / 2
        image = ImageOps.fit(image, size[::-1], Image.Resampling.BILINEAR, bleed=bleed)
    return np.asarray(image)


def read_image(path: Path, size: tuple[int, int] | None = None, crop: float = 1.0) -> np.ndarray:
    """Reads one image file upright, otherwise as `decode` does: in memory, streams and predict."""
    return decode(upright(path.read_bytes()), size, crop)


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
        """Returns the encoded image, upright, and the label of an example."""
        with explain(f'{self.describe(index)} cannot be read', OSError):
            data = self.paths[index].read_bytes()
        return upright(data), int(self.labels[index])

    def prepare(self, indices: np.ndarray) -> None:
        """Does nothing: files need no index."""

    def describe(self, index: int) -> str:
        """Names an example in errors."""
        return f'image {str(self.paths[index])!r}'


def find(
    root: str, subset_seed: int, validation: bool = True
) -> tuple[tuple[str, ...], dict[str, ImageFiles], list[str]]:
    """Lists a folder of images.

    Without a folder of test images, `subset_seed` chooses `HELD_OUT_SHARE` of every class of train
    to hold out. Another folder beside test is the split 'validation', if `validation`.

    Returns:
      The sorted names of the classes; the splits 'train', 'test' and perhaps 'validation'; and
      lines to show the user: files ignored, images held out.

    Raises:
      ConfigError: there is no such folder, fewer than two classes, or a class without images.
      UserError: a folder cannot be listed.
    """
    with explain(f'data.root={root!r} cannot be read', OSError):
        return _find(root, subset_seed, validation)


def _find(
    root: str, subset_seed: int, validation: bool
) -> tuple[tuple[str, ...], dict[str, ImageFiles], list[str]]:
    def check(condition: bool, message: str) -> None:
        require(condition, 'data.root', root, message)

    folder = Path(os.path.expanduser(root))
    used = [name for name in TEST_FOLDERS if (folder / name).is_dir()]
    top, notes = folder / 'train', []
    if root and not top.is_dir() and folder.is_dir() and not used and _class_folders(folder):
        top = folder
        notes.append('there is no folder train: its folders are the classes')
    check(
        root and top.is_dir(),
        'it must be a folder that holds train/<class>/*.png (or .jpg, .webp, ...) and, for test '
        'images, test/<class>/; or the folders of the classes alone',
    )
    names = _class_folders(top)
    check(len(names) >= 2, f'{top.name} must hold at least two class folders, but has {[*names]}')
    ignored: list[Path] = []
    splits = {'train': _list_split(top, names, ignored)}
    minimum, purpose = (1, '') if used else (2, ', one of them to hold out for testing')
    counts = np.bincount(splits['train'].labels, minlength=len(names))
    few = [name for name, count in zip(names, counts, strict=True) if count < minimum]
    check(
        not few,
        f'every class folder of {top.name} must hold at least {minimum} images '
        f'({", ".join(EXTENSIONS)}){purpose}: add some to {_some(few)}, or remove it',
    )
    count = 2 if validation and used[:1] == ['test'] else 1
    reason = f'{used[0]} is' if validation and used else 'images of train are held out'
    notes += [f'{name} is not used, {reason}' for name in used[count:]]
    for split, name in zip(('test', 'validation'), used[:count], strict=False):
        unknown = sorted({*_class_folders(folder / name)} - {*names})
        check(not unknown, f'{name} has classes that train lacks: {_some(unknown)}')
        splits[split] = files = _list_split(folder / name, names, ignored)
        check(len(files) > 0, f'there is no image in {name}: add some, or remove the folder')
        missing = [name for label, name in enumerate(names) if label not in files.labels]
        if missing:
            notes.append(f'classes without an image in {name}: {_some(missing)}')
    if not used:
        train = splits['train']
        ranks = class_ranks(train.labels, subset_seed, _HELD_OUT_STREAM)
        number = np.maximum(np.rint(HELD_OUT_SHARE * counts), 1)
        held_out = ranks < number[train.labels]
        parts = {'train': ~held_out, 'test': held_out}
        splits = {split: train.take(np.flatnonzero(part)) for split, part in parts.items()}
        notes.append(
            f'there is no folder test: {len(splits["test"])} images of {top.name}, '
            f'{HELD_OUT_SHARE:.0%} of every class, are held out as the test split '
            f'(data.subset_seed={subset_seed})'
        )
    if ignored:
        relative = [str(path.relative_to(folder)) for path in sorted(ignored)]
        notes.append(f'ignored files that are not images: {_some(relative)}')
    return names, splits, [f'data.root={root!r}: {note}' for note in notes]


def image_shape(files: ImageFiles, image_size: int) -> tuple[int, int, int]:
    """Returns (H, W, 3) of images in memory: `image_size` squared, or the size of the first image.

    Skips damaged images, which `read_all` reports.
    """
    if image_size:
        return image_size, image_size, 3
    for path in files.paths:
        with contextlib.suppress(Exception):
            return read_image(path).shape
    return 0, 0, 3


def read_all(
    files: ImageFiles, shape: tuple[int, int, int], image_size: int, crop: float = 1.0
) -> Examples:
    """Reads images into memory in parallel, in the order of `files`, all of the same `shape`.

    Crops and resizes them to squares of side `image_size`, unless it is 0; see `decode`.

    Raises:
      ConfigError: `image_size` is 0 and the images differ in size.
      UserError: some images cannot be read; all are tried, and the first few are named.
    """
    images = np.empty((len(files), *shape), np.uint8)
    size = (image_size, image_size) if image_size else None
    # Messages about the images of another size, by their index.
    odd: dict[int, str] = {}

    def read(index: int) -> None:
        image = read_image(files.paths[index], size, crop)
        if image.shape == shape:
            images[index] = image
        else:
            odd[index] = f'{files.paths[index]} is {image.shape[0]}x{image.shape[1]}'

    _try_all(files.paths, read)
    first = odd.get(min(odd, default=0))
    require(
        not odd,
        'data.image_size',
        image_size,
        f'not 0 for images that differ in size ({len(odd)} are not {shape[0]}x{shape[1]}: '
        f'{first}); give the side in pixels to which to resize and crop all of them, such as 32',
    )
    return Examples(images, files.labels)


def check(splits: Iterable[ImageFiles]) -> None:
    """Reads every image of a stream once, this process's share, JPEGs at an eighth of their size.

    Raises:
      UserError: some images cannot be read; all are tried, and the first few are named.
    """
    paths = [path for files in splits for path in files.paths]
    own = paths[jax.process_index() :: jax.process_count()]

    def read(index: int) -> None:
        with open_image(own[index]) as image:
            # Reads all of a JPEG's data, but computes few pixels.
            image.draft(image.mode, (1, 1))
            to_rgb(image)

    _try_all(own, read)


def _try_all(paths: Sequence[Path], read: Callable[[int], None]) -> None:
    """Calls `read` with the index of every path, in parallel; lists the images that fail."""
    damaged: dict[int, str] = {}

    def attempt(index: int) -> None:
        try:
            read(index)
        except Exception as error:  # Decoders of damaged files raise anything.
            damaged[index] = f'{paths[index]} ({_reason(paths[index], error)})'

    # Decoders release the interpreter lock.
    with multiprocessing.pool.ThreadPool() as pool:
        pool.map(attempt, range(len(paths)))
    if damaged:
        listed = _some([damaged[index] for index in sorted(damaged)])
        raise UserError(f'{len(damaged)} images cannot be read, replace or delete them: {listed}')


def _class_folders(folder: Path) -> tuple[str, ...]:
    names = (name for name in os.listdir(folder) if not name.startswith('.'))
    return tuple(sorted(name for name in names if (folder / name).is_dir()))


def _list_split(folder: Path, names: Sequence[str], ignored: list[Path]) -> ImageFiles:
    """Lists the images of the classes `names`; adds all other files to `ignored`."""
    paths, labels = [], []
    ignored += [folder / name for name in {*os.listdir(folder)} - {*_class_folders(folder)}]
    for label, name in enumerate(names):
        if not (folder / name).is_dir():
            continue
        for entry in sorted(os.scandir(folder / name), key=lambda entry: entry.name):
            # `isfile` returns False for links that lead nowhere, `entry.is_file()` raises.
            is_file = entry.is_file(follow_symlinks=False) or os.path.isfile(entry.path)
            if is_file and is_image_name(entry.name):
                paths.append(Path(entry.path))
                labels.append(label)
            else:
                ignored.append(Path(entry.path))
    return ImageFiles(tuple(paths), np.array(labels, np.int32))


def is_image_name(name: str) -> bool:
    """Returns whether a file's name is that of an image, and not hidden."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith('.')


def _some(items: Sequence[str]) -> str:
    """Returns the first few items: "'a', 'b', 'c', 'd', 'e' (7 in all)"."""
    shown = ', '.join(map(repr, items[:_NAMED]))
    return shown + (f' ({len(items)} in all)' if len(items) > _NAMED else '')


def _reason(path: Path, error: Exception) -> str:
    if path.is_file() and path.stat().st_size == 0:
        return 'empty file'
    return str(error).partition('\n')[0].replace(str(path), 'file') or type(error).__name__
