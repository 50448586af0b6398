"""An opened data set: in memory, or decoded while training."""

import abc
import dataclasses
import functools
import multiprocessing.pool
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from one_jax.data import resident, table
from one_jax.data.batches import Batch
from one_jax.data.resident import Examples, ResidentBatches
from one_jax.data.streaming import EncodedExamples, StreamedBatches, streamed_evaluation_batches
from one_jax.errors import explain

# Of a streamed set, the beginnings of so many files are part of its fingerprint.
_FILES_READ, _BYTES_READ = 1000, 2**16


@dataclasses.dataclass(frozen=True, eq=False)
class Source(abc.ABC):
    """An opened data set: its description, with `mean` and `std`, and the names of its classes."""

    spec: table.DatasetSpec
    label_names: tuple[str, ...]
    # Lines to print at the start of a run: classes, splits and preprocessing.
    summary: str = dataclasses.field(default='', kw_only=True)
    # Images that were left out because they cannot be read.
    unreadable: int = dataclasses.field(default=0, kw_only=True)

    @property
    def evaluation_splits(self) -> tuple[str, ...]:
        """The splits to evaluate: 'validation', if images are held out, then 'test'."""
        return ('test',)

    @property
    def crop(self) -> float:
        """The share of an image's shorter side that evaluation sees."""
        return 1.0

    def examples(self, split: str) -> Examples | None:
        """Returns a split in memory, or None if it is streamed."""
        return None

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What tells this data set from another one, wherever it lies; JSON values.

        Covers the names of the classes and, of every split, the number and the content of its
        examples: a checksum of all pixels and labels in memory (1 s per gigabyte). Of a streamed
        split, the names and sizes of all its files, and the beginnings of 1,000 of them.
        """
        return {'label_names': list(self.label_names), **self._contents(), **self._left_out()}

    def _left_out(self) -> dict[str, int]:
        return {'unreadable_images': self.unreadable} if self.unreadable else {}

    @abc.abstractmethod
    def _contents(self) -> dict[str, str]:
        """Describes the content of every split."""

    def facts(self) -> dict[str, Any]:
        """Returns what all processes must agree on."""
        return {**dataclasses.asdict(self.spec), **self.fingerprint}

    def description(self) -> dict[str, Any]:
        """Returns what checkpoints and students record about the data."""
        fields = ('num_classes', 'image_shape', 'mean', 'std')
        return {
            **{field: getattr(self.spec, field) for field in fields},
            'crop': self.crop,
            'label_names': list(self.label_names),
            **self._left_out(),
        }

    @abc.abstractmethod
    def train_batches(
        self, batch_size: int, seed: int, drop_last: bool = True
    ) -> ResidentBatches | StreamedBatches:
        """Returns this process's share of shuffled batches of the train split.

        Without `drop_last` (not in a stream), an epoch ends with a batch of the remaining images.
        """

    @abc.abstractmethod
    def evaluation_batches(self, split: str, batch_size: int) -> Iterator[Batch]:
        """Yields every example of a split once over all processes, the last batch padded."""


@dataclasses.dataclass(frozen=True, eq=False)
class ResidentSource(Source):
    """A data set in memory: `splits` are 'train', 'test' and, if held out, 'validation'."""

    splits: Mapping[str, Examples]

    @property
    def evaluation_splits(self) -> tuple[str, ...]:
        return tuple(split for split in ('validation', 'test') if split in self.splits)

    def examples(self, split: str) -> Examples:
        return self.splits[split]

    def _contents(self) -> dict[str, str]:
        return {name: _content(len(x), x.checksum()) for name, x in self.splits.items()}

    def train_batches(self, batch_size: int, seed: int, drop_last: bool = True) -> ResidentBatches:
        return ResidentBatches(self.splits['train'], batch_size, seed, drop_last)

    def evaluation_batches(self, split: str, batch_size: int) -> Iterator[Batch]:
        return resident.evaluation_batches(self.splits[split], batch_size)


@dataclasses.dataclass(frozen=True, eq=False)
class StreamedSource(Source):
    """A data set decoded while training: splits as in `ResidentSource`, in encoded form."""

    encoded: Mapping[str, EncodedExamples]
    # (image_size, decode_threads, prefetch), see `StreamedBatches`.
    decoding: tuple[int, int, int]
    # Of training and evaluation; None: as usual for ImageNet, see `jpeg`.
    crops: tuple[float | None, float | None] = (None, None)

    @property
    def evaluation_splits(self) -> tuple[str, ...]:
        return tuple(split for split in ('validation', 'test') if split in self.encoded)

    @property
    def crop(self) -> float:
        return self.crops[1] or table.EVALUATION_CROP

    def _contents(self) -> dict[str, str]:
        return {
            name: _content(len(x), _files_checksum(x.paths)) for name, x in self.encoded.items()
        }

    def train_batches(self, batch_size: int, seed: int, drop_last: bool = True) -> StreamedBatches:
        encoded = self.encoded['train']
        return StreamedBatches(encoded, batch_size, seed, *self.decoding, self.crops[0])

    def evaluation_batches(self, split: str, batch_size: int) -> Iterator[Batch]:
        encoded = self.encoded[split]
        return streamed_evaluation_batches(encoded, batch_size, *self.decoding, self.crops[1])


def _content(count: int, checksum: int) -> str:
    return f'{count} images (checksum {checksum:08x})'


def _files_checksum(paths: Sequence[str | os.PathLike]) -> int:
    stride = -(-len(paths) // _FILES_READ)

    def describe(index: int) -> bytes:
        path, head = os.fspath(paths[index]), b''
        if index % stride == 0:
            with Path(path).open('rb') as file:
                head = file.read(_BYTES_READ)
        # The names of the file and of its folder.
        *_, folder, name = path.rsplit(os.sep, 2)
        return os.fsencode(f'{folder}/{name} {os.stat(path).st_size} {zlib.crc32(head)}')

    checksum = 0
    with (
        explain('the data set cannot be read', OSError),
        multiprocessing.pool.ThreadPool() as pool,
    ):
        for line in pool.imap(describe, range(len(paths)), chunksize=100):
            checksum = zlib.crc32(line, checksum)
    return checksum
