"""Data sets too large for memory, decoded while training; a batch follows from (seed, step) alone.

The order of an epoch is computed, not shuffled on the way: the shards are put in a random order,
each `BLOCK_SHARDS` of them are a block, and the examples of a block are visited in a random order.
Each example has its place, exactly one, and is read from its file at its position. So

- training starts at any step at once: it looks through the lengths of the records in one block
  (ImageNet: 16 files, 20,000 records), and decodes nothing that is not used;
- a process reads its own part of each batch, exactly, and the global batch is the same for any
  number of processes;
- nothing is held in memory but a few batches, where a shuffle buffer this wide takes gigabytes.

The price is one read at a random position for each image: for SSDs, network disks
and what the system has cached, not for one spinning disk, nor for cloud buckets that are not
mounted. And the shuffle is no uniform permutation: two images share a block if their shards do.
"""

import functools
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from one_jax.data import jpeg
from one_jax.data.records import ImageFiles, Source, TFRecords
from one_jax.data.resident import Batch, random_bits, share
from one_jax.errors import ConfigError, UserError

BLOCK_SHARDS = 16
# Batches read, undecoded, at the same time: files may take long to answer.
_READERS = 2
# So many steps ahead the files are looked through.
_LOOK_AHEAD = 8


def open_source(builder: tfds.core.DatasetBuilder | ImageFiles, split: str) -> Source:
    """The encoded examples of a split; image files are their own split.

    Raises:
      UserError: they cannot be read from here.
    """
    return builder if isinstance(builder, ImageFiles) else TFRecords(builder, split)


def epoch_order(seed: int, epoch: int, shard_lengths: list[int]) -> np.ndarray:
    """The order, int64 [N], in which `epoch` visits the examples: a permutation.

    It costs one sort of N numbers, kept for two epochs.

    Args:
      seed: of the run.
      epoch: counted from 0.
      shard_lengths: of the files, in the order of the examples' numbers.
    """
    num_shards, count = len(shard_lengths), sum(shard_lengths)
    bits = random_bits(seed, epoch, num_shards + count)
    block_of_shard = np.empty(num_shards, np.int64)
    block_of_shard[np.argsort(bits[:num_shards], kind='stable')] = (
        np.arange(num_shards) // BLOCK_SHARDS
    )
    return np.lexsort((bits[num_shards:], np.repeat(block_of_shard, shard_lengths)))


class StreamedBatches:
    """Shuffled training batches: every epoch visits each example at most once.

    The N mod batch_size examples at the end of an epoch's order are left out, others every epoch.
    Batches are bit-identical for the same seed and step, whatever the step to start from, the
    number of processes and of threads; on processors that round alike.

    Args:
      builder: opened from disk, in TFRecord files; or image files.
      split: a split of the builder, or an expression; of no meaning for image files.
      batch_size: B, of the global batch.
      seed: of the order and of the crops.
      image_size: S.
      process_index: of this process.
      process_count: P; the global batch is split into P consecutive parts.
      decode_threads: 0 for one on each processor core.
      prefetch: batches that are decoded ahead.

    Raises:
      ConfigError: a batch size that is too large, or is not divisible by P.
      UserError: the files cannot be read from here, or TensorFlow is missing.
    """

    def __init__(
        self,
        builder: tfds.core.DatasetBuilder | ImageFiles,
        split: str,
        batch_size: int,
        seed: int,
        image_size: int,
        *,
        process_index: int = 0,
        process_count: int = 1,
        decode_threads: int = 0,
        prefetch: int = 2,
    ):
        self._source = open_source(builder, split)
        self.num_examples = sum(self._source.shard_lengths)
        self.batch_size, self.seed, self.image_size = batch_size, seed, image_size
        if not 1 <= batch_size <= self.num_examples:
            raise ConfigError(
                'data.batch_size',
                batch_size,
                f'1 to {self.num_examples}, the number of train images',
            )
        self._share = share('data.batch_size', batch_size, process_index, process_count)
        self.steps_per_epoch = self.num_examples // batch_size
        self._threads, self._prefetch = decode_threads, prefetch
        self._lock = threading.Lock()
        self._order = functools.lru_cache(maxsize=2)(
            functools.partial(epoch_order, seed, shard_lengths=self._source.shard_lengths)
        )

    def indices(self, step: int) -> np.ndarray:
        """Which examples make up this process's part of the batch of a step, int64 [B / P]."""
        epoch, position = divmod(step, self.steps_per_epoch)
        with self._lock:  # or else several readers would sort at the same time
            order = self._order(epoch)
        start = position * self.batch_size
        return order[start + self._share.start : start + self._share.stop]

    def iterate(self, first_step: int) -> Iterator[Batch]:
        """The batches of `first_step`, the step after it, and so on without end.

        Yields:
          `image` uint8 [B / P, S, S, 3], `label` int32 [B / P] and `mask` float32 [B / P], ones.

        Raises:
          UserError: an image or a file is damaged; it is named.
        """

        def extras(step: int) -> tuple[np.ndarray, np.ndarray]:
            epoch, position = divmod(step, self.steps_per_epoch)
            start = position * self.batch_size + self._share.start
            return jpeg.draw_crops(self.seed, epoch, start, len(self._share))

        pipeline = _Pipeline(
            self._source,
            self.indices,
            extras,
            jpeg.training_image,
            self.image_size,
        )
        return pipeline.batches(
            range(first_step, 2**62), len(self._share), self._threads, self._prefetch
        )


def streamed_evaluation_batches(
    builder: tfds.core.DatasetBuilder | ImageFiles,
    split: str,
    batch_size: int,
    image_size: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    decode_threads: int = 0,
    prefetch: int = 2,
) -> Iterator[Batch]:
    """Every example exactly once over all processes, in the order on disk.

    The shorter side is resized to `image_size` / 0.875, and the centre cropped. The last batch is
    padded with zeros of mask 0; every process yields the same number of batches.

    Args:
      builder, split, image_size, process_index, process_count, decode_threads, prefetch: as those
        of `StreamedBatches`.
      batch_size: B, of the global batch.

    Returns:
      An iterator over batches as those of `StreamedBatches.iterate`.

    Raises:
      ConfigError, UserError: as `StreamedBatches` and its `iterate`.
    """
    source = open_source(builder, split)
    count = sum(source.shard_lengths)
    own = share('data.eval_batch_size', batch_size, process_index, process_count)

    def indices(step: int) -> np.ndarray:
        start = step * batch_size
        return np.arange(start + own.start, min(start + own.stop, count))

    pipeline = _Pipeline(source, indices, lambda step: (), jpeg.evaluation_image, image_size)
    steps = range(-(-count // batch_size))
    return pipeline.batches(steps, len(own), decode_threads, prefetch)


class _Pipeline:
    """Reads the examples of a step, decodes them one by one in parallel, and stacks them.

    Args:
      source: of the encoded examples.
      indices: which of them make up a step.
      extras: what else `transform` takes, of a step: arrays with the same leading axis.
      transform: maps (encoded, *extras, image_size) of one example to pixels, as a TensorFlow
        graph.
      image_size: S.
    """

    def __init__(
        self,
        source: Source,
        indices: Callable[[int], np.ndarray],
        extras: Callable[[int], tuple[np.ndarray, ...]],
        transform: Callable[..., Any],
        image_size: int,
    ):
        self._source, self._indices, self._extras = source, indices, extras
        self._transform = functools.partial(transform, image_size=image_size)
        self._image_shape = (image_size, image_size, 3)

    def batches(self, steps: range, size: int, threads: int, prefetch: int) -> Iterator[Batch]:
        """The batches of consecutive steps, each padded to `size`."""
        tf = jpeg.import_tensorflow()
        threads = threads or os.cpu_count()
        extras = self._extras(steps.start)
        types = (tf.string, tf.int32, *(array.dtype for array in extras))
        shapes = ((), (), *(array.shape[1:] for array in extras))

        def read(step: Any) -> tuple:
            outputs = tf.numpy_function(self._read, [step], types)
            return tuple(
                tf.ensure_shape(output, (None, *shape))
                for output, shape in zip(outputs, shapes, strict=True)
            )

        def decode(encoded: Any, label: Any, *extras: Any) -> tuple[Any, Any]:
            return self._transform(encoded, *extras), label

        options = tf.data.Options()
        options.deterministic = True
        options.autotune.enabled = False
        options.threading.private_threadpool_size = threads + _READERS
        options.threading.max_intra_op_parallelism = 1
        dataset = (
            tf.data.Dataset.range(steps.start, steps.stop)
            .map(read, num_parallel_calls=_READERS)
            .unbatch()
            .map(decode, num_parallel_calls=threads)
            .batch(size)
            .prefetch(prefetch)
            .with_options(options)
        )
        return self._iterate(dataset.as_numpy_iterator(), steps, size)

    def _iterate(self, decoded: Iterator[tuple], steps: range, size: int) -> Iterator[Batch]:
        tf = jpeg.import_tensorflow()
        for step in steps:
            try:
                image, label = next(decoded, (None, None))
            except tf.errors.OpError as error:
                self._explain(step)
                raise UserError(f'step {step} cannot be read: {error.message}') from error
            if image is None:  # a last batch that is all other processes'
                image, label = np.empty((0, *self._image_shape), np.uint8), np.empty(0, np.int32)
            yield _pad({'image': image, 'label': label}, size)

    def _read(self, step: np.ndarray) -> tuple[np.ndarray, ...]:
        indices = self._indices(int(step))
        self._source.prepare(indices)
        self._source.prepare(self._indices(int(step) + _LOOK_AHEAD))
        encoded = np.empty(len(indices), object)
        labels = np.empty(len(indices), np.int32)
        for place, index in enumerate(indices):
            encoded[place], labels[place] = self._source.read(index)
            if not 0 <= labels[place] < self._source.num_classes:
                raise UserError(
                    f'{self._source.describe(index)} has the label {labels[place]}, '
                    f'not 0 to {self._source.num_classes - 1}'
                )
        return encoded, labels, *self._extras(int(step))

    def _explain(self, step: int) -> None:
        """Goes through the examples of a step that failed, and raises the first's error."""
        tf = jpeg.import_tensorflow()
        encoded, _, *extras = self._read(step)
        transform = tf.function(self._transform)
        for place, index in enumerate(self._indices(step)):
            try:
                transform(tf.constant(encoded[place]), *(array[place] for array in extras))
            except tf.errors.OpError as error:
                raise UserError(
                    f'{self._source.describe(index)} is not a whole image '
                    f'({len(encoded[place])} bytes): mend it or leave it out, and prepare the '
                    'data set again'
                ) from error


def _pad(batch: Batch, size: int) -> Batch:
    """Adds the mask, and zeros up to `size`."""
    missing = size - len(batch['label'])
    batch['mask'] = np.ones(len(batch['label']), np.float32)
    if not missing:
        return batch
    return {
        name: np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
        for name, array in batch.items()
    }
