"""Encoded examples on disk, read one at a time in any order: TFRecord shards and image files."""

import collections
import concurrent.futures
import dataclasses
import os
import struct
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import tensorflow_datasets as tfds

from one_jax.data import jpeg
from one_jax.errors import UserError

# Shards whose record positions are remembered; an open file each.
_OPEN_SHARDS = 128
# A TFRecord is its length (uint64), a checksum of that, the bytes and their checksum (uint32 each).
_HEADER, _FRAME = 12, 16


class Source(Protocol):
    """Encoded examples, numbered.

    Attributes:
      shard_lengths: how many examples lie together, in the order of their numbers; their sum is
        the number of examples.
      num_classes: labels are below it.
    """

    shard_lengths: Sequence[int]
    num_classes: int

    def read(self, index: int) -> tuple[bytes, int]:
        """The encoded image and the label of an example."""

    def prepare(self, indices: np.ndarray) -> None:
        """Told which examples will be read next."""

    def describe(self, index: int) -> str:
        """Names an example in errors."""


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFiles:
    """Image files with labels, the same interface as the records of a builder.

    Attributes:
      paths: of the files.
      labels: int [N].
      num_classes: labels are below it.
    """

    paths: Sequence[str | os.PathLike]
    labels: np.ndarray
    num_classes: int

    @property
    def shard_lengths(self) -> Sequence[int]:
        """All files lie together: they are shuffled as one."""
        return [len(self.paths)]

    def read(self, index: int) -> tuple[bytes, int]:
        """The encoded image and the label of an example."""
        try:
            with open(self.paths[index], 'rb') as file:
                return file.read(), int(self.labels[index])
        except OSError as error:
            raise UserError(f'{self.describe(index)} cannot be read: {error}') from error

    def prepare(self, indices: np.ndarray) -> None:
        """Nothing is to be done."""

    def describe(self, index: int) -> str:
        """Names an example in errors."""
        return f'image {os.fspath(self.paths[index])!r}'


class TFRecords:
    """The examples of a split that TFDS has prepared as TFRecord files.

    TFRecord has no index: the positions of a shard's records are found by reading their lengths,
    when the shard is first needed (see `prepare`).

    Args:
      builder: opened from disk, with the features 'image' and 'label'.
      split: one of its splits, or an expression such as 'train[:90%]'.

    Raises:
      UserError: the files are no TFRecord files, are not on a file system, or are missing.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str):
        self._name, self._split = builder.name, split
        file_format = builder.info.file_format
        if file_format != tfds.core.FileFormat.TFRECORD:
            raise UserError(
                f'data.name={self._name!r} is prepared in {builder.data_path} as '
                f'{file_format.value}: sets that do not fit in memory are read as tfrecord, '
                f'prepare it again with tfds build {self._name} --file_format=tfrecord'
            )
        self._files = builder.info.splits[split].file_instructions
        for file in self._files:
            if not os.path.isfile(file.filename):
                raise self._damaged(file.filename, 'there is no such file on a mounted disk')
        self.shard_lengths = [file.take for file in self._files]
        self.num_classes = builder.info.features['label'].num_classes
        self._ends = np.cumsum(self.shard_lengths)
        self._example = jpeg.import_tensorflow().train.Example
        self._shards: collections.OrderedDict[int, concurrent.futures.Future[_Shard]] = (
            collections.OrderedDict()
        )
        self._lock = threading.Lock()
        self._executor = concurrent.futures.ThreadPoolExecutor(8, 'tfrecord')

    def read(self, index: int) -> tuple[bytes, int]:
        """The encoded image and the label of an example.

        Raises:
          UserError: the file is damaged.
        """
        features = self._features(index)
        return features['image'].bytes_list.value[0], features['label'].int64_list.value[0]

    def prepare(self, indices: np.ndarray) -> None:
        """Looks through the shards of some examples, several at a time; does not wait for it."""
        for shard in np.unique(np.searchsorted(self._ends, indices, side='right')):
            self._open(int(shard))

    def describe(self, index: int) -> str:
        """Names an example in errors: its number, its file name where it has one, its shard."""
        shard, _ = self._locate(index)
        names = [f'in {self._files[shard].filename}']
        features = self._features(index)
        if 'file_name' in features and features['file_name'].bytes_list.value:
            names.insert(0, features['file_name'].bytes_list.value[0].decode(errors='replace'))
        return f'data.name={self._name!r}: {self._split} image {index} ({", ".join(names)})'

    def _locate(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, index, side='right'))
        start = int(self._ends[shard]) - self.shard_lengths[shard]
        return shard, index - start + self._files[shard].skip

    def _features(self, index: int) -> Mapping:
        shard, position = self._locate(index)
        path = self._files[shard].filename
        try:
            record = self._open(shard).result().read(position)
            features = self._example.FromString(record).features.feature
        except UserError:
            raise
        except Exception as error:  # protobuf's DecodeError is a bare Exception
            raise self._damaged(path, f'record {position}: {error}') from error
        if not features['image'].bytes_list.value or not features['label'].int64_list.value:
            raise self._damaged(path, f'record {position} has no image or no label')
        return features

    def _open(self, shard: int) -> 'concurrent.futures.Future[_Shard]':
        with self._lock:
            if shard not in self._shards:
                self._shards[shard] = self._executor.submit(self._scan, shard)
                if len(self._shards) > _OPEN_SHARDS:
                    self._shards.popitem(last=False)
            self._shards.move_to_end(shard)
            return self._shards[shard]

    def _scan(self, shard: int) -> '_Shard':
        file = self._files[shard]
        try:
            return _Shard(file.filename, file.examples_in_shard)
        except (OSError, ValueError) as error:
            raise self._damaged(file.filename, str(error)) from error

    def _damaged(self, path: str, reason: str) -> UserError:
        return UserError(
            f'data.name={self._name!r}: {path} cannot be read ({reason}): '
            'delete the data set and prepare it again'
        )


class _Shard:
    """A TFRecord file and where its records begin and end."""

    def __init__(self, path: str, count: int):
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        size = os.fstat(self._file).st_size
        self._offsets = np.empty(count + 1, np.int64)
        offset = 0
        for record in range(count):
            self._offsets[record] = offset
            header = os.pread(self._file, 8, offset)
            if len(header) < 8:
                raise ValueError(f'it ends after {record} of {count} records')
            offset += struct.unpack('<Q', header)[0] + _FRAME
        self._offsets[count] = offset
        if offset != size:
            raise ValueError(f'its {count} records take {offset} bytes, but it has {size}')

    def read(self, position: int) -> bytes:
        start, end = int(self._offsets[position]), int(self._offsets[position + 1])
        return os.pread(self._file, end - start - _FRAME, start + _HEADER)
