"""Data sets in memory: a batch is a pure function of (seed, step), so resuming costs nothing."""

import dataclasses
import itertools
import zlib
from collections.abc import Iterator

import numpy as np

from one_jax.errors import ConfigError

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """A split in memory: images uint8 [N, H, W, 3] and labels int32 [N]."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def checksum(self) -> int:
        """Of all images and labels in their order; 1 s a gigabyte."""
        return zlib.crc32(self.labels.tobytes(), zlib.crc32(np.ascontiguousarray(self.images)))

    def take(self, indices: np.ndarray | slice) -> 'Examples':
        """The examples at `indices` [M], in that order; of a slice, without a copy."""
        return Examples(self.images[indices], self.labels[indices])


def random_bits(seed: int, stream: int, size: int) -> np.ndarray:
    """Raw output of the Philox generator, uint64 [size], the same in every version of numpy.

    Args:
      seed: below 2**64.
      stream: below 2**64; outputs of different (seed, stream) are independent. Epochs are streams,
        so other uses count from 2**63 on.
      size: how many numbers.
    """
    return np.random.Philox(key=np.array([seed, stream], np.uint64)).random_raw(size)


def epoch_permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order, int64 [n], in which `epoch` visits `n` examples.

    numpy promises the stream of a bit generator for ever, but not what `Generator.permutation`
    makes of it: the order is the argsort of raw output.
    """
    return np.argsort(random_bits(seed, epoch, n), kind='stable')


class ResidentBatches:
    """Shuffled training batches: every epoch visits each example at most once.

    The N mod batch_size examples at the end of an epoch's order are left out, others every epoch,
    so that all batches are whole.

    Args:
      examples: all of them, in every process.
      batch_size: B, of the global batch.
      seed: of the order.
      process_index: of this process.
      process_count: P; the global batch is split into P consecutive parts.

    Raises:
      ConfigError: there are fewer examples than `batch_size`, or P does not divide it.
    """

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if not 1 <= batch_size <= len(examples):
            raise ConfigError(
                'data.batch_size', batch_size, f'1 to {len(examples)}, the number of train images'
            )
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self._share = share('data.batch_size', batch_size, process_index, process_count)
        self.steps_per_epoch = len(examples) // batch_size
        self._order = (0, epoch_permutation(seed, 0, len(examples)))

    def indices(self, step: int) -> np.ndarray:
        """Which examples make up this process's part of the batch of a step, int64 [B / P]."""
        epoch, position = divmod(step, self.steps_per_epoch)
        cached_epoch, order = self._order
        if cached_epoch != epoch:
            order = epoch_permutation(self.seed, epoch, len(self.examples))
            self._order = (epoch, order)
        start = position * self.batch_size
        return order[start + self._share.start : start + self._share.stop]

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0 over all epochs.

        Returns:
          `image` uint8 [B / P, H, W, 3], `label` int32 [B / P] and `mask` float32 [B / P], ones.
        """
        return _batch(self.examples.take(self.indices(step)), len(self._share))

    def iterate(self, first_step: int) -> Iterator[Batch]:
        """The batches of `first_step` and all after it."""
        return map(self.batch, itertools.count(first_step))


def evaluation_batches(
    examples: Examples, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Every example exactly once over all processes; the last batch is padded with zeros of mask 0.

    The arguments and errors are those of `ResidentBatches`.

    Yields:
      Batches as those of `ResidentBatches.batch`, all of the same shapes; every process yields the
      same number of them.
    """
    own = share('data.eval_batch_size', batch_size, process_index, process_count)
    for start in range(0, len(examples), batch_size):
        part = slice(start + own.start, start + own.stop)
        yield _batch(examples.take(part), len(own))


def share(field: str, batch_size: int, process_index: int, process_count: int) -> range:
    """The places of a global batch that are this process's.

    Raises:
      ConfigError: the batch, the value of `field`, cannot be split evenly.
    """
    if batch_size < 1 or batch_size % process_count:
        raise ConfigError(field, batch_size, f'a multiple of the {process_count} processes')
    size = batch_size // process_count
    return range(process_index * size, (process_index + 1) * size)


def _batch(examples: Examples, batch_size: int) -> Batch:
    batch = {
        'image': examples.images,
        'label': examples.labels,
        'mask': np.ones(len(examples), np.float32),
    }
    missing = batch_size - len(examples)
    if missing:
        batch = {
            name: np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
            for name, array in batch.items()
        }
    return batch
