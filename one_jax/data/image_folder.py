"""Any folder of images: `ROOT/train/<class>/*.png`, and optionally `ROOT/test/<class>/*.png`."""

import concurrent.futures
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from one_jax.data.resident import Examples, random_bits
from one_jax.errors import ConfigError, UserError

NAME = 'image_folder'
EXTENSIONS = ('.png', '.jpg', '.jpeg', '.bmp', '.webp')
# Decoders that only decode. Pillow has others: of a PostScript file it would run the program.
FORMATS = ('PNG', 'JPEG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'PPM', 'ICO')
TEST_FOLDERS = ('test', 'val', 'validation')
# Of the train images of every class, where there is no folder of test images.
HELD_OUT_SHARE = 0.2
# Stream of random bits that chooses them; see `resident.random_bits`.
_HELD_OUT_STREAM = 2**63 + 4
# Offenders that a message names.
_NAMED = 5
# Images that a thread reads at a time.
_CHUNK = 64


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFiles:
    """The files of a split, ordered by class and name, and their labels int32 [N]."""

    paths: tuple[Path, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: np.ndarray) -> 'ImageFiles':
        """The files at `indices` [M], in that order."""
        return ImageFiles(tuple(self.paths[i] for i in indices.tolist()), self.labels[indices])


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFolder:
    """A folder of images, none of which is read yet.

    Attributes:
      root: of the folder.
      label_names: names of the class folders of train, sorted.
      splits: 'train' and 'test'.
      notes: what the user should know, a line each: files ignored, images held out.
    """

    root: Path
    label_names: tuple[str, ...]
    splits: Mapping[str, ImageFiles]
    notes: tuple[str, ...]


def find(root: str, subset_seed: int) -> ImageFolder:
    """Lists a folder of images.

    Without a folder of test images, `HELD_OUT_SHARE` of every class is taken from train.

    Args:
      root: the folder above `train`.
      subset_seed: of the choice of those images.

    Raises:
      ConfigError: no root is given.
      UserError: no such folder, fewer than two classes, or classes without images.
    """
    if not root:
        raise ConfigError(
            'data.root', root, 'the folder that holds train/<class>/*.png (or .jpg, .webp, ...)'
        )
    folder = Path(root).expanduser()
    if not (folder / 'train').is_dir():
        raise UserError(
            f'data.root={root!r} has no folder train: images belong in '
            f'{folder / "train"}/<class>/, and test images in {folder / "test"}/<class>/'
        )
    names = tuple(sorted(entry.name for entry in (folder / 'train').iterdir() if entry.is_dir()))
    if len(names) < 2:
        raise UserError(
            f'data.root={root!r}: a class is a folder of images in {folder / "train"}, and there '
            f'must be at least two, but there are {list(names)}'
        )
    ignored: list[Path] = []
    train = _list_split(folder / 'train', names, ignored)
    empty = [name for name, count in zip(names, _counts(train, names), strict=True) if not count]
    if empty:
        raise UserError(
            f'data.root={root!r}: {_some(empty, "class folder", "class folders")} of train '
            f'without an image ({", ".join(EXTENSIONS)}): add images, or remove the folder'
        )
    notes = []
    test_folders = [name for name in TEST_FOLDERS if (folder / name).is_dir()]
    if test_folders:
        test = _list_split(folder / test_folders[0], names, ignored)
        notes += _check_test(root, test_folders[0], test, names)
        notes += [f'{other} is not used, {test_folders[0]} is' for other in test_folders[1:]]
    else:
        train, test = _hold_out(root, train, names, subset_seed)
        notes.append(
            f'there is no folder test: {len(test)} images of train, {HELD_OUT_SHARE:.0%} of every '
            f'class, are held out as the test split (data.subset_seed={subset_seed})'
        )
    if ignored:
        relative = [str(path.relative_to(folder)) for path in sorted(ignored)]
        notes.append(f'ignored, not an image: {_some(relative, "file", "files")}')
    notes = tuple(f'data.root={root!r}: {note}' for note in notes)
    return ImageFolder(folder, names, {'train': train, 'test': test}, notes)


def first_shape(files: ImageFiles, image_size: int) -> tuple[int, int, int]:
    """(H, W, 3) of the images in memory: `image_size` squared, or the size of the first image.

    Raises:
      UserError: there is no readable image.
    """
    if image_size:
        return image_size, image_size, 3
    damaged = []
    for path in files.paths:
        try:
            with Image.open(path, formats=FORMATS) as image:
                width, height = ImageOps.exif_transpose(image).size
            return height, width, 3
        except Exception as error:  # whatever the decoders of damaged files raise
            damaged.append((path, error))
    raise _damaged(damaged)


def read(files: ImageFiles, image_shape: tuple[int, int, int], image_size: int) -> Examples:
    """Reads images into memory, in parallel, in the order of `files`.

    Args:
      files: which.
      image_shape: (H, W, 3) of the result, see `first_shape`.
      image_size: side of the square that images are resized and cropped to; 0 leaves them alone.

    Raises:
      ConfigError: `image_size` is 0 and the images are of several sizes.
      UserError: images that cannot be read; all are tried, and some are named.
    """
    images = np.empty((len(files), *image_shape), np.uint8)
    # Of every image that is not in its place: why.
    problems: dict[int, Exception | tuple[int, ...]] = {}

    def read_chunk(start: int) -> None:
        for index in range(start, min(start + _CHUNK, len(files))):
            try:
                array = read_image(files.paths[index], image_size)
            except Exception as error:  # whatever the decoders of damaged files raise
                problems[index] = error
                continue
            if array.shape == image_shape:
                images[index] = array
            else:
                problems[index] = array.shape

    # Decoders release Python's lock.
    with concurrent.futures.ThreadPoolExecutor() as executor:
        list(executor.map(read_chunk, range(0, len(files), _CHUNK)))
    damaged = [
        (files.paths[index], problem)
        for index, problem in sorted(problems.items())
        if isinstance(problem, Exception)
    ]
    if damaged:
        raise _damaged(damaged)
    if problems:
        index = min(problems)
        height, width, _ = problems[index]
        raise ConfigError(
            'data.image_size',
            image_size,
            f'not 0 for images of several sizes ({len(problems)} are not {image_shape[0]}x'
            f'{image_shape[1]}: {files.paths[index]} is {height}x{width}); give the side in pixels '
            'to which all are resized and cropped, such as 32',
        )
    return Examples(images, files.labels)


def read_image(path: Path, image_size: int) -> np.ndarray:
    """Reads one image, uint8 [H, W, 3], the way up that its EXIF data tell.

    Args:
      path: of the file.
      image_size: n, to resize the shorter side to n pixels (bilinear, antialiased) and crop the
        centre, n x n; 0 leaves the size alone.

    Raises:
      Exception: whatever the decoder of a damaged file raises.
    """
    with Image.open(path, formats=FORMATS) as file:
        image = to_rgb(ImageOps.exif_transpose(file))
    if image_size:
        # Crops and resizes at once, which gives the same pixels but for rounding.
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB; transparency is dropped, and the 16 bits of grey images become 8."""
    if image.mode.startswith('I'):
        # PIL would clip the values at 255.
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    elif 'transparency' in image.info:
        # PIL warns of a palette with transparency when it goes to RGB directly.
        image = image.convert('RGBA')
    return image.convert('RGB')


def _list_split(folder: Path, names: Sequence[str], ignored: list[Path]) -> ImageFiles:
    """The images of the classes `names`; what else lies there is added to `ignored`."""
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


def _counts(files: ImageFiles, names: Sequence[str]) -> np.ndarray:
    return np.bincount(files.labels, minlength=len(names))


def _check_test(root: str, folder_name: str, test: ImageFiles, names: Sequence[str]) -> list[str]:
    """Refuses test classes that train lacks, and returns a note of those that test lacks."""
    entries = (Path(root).expanduser() / folder_name).iterdir()
    unknown = sorted(entry.name for entry in entries if entry.is_dir() and entry.name not in names)
    if unknown:
        raise UserError(
            f'data.root={root!r}: {_some(unknown, "class", "classes")} of {folder_name} that train '
            'lacks'
        )
    if not len(test):
        raise UserError(
            f'data.root={root!r}: there is no image in {folder_name}: add some, or remove the '
            'folder to hold out a share of train'
        )
    missing = [name for name, count in zip(names, _counts(test, names), strict=True) if not count]
    return (
        [f'{_some(missing, "class", "classes")} without an image in {folder_name}']
        if missing
        else []
    )


def _hold_out(
    root: str, train: ImageFiles, names: Sequence[str], subset_seed: int
) -> tuple[ImageFiles, ImageFiles]:
    """Splits train into what remains and the held-out share of every class, at least one image."""
    counts = _counts(train, names)
    single = [name for name, count in zip(names, counts, strict=True) if count < 2]
    if single:
        raise UserError(
            f'data.root={root!r}: {_some(single, "class", "classes")} with a single image, '
            'and no folder test: one is for training, one for testing; add images, or a folder test'
        )
    score = random_bits(subset_seed, _HELD_OUT_STREAM, len(train))
    held_out = np.zeros(len(train), bool)
    for label, count in enumerate(counts):
        members = np.flatnonzero(train.labels == label)
        order = members[np.argsort(score[members], kind='stable')]
        held_out[order[: max(round(HELD_OUT_SHARE * count), 1)]] = True
    return train.take(np.flatnonzero(~held_out)), train.take(np.flatnonzero(held_out))


def _some(items: Sequence[str], noun: str, plural: str) -> str:
    """A count with the first few: "7 classes ('a', 'b', 'c', 'd', 'e', ...)"."""
    shown = ', '.join(map(repr, items[:_NAMED])) + (', ...' if len(items) > _NAMED else '')
    return f'{len(items)} {noun if len(items) == 1 else plural} ({shown})'


def _damaged(damaged: Sequence[tuple[Path, Exception]]) -> UserError:
    def reason(path: Path, error: Exception) -> str:
        if path.is_file() and path.stat().st_size == 0:
            return 'empty file'
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        return (str(error).splitlines() or [type(error).__name__])[0].replace(str(path), 'file')

    shown = ', '.join(f'{path} ({reason(path, error)})' for path, error in damaged[:_NAMED])
    return UserError(
        f'{len(damaged)} {"image" if len(damaged) == 1 else "images"} cannot be read: {shown}'
        f'{", ..." if len(damaged) > _NAMED else ""}; replace or delete them'
    )
