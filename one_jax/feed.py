"""Gives the train step its batches: from the host, or out of a data set in device memory."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from one_jax import device_memory, parallel
from one_jax.data.datasets import Dataset, StreamedDataset
from one_jax.data.resident import Batch, Examples, ResidentBatches
from one_jax.data.streaming import StreamedBatches

# The largest share of a device's memory that a data set takes without being asked to.
DEVICE_SHARE = 0.25
# Steps a call on accelerators, where `train.steps_per_call` leaves it open.
STEPS_PER_CALL = 10


def on_device(config: Any, dataset: Dataset | StreamedDataset) -> bool:
    """Whether the training images are to wait in device memory, by `data.placement`.

    By default they do on accelerators, if they take at most `DEVICE_SHARE` of the memory. On CPU
    it would be a second copy.
    """
    if config.data.placement != 'auto':
        return config.data.placement == 'device'
    if jax.default_backend() == 'cpu' or isinstance(dataset, StreamedDataset):
        return False
    available = device_memory.available_bytes(jax.local_devices()[0])
    return available is None or dataset.splits['train'].images.nbytes <= DEVICE_SHARE * available


def steps_per_call(config: Any, images_on_device: bool, steps_per_epoch: int) -> int:
    """How many steps a call of the compiled program makes, by `train.steps_per_call`.

    By default several where a call is small, and one on CPU, where a loop over convolutions loses
    XLA's threads. Never more than there are between two records.
    """
    wanted = config.train.steps_per_call
    if not wanted:
        small = jax.default_backend() != 'cpu' and images_on_device
        wanted = STEPS_PER_CALL if small else 1
    return min(wanted, config.train.log_every, steps_per_epoch)


class Feed:
    """The batches of the steps, in their order, as the train step takes them.

    Args:
      batches: of each seed that is trained, one or several.
      mesh: that of the train step.
      num_steps: n, of a call; with more than one, a call may be of fewer.
      first_step: the first one that is asked for.
      examples: the training split, to be put in device memory, from where the step takes its images
        itself; None: every call brings its images from the host.

    Attributes:
      num_steps: as given.
    """

    def __init__(
        self,
        batches: Sequence[ResidentBatches | StreamedBatches],
        mesh: Mesh,
        num_steps: int,
        first_step: int,
        examples: Examples | None = None,
    ):
        self._batches, self._mesh, self.num_steps = batches, mesh, num_steps
        self._has_seeds = parallel.has_seeds(mesh)
        self._streams: list[Iterator[Batch]] = []
        self._constants: dict[str, Any] = {}
        if examples is None:
            self._streams = [each.iterate(first_step) for each in batches]
            return
        arrays = {'image': examples.images, 'label': examples.labels}
        self._constants['examples'] = parallel.replicate(arrays, mesh)
        shape = num_steps, len(batches), len(batches[0].indices(first_step))
        ones = np.ones(shape if self._has_seeds else (shape[0], shape[2]), np.float32)
        self._constants['mask'] = self._shard(ones)

    def __call__(self, step: int, count: int) -> dict[str, Any]:
        """The batches of `count` steps, of which `step` are done: see `make_train_step`."""
        if self._streams:
            of_seeds = [list(itertools.islice(stream, count)) for stream in self._streams]
        else:
            of_seeds = [
                [{'index': each.indices(step + i).astype(np.int32)} for i in range(count)]
                for each in self._batches
            ]
        arrays = {name: self._stack(of_seeds, name) for name in of_seeds[0][0]}
        batch = {**self._constants, **self._shard(arrays)}
        if self.num_steps > 1:
            batch['count'] = parallel.replicate(np.int32(count), self._mesh)
        return batch

    def _stack(self, of_seeds: list[list[Batch]], name: str) -> np.ndarray:
        """[n, S, B, ...] or [n, B, ...], with zeros behind the last step; of one step, a view."""
        if not self._has_seeds:
            steps = [batch[name] for batch in of_seeds[0]]
        else:
            steps = [
                np.stack([batches[i][name] for batches in of_seeds])
                for i in range(len(of_seeds[0]))
            ]
        if self.num_steps == 1:
            return steps[0][None]
        stacked = np.zeros((self.num_steps, *steps[0].shape), steps[0].dtype)
        np.stack(steps, out=stacked[: len(steps)])
        return stacked

    def _shard(self, arrays: Any) -> Any:
        cut = parallel.STEPS_SEEDS_AND_BATCH if self._has_seeds else parallel.STEPS_AND_BATCH
        return parallel.shard_batch(arrays, self._mesh, cut)
