"""Reads single examples, in any order, of a data set that TFDS has prepared as TFRecord files."""

import concurrent.futures
import copy
import functools
import multiprocessing.pool
import os
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np

from one_jax.data import jpeg
from one_jax.data.folder_reader import cached
from one_jax.errors import explain, require

# Shards whose index is remembered; each keeps a file open.
_OPEN_SHARDS = 128
# A TFRecord is its length (uint64), a checksum of that, the bytes and their checksum (uint32 each).
_HEADER, _FRAME = 12, 16


class TFRecords:
    """The examples of a split in TFRecord files; implements `streaming.EncodedExamples`.

    TFRecord files have no index: the positions of a shard's records are found by reading their
    lengths when the shard is first needed (see `prepare`); then all checksums are verified too.

    Raises:
      ConfigError: the files are not TFRecord files.
      UserError: a file is missing, or not on a mounted file system.
    """

    def __init__(self, builder: Any, split: str):
        self._name, self._split = builder.name, split
        file_format = builder.info.file_format.value
        require(
            file_format == 'tfrecord',
            'data.name',
            self._name,
            f'it is prepared in {builder.data_path} as {file_format}: streamed sets are read as '
            f'tfrecord, prepare it again with tfds build {self._name} --file_format=tfrecord',
        )
        advice = f'{builder.data_path} cannot be read (delete it and prepare it again)'
        with explain(f'data.name={self._name!r}: {advice}', ValueError):
            self._files = builder.info.splits[split].file_instructions
            self.paths = [file.filename for file in self._files]
        for shard, path in enumerate(self.paths):
            with explain(self._unreadable(shard), OSError):
                os.stat(path)
        self._lengths = self.shard_lengths = [file.take for file in self._files]
        self._num_classes = builder.info.features['label'].num_classes
        self._ends = np.cumsum(self._lengths)
        # Where the examples are among those of the files.
        self._places = np.arange(sum(self._lengths))
        self._tensorflow = jpeg.import_tensorflow()
        self._verified: set[int] = set()
        self._executor = concurrent.futures.ThreadPoolExecutor(8, 'tfrecord')
        self._open = functools.lru_cache(maxsize=_OPEN_SHARDS)(self._scan)

    def __len__(self) -> int:
        return len(self._places)

    def read(self, index: int) -> tuple[bytes, int]:
        """Returns the encoded image and the label of an example; raises UserError if damaged."""
        shard, position = self._locate(index)
        # Protobuf's DecodeError is a bare Exception.
        with explain(f'{self._unreadable(shard)}: record {position}', Exception):
            features = self._features(shard, position)
            image = features['image'].bytes_list.value[0]
            label = features['label'].int64_list.value[0]
            if not 0 <= label < self._num_classes:
                raise ValueError(f'it has the label {label}, not 0 to {self._num_classes - 1}')
        return image, label

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """The labels of all examples, int32 [N]; takes one pass over the files, then is cached."""
        name = f'labels of {self._name} {self._split}'
        found = cached(name, self.paths, lambda: {'labels': self._read_labels()})
        return found['labels']

    def _read_labels(self) -> np.ndarray:
        print(f'data.name={self._name!r}: reading all labels of {self._split}, once', flush=True)

        def read(shard: int) -> list[int]:
            stop = int(self._ends[shard])
            return [self.read(i)[1] for i in range(stop - self._lengths[shard], stop)]

        with multiprocessing.pool.ThreadPool() as pool:
            labels = pool.map(read, range(len(self.paths)))
        return np.concatenate([[], *labels]).astype(np.int32)

    def take(self, indices: np.ndarray) -> 'TFRecords':
        """Returns the examples at `indices` [M], which increase."""
        taken = copy.copy(self)
        taken._places = self._places[indices]
        starts = np.searchsorted(taken._places, [0, *self._ends])
        taken.shard_lengths = np.diff(starts).tolist()
        return taken

    def prepare(self, indices: np.ndarray) -> None:
        """Starts to scan the shards of some examples, several at a time."""
        places = self._places[indices]
        for shard in np.unique(np.searchsorted(self._ends, places, side='right')):
            self._open(int(shard))

    def describe(self, index: int) -> str:
        """Names an example in errors: its number, its file name if it has one, its shard."""
        shard, position = self._locate(index)
        file_name = self._features(shard, position)['file_name'].bytes_list.value
        # Without quotes, but with control characters escaped.
        names = [repr(name.decode(errors='replace'))[1:-1] for name in file_name]
        names.append(f'in {self.paths[shard]}')
        return f'data.name={self._name!r}: {self._split} image {index} ({", ".join(names)})'

    def _locate(self, index: int) -> tuple[int, int]:
        place = int(self._places[index])
        shard = int(np.searchsorted(self._ends, place, side='right'))
        start = int(self._ends[shard]) - self._lengths[shard]
        return shard, place - start + self._files[shard].skip

    def _features(self, shard: int, position: int) -> Mapping[str, Any]:
        record = self._open(shard).result().read(position)
        return self._tensorflow.train.Example.FromString(record).features.feature

    def _scan(self, shard: int) -> 'concurrent.futures.Future[Shard]':
        return self._executor.submit(self._open_and_verify, shard)

    def _open_and_verify(self, shard: int) -> 'Shard':
        opened = Shard(self.paths[shard], self._files[shard].examples_in_shard)
        if shard not in self._verified:
            records = self._tensorflow.data.TFRecordDataset(self.paths[shard])
            # Reading compares each record with its checksum, much faster in order than one by one.
            try:
                records.reduce(np.int64(0), lambda count, _: count + 1)
            except self._tensorflow.errors.DataLossError:
                raise ValueError('records of the file differ from their checksums') from None
            self._verified.add(shard)
        return opened

    def _unreadable(self, shard: int) -> str:
        advice = 'delete the data set and prepare it again'
        return f'data.name={self._name!r}: {self.paths[shard]} cannot be read ({advice})'


class Shard:
    """A TFRecord file, and where its `count` records begin and end.

    Raises:
      ValueError: the file has another number of bytes.
    """

    def __init__(self, path: str, count: int):
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._offsets = np.zeros(count + 1, np.int64)
        for index in range(count):
            offset = int(self._offsets[index])
            # Past the end of the file this adds an empty record, which the check below notices.
            length = int.from_bytes(os.pread(self._file, 8, offset), 'little')
            self._offsets[index + 1] = offset + length + _FRAME
        end, size = self._offsets[-1], os.fstat(self._file).st_size
        if end != size:
            raise ValueError(f'its {count} records take {end} bytes, but it has {size}')

    def read(self, position: int) -> bytes:
        start, end = int(self._offsets[position]), int(self._offsets[position + 1])
        return os.pread(self._file, end - start - _FRAME, start + _HEADER)
