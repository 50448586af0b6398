"""Lists any folder of images: `ROOT/train/<class>/*.png`, `ROOT/test/<class>/*.png`.

docs/data.md lists what happens to every kind of file and folder.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from one_jax.data import image_decoding
from one_jax.data.resident import class_ranks
from one_jax.errors import explain, require

EXTENSIONS = tuple('.png .jpg .jpeg .jfif .bmp .webp .gif .tif .tiff .ppm'.split())  # noqa: SIM905
TEST_FOLDERS = ('test', 'val', 'validation', 'valid')
# Share of the training images of every class to hold out if there is no folder of test images.
HELD_OUT_SHARE = 0.2
# Stream of random bits that chooses them; see `batches.random_bits`.
_HELD_OUT_STREAM = 2**63 + 4
# How many offending files or classes a message names.
_NAMED = 5


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
        return image_decoding.upright(data), int(self.labels[index])

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
    with explain(f'data.root={root!r} cannot be read', OSError, RecursionError):
        return _find(root, subset_seed, validation)


def _find(
    root: str, subset_seed: int, validation: bool
) -> tuple[tuple[str, ...], dict[str, ImageFiles], list[str]]:
    def check(condition: bool, message: str) -> None:
        require(condition, 'data.root', root, message)

    folder = Path(os.path.expanduser(root))
    used = [name for name in TEST_FOLDERS if (folder / name).is_dir()]
    top, notes = folder / 'train', []
    ignored: list[Path] = []
    # Folders inside classes.
    nested: list[Path] = []
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
    odd = [name for name in names if os.fsencode(name).decode(errors='replace') != name]
    check(not odd, f'rename the classes whose names are not UTF-8: {some(odd)}')
    splits = {'train': _list_split(top, names, ignored, nested)}
    minimum, purpose = (1, '') if used else (2, ', one of them to hold out for testing')
    counts = np.bincount(splits['train'].labels, minlength=len(names))
    few = [name for name, count in zip(names, counts, strict=True) if count < minimum]
    check(
        not few,
        f'every class folder of {top.name} must hold at least {minimum} images '
        f'({", ".join(EXTENSIONS)}){purpose}: add some to {some(few)}, or remove it',
    )
    count = 2 if validation and used[:1] == ['test'] else 1
    reason = f'{used[0]} is' if validation and used else 'images of train are held out'
    notes += [f'{name} is not used, {reason}' for name in used[count:]]
    for split, name in zip(('test', 'validation'), used[:count], strict=False):
        unknown = sorted({*_class_folders(folder / name)} - {*names})
        check(not unknown, f'{name} has classes that train lacks: {some(unknown)}')
        splits[split] = files = _list_split(folder / name, names, ignored, nested)
        check(len(files) > 0, f'there is no image in {name}: add some, or remove the folder')
        missing = [name for label, name in enumerate(names) if label not in files.labels]
        if missing:
            notes.append(f'classes without an image in {name}: {some(missing)}')
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
    for note, paths in (
        ('ignored files that are not images', ignored),
        ('folders inside classes, whose images belong to the class', nested),
    ):
        if paths:
            relative = [str(path.relative_to(folder)) for path in sorted(paths)]
            notes.append(f'{note}: {some(relative)}')
    return names, splits, [f'data.root={root!r}: {note}' for note in notes]


def _class_folders(folder: Path) -> tuple[str, ...]:
    names = (name for name in os.listdir(folder) if not name.startswith('.'))
    return tuple(sorted(name for name in names if (folder / name).is_dir()))


def _list_split(
    folder: Path, names: Sequence[str], ignored: list[Path], nested: list[Path]
) -> ImageFiles:
    """Lists the images of the classes `names`; adds all else to `ignored` and `nested`."""
    paths, labels = [], []
    ignored += [folder / name for name in {*os.listdir(folder)} - {*_class_folders(folder)}]
    for label, name in enumerate(names):
        if (folder / name).is_dir():
            found = list(_list_class(folder / name, ignored, nested, set()))
            paths += found
            labels += [label] * len(found)
    return ImageFiles(tuple(paths), np.array(labels, np.int32))


def _list_class(
    folder: Path, ignored: list[Path], nested: list[Path], seen: set[tuple[int, int]]
) -> Iterator[Path]:
    """Yields the images of a class, below `folder` at any depth, in the order of their names."""
    status = os.stat(folder)
    seen.add((status.st_dev, status.st_ino))
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        # `isfile` returns False for links that lead nowhere, `entry.is_file()` raises.
        is_file = entry.is_file(follow_symlinks=False) or os.path.isfile(path)
        if is_file and is_image_name(entry.name):
            yield path
        elif is_file or entry.name.startswith('.') or not os.path.isdir(path):
            ignored.append(path)
        elif ((status := os.stat(path)).st_dev, status.st_ino) in seen:
            # Links of folders to each other would not end.
            ignored.append(path)
        else:
            nested.append(path)
            yield from _list_class(path, ignored, nested, seen)


def is_image_name(name: str) -> bool:
    """Returns whether a file's name is that of an image, and not hidden."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith('.')


def some(items: Sequence[str]) -> str:
    """Returns the first few items: "'a', 'b', 'c', 'd', 'e' (7 in all)"."""
    shown = ', '.join(map(repr, items[:_NAMED]))
    return shown + (f' ({len(items)} in all)' if len(items) > _NAMED else '')
