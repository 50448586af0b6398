"""The order of training batches: a function of (seed, step) alone, so resuming costs nothing."""

import functools
import threading
from collections.abc import Callable

import jax
import numpy as np

from one_jax.errors import require

Batch = dict[str, np.ndarray]


def random_bits(seed: int, stream: int, size: int) -> np.ndarray:
    """Returns raw output of the Philox generator, uint64 [size], the same in every numpy version.

    Outputs of different (seed, stream), both below 2**64, are independent. Epochs are streams, so
    other uses count from 2**63.
    """
    return np.random.Philox(key=np.array([seed, stream], np.uint64)).random_raw(size)


class Batches:
    """Computes which examples make up each training batch; subclasses read the images.

    An epoch visits each of N examples at most once, in the order, int64 [N], that `order` returns
    for it. The last N mod B examples of the order are dropped with `drop_last`, or else form a
    smaller batch. Each of P processes reads B / P examples of the global batch size B.

    Attributes:
      last_size: examples of that smaller batch; 0 if all are whole.
      steps_per_epoch: N / B, rounded down with `drop_last`, or else up.
      share: the places of a global batch that belong to this process, see `share`.

    Raises:
      ConfigError: there are fewer than B examples, or P does not divide B.
    """

    def __init__(
        self,
        num_examples: int,
        order: Callable[[int], np.ndarray],
        batch_size: int,
        drop_last: bool = True,
    ):
        allowed = f'1 to {num_examples}, the number of training images'
        require(1 <= batch_size <= num_examples, 'data.batch_size', batch_size, allowed)
        self.last_size = 0 if drop_last else num_examples % batch_size
        self.batch_size = batch_size
        self.steps_per_epoch = num_examples // batch_size + bool(self.last_size)
        self.share = share('data.batch_size', batch_size)
        self._order = functools.lru_cache(maxsize=2)(order)
        self._lock = threading.Lock()

    def place(self, step: int) -> tuple[int, int]:
        """Returns the epoch of a step, and where this process's part starts in its order."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return epoch, position * self.batch_size + jax.process_index() * self.size(step)

    def size(self, step: int) -> int:
        """Returns the number of this process's examples of a step."""
        is_smaller = self.last_size and (step + 1) % self.steps_per_epoch == 0
        return (self.last_size if is_smaller else self.batch_size) // jax.process_count()

    def indices(self, step: int) -> np.ndarray:
        """Returns this process's examples of a step, int64 [size]; steps count over all epochs."""
        epoch, start = self.place(step)
        with self._lock:  # Several readers would otherwise sort at the same time.
            order = self._order(epoch)
        return order[start : start + self.size(step)]


def share(field: str, batch_size: int) -> range:
    """Returns the places of a global batch that belong to this process.

    Raises:
      ConfigError: the batch size, the value of `field`, is not divisible by the process count.
    """
    count = jax.process_count()
    require(batch_size % count == 0, field, batch_size, f'a multiple of the {count} processes')
    size = batch_size // count
    return range(jax.process_index() * size, (jax.process_index() + 1) * size)


def make_batch(images: np.ndarray, labels: np.ndarray, size: int) -> Batch:
    """Returns a batch of n <= `size` examples, padded to `size` with zeros of mask 0.

    Returns:
      `image` uint8 [size, H, W, 3], `label` int32 [size] and `mask` float32 [size].
    """
    batch = {'image': images, 'label': labels, 'mask': np.ones(len(labels), np.float32)}
    if missing := size - len(labels):
        for name, array in batch.items():
            batch[name] = np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
    return batch
