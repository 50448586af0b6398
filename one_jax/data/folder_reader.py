"""Reads the images of a folder: into memory, or once to check them before they are streamed.

Both find the images that cannot be read, and those that are in two splits. What a check finds is
cached in the user's cache directory until a file is added, removed, resized or modified.
"""

import contextlib
import hashlib
import io
import json
import multiprocessing.pool
import os
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL

from one_jax.data import image_decoding, resident
from one_jax.data.image_folder import ImageFiles, some
from one_jax.data.resident import Examples
from one_jax.errors import UserError, explain, require


class Loaded(NamedTuple):
    """The splits of a data set, in memory or in encoded form."""

    splits: dict[str, Any]
    # How often each value occurs in the training images, see `resident.count_values`; or None.
    counts: np.ndarray | None = None
    # Images that were left out because they cannot be read.
    unreadable: int = 0


def image_shape(files: ImageFiles, image_size: int) -> tuple[int, int, int]:
    """Returns (H, W, 3) of images in memory: `image_size` squared, or the size of the first image.

    Skips damaged images, which `read_all` reports.
    """
    if image_size:
        return image_size, image_size, 3
    for path in files.paths:
        with contextlib.suppress(Exception):
            return image_decoding.read_image(path).shape
    return 0, 0, 3


def read_all(
    splits: Mapping[str, ImageFiles],
    shape: tuple[int, int, int],
    image_size: int,
    crop: float = 1.0,
    skip: bool = False,
) -> Loaded:
    """Reads images into memory in parallel, in the order of their files, all of the same `shape`.

    Crops and resizes them to squares of side `image_size`, unless it is 0; see `decode`.
    Leaves out those that cannot be read if `skip`.

    Raises:
      ConfigError: `image_size` is 0 and the images differ in size.
      UserError: some images cannot be read; all are tried, and the first few are named.
    """
    paths = [path for files in splits.values() for path in files.paths]
    pixels = {split: np.empty((len(files), *shape), np.uint8) for split, files in splits.items()}
    # One view for each image.
    places = [place for array in pixels.values() for place in array]
    size = (image_size, image_size) if image_size else None
    # Messages about the images of another size, by their index.
    odd: dict[int, str] = {}

    def read(index: int, data: bytes) -> None:
        image = image_decoding.decode(image_decoding.upright(data), size, crop)
        if image.shape == shape:
            places[index][:] = image
        else:
            odd[index] = f'{str(paths[index])!r} is {image.shape[0]}x{image.shape[1]}'

    damaged, digests = _read(paths, read)
    first = odd.get(min(odd, default=0))
    require(
        not odd,
        'data.image_size',
        image_size,
        f'not 0 for images that differ in size ({len(odd)} are not {shape[0]}x{shape[1]}: '
        f'{first}); give the side in pixels to which to resize and crop all of them, such as 32',
    )
    examples = {split: Examples(pixels[split], files.labels) for split, files in splits.items()}
    return _readable(splits, examples, damaged, digests, skip)


def check(splits: Mapping[str, ImageFiles], image_size: int = 0, skip: bool = False) -> Loaded:
    """Reads every image of a stream once, JPEGs at an eighth of their size.

    With an `image_size`, decodes the training images as `read_all` does, and counts their values.
    Leaves out images that cannot be read if `skip`.

    Raises:
      UserError: some images cannot be read; all are tried, and the first few are named.
    """
    paths = [path for files in splits.values() for path in files.paths]
    counted = len(splits['train']) if image_size else 0

    def compute() -> dict[str, np.ndarray]:
        print(f'checking {len(paths)} images, once until a file changes', flush=True)
        counts, lock = np.zeros((3, 256), np.int64), threading.Lock()

        def read(index: int, data: bytes) -> None:
            if index < counted:
                size = (image_size, image_size)
                image = image_decoding.decode(image_decoding.upright(data), size)
                own = resident.count_values(image[None])
                with lock:
                    counts[:] += own
                return
            with image_decoding.open_image(io.BytesIO(data)) as image:
                # Reads all of a JPEG's data, but computes few pixels.
                image.draft(image.mode, (1, 1))
                image_decoding.to_rgb(image)

        damaged, digests = _read(paths, read)
        return {'damaged': np.array(json.dumps(damaged)), 'digests': digests, 'counts': counts}

    found = cached(f'images {image_size}', paths, compute)
    damaged = {int(index): why for index, why in json.loads(str(found['damaged'])).items()}
    loaded = _readable(splits, splits, damaged, found['digests'], skip)
    return loaded._replace(counts=found['counts'] if counted else None)


def cached(
    name: str, paths: Sequence[str | os.PathLike], compute: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Returns what `compute` found in the files at `paths`, from the cache if they are the same.

    The same are files of the same paths, sizes and times. The cache holds one result for each
    `name` and first path; one that is damaged or cannot be written is ignored.

    Raises:
      UserError: a file is missing or cannot be read.
    """
    versions = f'2 {PIL.__version__} {image_decoding.MAX_PIXELS}'
    key = hashlib.blake2b(versions.encode(), digest_size=16)

    def describe(path: str | os.PathLike) -> bytes:
        status = os.stat(path)
        return os.fsencode(f'{os.fspath(path)}\0{status.st_size} {status.st_mtime_ns}\n')

    with (
        explain('the data set cannot be read', OSError),
        multiprocessing.pool.ThreadPool() as pool,
    ):
        for line in pool.imap(describe, paths, chunksize=1000):
            key.update(line)
    place = hashlib.blake2b(
        os.fsencode('\0'.join([name, *map(os.fspath, paths[:1])])), digest_size=16
    )
    root = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    path = Path(root, 'one_jax', 'data', f'{place.hexdigest()}.npz')
    # Readers of damaged files raise anything; numpy would leave one open.
    with contextlib.suppress(Exception), np.load(io.BytesIO(path.read_bytes())) as file:
        if str(file['key']) == key.hexdigest():
            return dict(file)
    found = compute()
    if 'digests' in found and not found['digests'].all():
        # Some files could not be opened, which may change without a trace in their times.
        return found
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Processes that write it at the same time write the same.
        with path.with_suffix('.tmp').open('wb') as file:
            np.savez(file, key=np.array(key.hexdigest()), **found)
        os.replace(file.name, path)
    return found


def _read(
    paths: Sequence[Path], read: Callable[[int, bytes], None]
) -> tuple[dict[int, str], np.ndarray]:
    """Calls `read` with the index and the content of every file, in parallel.

    Returns:
      Why it failed, by index; and hashes of all contents, uint64 [N], 0 where there is none.
    """
    damaged: dict[int, str] = {}
    digests = np.zeros(len(paths), np.uint64)

    def attempt(index: int) -> None:
        data = None
        try:
            data = paths[index].read_bytes()
            # Nobody forges them, and cryptographic ones would take a tenth of the time.
            half = zlib.crc32(data[: len(data) // 2])
            digests[index] = zlib.crc32(data) << 32 | half | 1
            read(index, data)
        except Exception as error:  # Decoders of damaged files raise anything.
            # Without the file's name.
            reason = getattr(error, 'strerror', None) or str(error).partition('\n')[0]
            damaged[index] = 'empty file' if data == b'' else reason or type(error).__name__
            if isinstance(error, MemoryError):
                digests[index] = 0

    # Decoders release the interpreter lock.
    with multiprocessing.pool.ThreadPool() as pool:
        pool.map(attempt, range(len(paths)))
    return dict(sorted(damaged.items())), digests


def _readable(
    splits: Mapping[str, ImageFiles],
    examples: Mapping[str, Examples | ImageFiles],
    damaged: Mapping[int, str],
    digests: np.ndarray,
    skip: bool,
) -> Loaded:
    """Reports images that are damaged or in two splits; returns `examples` without the damaged."""
    paths = [path for files in splits.values() for path in files.paths]
    kept = np.ones(len(paths), bool)
    if damaged:
        listed = some([f'{paths[index]} ({why})' for index, why in damaged.items()])
        found = f'{len(damaged)} images cannot be read'
        advice = 'replace or delete them, or give data.skip_unreadable=True'
        if not skip:
            raise UserError(f'{found}, {advice}: {listed}')
        print(f'{found} and are skipped: {listed}')
        kept[list(damaged)] = False
    ends = np.cumsum([len(files) for files in splits.values()])
    split_of = np.repeat(np.arange(len(ends)), [len(files) for files in splits.values()])
    _, first, inverse = np.unique(digests[kept], return_index=True, return_inverse=True)
    original = np.flatnonzero(kept)[first][inverse]
    twice = split_of[kept] != split_of[original]
    if twice.any():
        copy, other = np.flatnonzero(kept)[twice][0], original[twice][0]
        print(
            f'{twice.sum()} images are in two splits, such as {str(paths[other])!r} and '
            f'{str(paths[copy])!r}: results look better than they are unless one is removed'
        )
    parts = dict(zip(splits, np.split(kept, ends[:-1]), strict=True))
    labels = splits['train'].labels
    lost = np.flatnonzero(~np.isin(labels, labels[parts['train']]))
    empty = [f'the split {split!r}' for split, part in parts.items() if not part.any()]
    empty += [f'the class of {str(paths[index])!r}' for index in lost]
    if empty:
        raise UserError(f'{len(damaged)} images cannot be read, and none is left of {empty[0]}')
    if damaged:
        examples = {split: x.take(np.flatnonzero(parts[split])) for split, x in examples.items()}
    return Loaded(dict(examples), unreadable=len(damaged))
