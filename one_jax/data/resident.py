"""Data sets in memory: batches, subsets of the training images, and generated images."""

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from ml_collections import config_dict

from one_jax.data.batches import Batch, Batches, make_batch, random_bits, share
from one_jax.data.table import DatasetSpec
from one_jax.errors import require

# Streams of random bits, see `batches.random_bits`.
_PROTOTYPE_STREAM, _TRAIN_STREAM, _TEST_STREAM, _SUBSET_STREAM = (2**63 + i for i in range(4))
# Rows and columns of single-colour squares in the prototype of a generated class.
_SQUARES_PER_SIDE = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """A split in memory: images uint8 [N, H, W, 3] and labels int32 [N]."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def checksum(self) -> int:
        """Returns a checksum of all images and labels in order; takes 1 s per gigabyte."""
        return zlib.crc32(self.labels.tobytes(), zlib.crc32(np.ascontiguousarray(self.images)))

    def take(self, indices: np.ndarray | slice) -> 'Examples':
        """Returns the examples at `indices` [M], in that order; a slice makes no copy."""
        return Examples(self.images[indices], self.labels[indices])


def epoch_permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """Returns the order, int64 [n], in which `epoch` visits `n` examples.

    It is the argsort of raw output: numpy guarantees the stream of a bit generator across versions,
    but not `Generator.permutation`.
    """
    return np.argsort(random_bits(seed, epoch, n), kind='stable')


class ResidentBatches(Batches):
    """Shuffled training batches of examples in memory; see `Batches`."""

    def __init__(self, examples: Examples, batch_size: int, seed: int, drop_last: bool = True):
        order = functools.partial(epoch_permutation, seed, n=len(examples))
        super().__init__(len(examples), order, batch_size, drop_last)
        self._examples = examples

    def batch(self, step: int) -> Batch:
        """Returns this process's part of the batch of a step, see `batches.make_batch`."""
        examples = self._examples.take(self.indices(step))
        return make_batch(examples.images, examples.labels, len(examples))

    def iterate(self, first_step: int) -> Iterator[Batch]:
        """Yields the batches of `first_step` and all steps after it."""
        return map(self.batch, itertools.count(first_step))


def evaluation_batches(examples: Examples, batch_size: int) -> Iterator[Batch]:
    """Yields every example exactly once over all processes, the last batch padded.

    Every process yields the same number of batches, all of one shape.
    """
    own = share('data.eval_batch_size', batch_size)
    for start in range(0, len(examples), batch_size):
        part = examples.take(slice(start + own.start, start + own.stop))
        yield make_batch(part.images, part.labels, len(own))


def count_values(images: np.ndarray) -> np.ndarray:
    """Returns how often each value occurs in each channel of uint8 images, int64 [C, 256]."""
    channels = np.moveaxis(images, -1, 0)
    return np.array(
        [
            sum(np.bincount(image.ravel(), minlength=256) for image in channel)
            for channel in channels
        ]
    )


def channel_statistics(counts: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Computes mean and standard deviation of each channel on the [0, 1] scale.

    Both are exact, from the counts of `count_values`. The deviation is at least 1 / 255, so that it
    can be divided by.
    """
    values = np.arange(256) / 255
    statistics = []
    for weights in counts:
        mean = np.average(values, weights=weights)
        variance = np.average((values - mean) ** 2, weights=weights)
        statistics.append((float(mean), max(float(np.sqrt(variance)), 1 / 255)))
    mean, std = zip(*statistics, strict=True)
    return mean, std


def class_ranks(labels: np.ndarray, seed: int, stream: int) -> np.ndarray:
    """Returns the place, int64 [N], of every example in a random order of its class."""
    counts = np.bincount(labels)
    order = np.lexsort((random_bits(seed, stream, len(labels)), labels))
    ranks = np.empty(len(labels), np.int64)
    ranks[order] = np.arange(len(labels)) - (np.cumsum(counts) - counts)[labels[order]]
    return ranks


def select(
    train: Any, label_names: Sequence[str], data_config: config_dict.ConfigDict
) -> dict[str, Any]:
    """Splits training images into 'train' and, if some are held out, 'validation'.

    Takes examples in memory or on disk: they have `labels`, int32 [N], and `take`.

    Every class is put in one random order: training takes from its front, validation from its back.
    So subsets are nested, and do not depend on how many images are held out. At least one image of
    every class is held out, and at least one remains.

    Raises:
      ConfigError: the smallest class has too few images, or a class has one, and is to be split.
    """
    fraction, wanted = data_config.validation_fraction, data_config.examples_per_class
    if not fraction and not wanted:
        return {'train': train}
    labels = train.labels
    counts = np.bincount(labels, minlength=len(label_names))
    single = [label_names[label] for label in np.flatnonzero(counts == 1)]
    allowed = f'0 for classes of one image ({len(single)}: {", ".join(map(repr, single[:5]))})'
    require(not fraction or not single, 'data.validation_fraction', fraction, allowed)
    held_out = np.zeros_like(counts)
    if fraction:
        held_out = np.clip(
            np.rint(fraction * counts).astype(int), counts > 1, counts - (counts > 0)
        )
    remaining = counts - held_out
    allowed = f'0 (all) to {remaining.min()}, the training images of the smallest class'
    require(wanted <= remaining.min(), 'data.examples_per_class', wanted, allowed)
    ranks = class_ranks(labels, data_config.subset_seed, _SUBSET_STREAM)
    limit = wanted or remaining[labels]
    selected = {'train': train.take(np.flatnonzero(ranks < limit))}
    if fraction:
        selected['validation'] = train.take(np.flatnonzero(ranks >= remaining[labels]))
    return selected


def generate(spec: DatasetSpec, split: str, seed: int) -> Examples:
    """Generates a split of learnable images: half a prototype of the class, half noise.

    A prototype is a coarse pattern of coloured squares, which small crops leave recognisable.
    Prototypes do not depend on the seed. Labels are 0, 1, ... in turn.
    """
    height, width, channels = spec.image_shape
    side = _SQUARES_PER_SIDE
    squares = _random_bytes(0, _PROTOTYPE_STREAM, (spec.num_classes, side, side, channels))
    rows, columns = np.arange(height) * side // height, np.arange(width) * side // width
    train = spec.num_train, _TRAIN_STREAM
    count, stream = train if split == 'train' else (spec.num_test, _TEST_STREAM)
    labels = np.arange(count, dtype=np.int32) % spec.num_classes
    images = _random_bytes(seed, stream, (count, *spec.image_shape)) // 2
    # Only drawn classes are enlarged: a thousand large prototypes would take much memory.
    images += squares[labels][:, rows[:, None], columns] // 2
    return Examples(images, labels)


def _random_bytes(seed: int, stream: int, shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape))
    return random_bits(seed, stream, -(-size // 8)).view(np.uint8)[:size].reshape(shape)
