"""Data sets too large for memory, decoded while training; a batch follows from (seed, step) alone.

The order of an epoch is computed in advance: shards are put in a random order, every `BLOCK_SHARDS`
of them form a block, and the examples of a block are visited in a random order, each read from its
position in its file. So training starts at any step at once (it scans the record lengths of one
block), each process reads exactly its own part of each batch, and memory holds a few batches, where
a shuffle buffer this wide takes gigabytes.

The price is one read at a random position per image, which suits SSDs, network disks and files in
the page cache, not a spinning disk or a cloud bucket that is not mounted. And the shuffle is not
uniform: two images share a block if their shards do.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from one_jax.data import image_decoding, jpeg
from one_jax.data.batches import Batch, Batches, make_batch, random_bits, share
from one_jax.errors import UserError

BLOCK_SHARDS = 16
# Batches of encoded images to read at the same time: files may be slow to answer.
_READERS = 2
# Steps ahead for which to scan the files.
_LOOK_AHEAD = 8


class EncodedExamples(Protocol):
    """Numbered examples on disk."""

    # The files that hold them.
    paths: Sequence[str | os.PathLike]
    # How many examples lie together, in the order of their numbers.
    shard_lengths: Sequence[int]

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[bytes, int]:
        """Returns the encoded image and the label of an example."""

    def prepare(self, indices: np.ndarray) -> None:
        """Announces which examples will be read next."""

    def describe(self, index: int) -> str:
        """Names an example in errors."""


def epoch_order(seed: int, epoch: int, shard_lengths: Sequence[int]) -> np.ndarray:
    """Returns the order, int64 [N], in which `epoch` visits the examples of all shards."""
    num_shards, count = len(shard_lengths), sum(shard_lengths)
    bits = random_bits(seed, epoch, num_shards + count)
    block_of_shard = np.empty(num_shards, np.int64)
    block_of_shard[np.argsort(bits[:num_shards], kind='stable')] = (
        np.arange(num_shards) // BLOCK_SHARDS
    )
    return np.lexsort((bits[num_shards:], np.repeat(block_of_shard, shard_lengths)))


class StreamedBatches(Batches):
    """Shuffled training batches, randomly cropped to squares and flipped; see `Batches`.

    With a `crop`, nothing is random: images are those of the evaluation, see `decode`.

    Batches are bit-identical for the same seed and step, whatever the first step and the number of
    processes and threads, on processors that round alike. 0 `decode_threads` are one per processor
    core; `prefetch` batches are decoded ahead.
    """

    def __init__(
        self,
        encoded: EncodedExamples,
        batch_size: int,
        seed: int,
        image_size: int,
        decode_threads: int = 0,
        prefetch: int = 2,
        crop: float | None = None,
    ):
        lengths = encoded.shard_lengths
        order = functools.partial(epoch_order, seed, shard_lengths=lengths)
        super().__init__(sum(lengths), order, batch_size)

        def draw_crops(step: int) -> tuple[np.ndarray, np.ndarray]:
            return jpeg.draw_crops(seed, *self.place(step), len(self.share))

        transform = functools.partial(jpeg.training_image, image_size=image_size)
        if crop is not None:
            transform = functools.partial(jpeg.evaluation_image, image_size=image_size, crop=crop)
        extras = draw_crops if crop is None else _no_extras
        self._pipeline = _Pipeline(
            encoded, self.indices, extras, transform, decode_threads, prefetch
        )

    def iterate(self, first_step: int) -> Iterator[Batch]:
        """Yields the batches of `first_step` and all steps after it, see `batches.make_batch`.

        Raises:
          UserError: an image or a file is damaged; the message names it.
        """
        return self._pipeline.batches(range(first_step, 2**62), len(self.share))


def streamed_evaluation_batches(
    encoded: EncodedExamples,
    batch_size: int,
    image_size: int,
    decode_threads: int = 0,
    prefetch: int = 2,
    crop: float | None = None,
) -> Iterator[Batch]:
    """Yields every example exactly once over all processes, in the order on disk.

    Every process yields the same number of batches, the last one padded. The arguments and errors
    are those of `StreamedBatches`.
    """
    count = sum(encoded.shard_lengths)
    own = share('data.eval_batch_size', batch_size)

    def indices(step: int) -> np.ndarray:
        start = step * batch_size
        return np.arange(start + own.start, min(start + own.stop, count))

    transform = functools.partial(jpeg.evaluation_image, image_size=image_size, crop=crop)
    pipeline = _Pipeline(encoded, indices, _no_extras, transform, decode_threads, prefetch)
    return pipeline.batches(range(-(-count // batch_size)), len(own))


def _no_extras(step: int) -> tuple[()]:
    return ()


@dataclasses.dataclass(frozen=True)
class _Pipeline:
    """Reads the examples of each step, decodes them one by one in parallel, and stacks them."""

    encoded: EncodedExamples
    # Maps a step to its examples.
    indices: Callable[[int], np.ndarray]
    # Maps a step to further arguments of `transform`: arrays with one leading axis.
    extras: Callable[[int], tuple[np.ndarray, ...]]
    # Maps (encoded, *extras) of one example to pixels, as a TensorFlow graph.
    transform: Callable[..., Any]
    decode_threads: int
    prefetch: int

    def batches(self, steps: range, size: int) -> Iterator[Batch]:
        """Yields the batches of consecutive steps, each padded to `size`."""
        tf = jpeg.import_tensorflow()
        # Messages about steps that cannot be read.
        failed: dict[int, str] = {}
        dataset = self._dataset(steps, size, failed)
        iterator = dataset.as_numpy_iterator()
        empty = [np.empty((0, *spec.shape[1:]), spec.dtype.name) for spec in dataset.element_spec]
        for step in steps:
            try:
                # A process may have no examples of the last batch.
                images, labels = next(iterator, empty)
            except tf.errors.OpError as error:
                problem = self._find_damaged(step) or f'step {step} cannot be read: {error.message}'
                raise UserError(problem) from error
            if step in failed:
                # A reader that is still alive as Python ends may hang.
                del iterator, dataset
                raise UserError(failed[step])
            yield make_batch(images, labels, size)

    def _dataset(self, steps: range, size: int, failed: dict[int, str]) -> Any:
        tf = jpeg.import_tensorflow()
        threads = self.decode_threads or os.cpu_count()
        extras = self.extras(steps.start)
        types = (tf.string, tf.int32, *(array.dtype for array in extras))
        shapes = ((None,), (None,), *((None, *array.shape[1:]) for array in extras))

        def read_or_note(step: np.ndarray) -> tuple[np.ndarray, ...]:
            try:
                return self._read(step)
            except UserError as error:
                # TensorFlow would print it, and read on.
                failed[int(step)] = str(error)
                blank = image_decoding.encode(Image.new('RGB', (1, 1)))
                images = np.array([blank] * len(self.indices(int(step))), object)
                return images, np.zeros(len(images), np.int32), *self.extras(int(step))

        def read(step: Any) -> tuple:
            outputs = tf.numpy_function(read_or_note, [step], types)
            return tuple(map(tf.ensure_shape, outputs, shapes))

        def decode(encoded: Any, label: Any, *extras: Any) -> tuple[Any, Any]:
            return self.transform(encoded, *extras), label

        options = tf.data.Options()
        options.deterministic = True
        options.autotune.enabled = False
        options.threading.private_threadpool_size = threads + _READERS
        options.threading.max_intra_op_parallelism = 1
        return (
            tf.data.Dataset.range(steps.start, steps.stop)
            .map(read, num_parallel_calls=_READERS)
            .unbatch()
            .map(decode, num_parallel_calls=threads)
            .batch(size)
            .prefetch(self.prefetch)
            .with_options(options)
        )

    def _read(self, step: np.ndarray) -> tuple[np.ndarray, ...]:
        indices = self.indices(int(step))
        self.encoded.prepare(indices)
        self.encoded.prepare(self.indices(int(step) + _LOOK_AHEAD))
        images, labels = np.empty(len(indices), object), np.empty(len(indices), np.int32)
        for place, index in enumerate(indices):
            images[place], labels[place] = self.encoded.read(index)
        return images, labels, *self.extras(int(step))

    def _find_damaged(self, step: int) -> str | None:
        """Returns a message that names the first damaged image of a step."""
        tf = jpeg.import_tensorflow()
        images, _, *extras = self._read(step)
        transform = tf.function(self.transform)
        for place, index in enumerate(self.indices(step)):
            try:
                transform(tf.constant(images[place]), *(array[place] for array in extras))
            except tf.errors.OpError:
                reason = 'it is damaged'
                try:
                    image_decoding.decode(images[place])
                except Exception as error:  # Decoders of damaged files raise anything.
                    reason = str(error).partition('\n')[0]
                return (
                    f'{self.encoded.describe(index)} is not a whole image ({len(images[place])} '
                    f'bytes; {reason}): repair or remove it, and prepare the data set again'
                )
        return None
