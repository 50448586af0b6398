"""Feeds the train step: batches from the host, or indices into a data set in device memory."""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from one_jax import data
from one_jax.runtime import memory, parallel
from one_jax.training.experiment import Experiment

# By default: the largest share of a device's memory for a data set; steps per call on accelerators.
DEVICE_SHARE, STEPS_PER_CALL = 0.25, 10


def examples_on_device(config: Any, source: data.Source) -> data.Examples | None:
    """Returns the training images if they go into device memory, by `data.placement`.

    By default they do on accelerators, if they take at most `DEVICE_SHARE` of the memory.
    """
    examples = source.examples('train')
    if examples is None or config.data.placement == 'host':
        return None
    if config.data.placement == 'device':
        return examples
    available = memory.device_bytes(jax.local_devices()[0])
    fits = available is None or examples.images.nbytes <= DEVICE_SHARE * available
    return examples if fits and jax.default_backend() != 'cpu' else None


def steps_per_call(config: Any, images_on_device: bool, steps_per_epoch: int) -> int:
    """How many steps one call of the compiled step makes, by `train.steps_per_call`.

    Never more than there are between two records.
    """
    small = jax.default_backend() != 'cpu' and images_on_device
    chosen = config.train.steps_per_call or (STEPS_PER_CALL if small else 1)
    return min(chosen, config.train.log_every, steps_per_epoch)


class Feed:
    """Iterates over the calls of the train step: the step completed after each, and its batches.

    A call ends at the next training record at the latest. See `step.make_train_step` for the
    batches.

    Args:
      experiment: of the run.
      batches: from `Source.train_batches`.
      mesh: of the train step.
      num_steps: steps per call, at most.
      first_step: steps completed before the first call.
      examples: the training split, to put into device memory; None sends images with every call.
    """

    def __init__(
        self,
        experiment: Experiment,
        batches: data.Batches,
        mesh: Mesh,
        num_steps: int,
        first_step: int,
        examples: data.Examples | None = None,
    ):
        self._experiment, self._batches, self._mesh = experiment, batches, mesh
        self._num_steps, self._first_step = num_steps, first_step
        self._constants: dict[str, Any] = {}
        if examples is not None:
            arrays = {'image': examples.images, 'label': examples.labels}
            self._constants['examples'] = parallel.replicate(arrays, mesh)
            size = len(batches.indices(first_step))
            ones = np.ones((num_steps, size), np.float32)
            self._constants['mask'] = parallel.shard_batch(ones, mesh, parallel.STEPS_AND_BATCH)

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        step, total_steps = self._first_step, self._experiment.total_steps
        stream = None if self._constants else self._batches.iterate(step)
        while step < total_steps:
            count = 1
            while count < self._num_steps and not self._experiment.logs_at(step + count):
                count += 1
            if stream is None:
                steps = range(step, step + count)
                arrays = [{'index': self._batches.indices(i).astype(np.int32)} for i in steps]
            else:
                arrays = list(itertools.islice(stream, count))
            step += count
            yield step, self._place(arrays)

    def _place(self, batches: list[dict[str, np.ndarray]]) -> dict[str, Any]:
        """Stacks the batches of a call, pads them to `num_steps`, and moves them to the devices."""
        stacked = {name: self._stack([batch[name] for batch in batches]) for name in batches[0]}
        placed = parallel.shard_batch(stacked, self._mesh, parallel.STEPS_AND_BATCH)
        if self._num_steps > 1:
            placed['count'] = parallel.replicate(np.int32(len(batches)), self._mesh)
        return {**self._constants, **placed}

    def _stack(self, arrays: list[np.ndarray]) -> np.ndarray:
        if self._num_steps == 1:
            return arrays[0][None]
        stacked = np.zeros((self._num_steps, *arrays[0].shape), arrays[0].dtype)
        np.stack(arrays, out=stacked[: len(arrays)])
        return stacked
