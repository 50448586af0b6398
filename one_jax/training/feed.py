"""Feeds the train step: batches from the host, or indices into a data set in device memory."""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from one_jax import data
from one_jax.errors import require
from one_jax.runtime import memory, parallel
from one_jax.training.experiment import Experiment

# By default: the largest share of a device's memory for a data set; steps per call on accelerators.
DEVICE_SHARE, STEPS_PER_CALL = 0.25, 10


def examples_on_device(config: Any, source: data.Source) -> data.Examples | None:
    """Returns the training images if they go into device memory, by `data.placement`."""
    examples, available = source.examples('train'), memory.device_bytes(jax.local_devices()[0])
    if examples is None:
        return None
    backend = jax.default_backend()
    goes = goes_on_device(config.data.placement, examples.images.nbytes, backend, available)
    return examples if goes else None


def goes_on_device(placement: str, size: int, platform: str, available: int | None) -> bool:
    """Whether images of `size` bytes go into a device's memory, by `data.placement`.

    With 'auto' they do on accelerators, if they take at most `DEVICE_SHARE` of the memory.
    """
    fits = available is None or size <= DEVICE_SHARE * available
    return placement == 'device' or (placement == 'auto' and fits and platform != 'cpu')


def steps_per_call(
    config: Any, images_on_device: bool, steps_per_epoch: int, platform: str | None = None
) -> int:
    """How many steps one call of the compiled step makes, by `train.steps_per_call`.

    Never more than there are between two records. `platform` is by default this process's.
    """
    small = (platform or jax.default_backend()) != 'cpu' and images_on_device
    chosen = config.train.steps_per_call or (STEPS_PER_CALL if small else 1)
    return min(chosen, config.train.log_every, steps_per_epoch)


def require_parts(config: Any, batches: data.Batches, mesh: Mesh) -> None:
    """Raises `ConfigError` unless devices and parts of a batch divide the smaller last one."""
    parts, size = mesh.size * config.train.accumulation_steps, batches.last_size
    allowed = f'True: {parts} (devices times parts) does not divide the last batch of {size}'
    require(size % parts == 0, 'data.drop_last', config.data.drop_last, allowed)


class Feed:
    """Iterates over the calls of the train step: the step completed after each, and its batches.

    A call ends at the next training record at the latest. A smaller last batch of an epoch has a
    call of one step to itself. See `step.make_train_step` for the batches.

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
        # Masks of calls that only send indices, by their shape.
        self._masks: dict[tuple[int, ...], jax.Array] = {}
        if examples is not None:
            arrays = {'image': examples.images, 'label': examples.labels}
            self._constants['examples'] = parallel.replicate(arrays, mesh)

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        step, total_steps = self._first_step, self._experiment.total_steps
        stream = None if self._constants else self._batches.iterate(step)
        while step < total_steps:
            count, size = 1, self._batches.size
            while (
                count < self._num_steps
                and not self._experiment.logs_at(step + count)
                and size(step + count) == size(step)
            ):
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
        size = len(next(iter(batches[0].values())))
        num_steps = self._num_steps if size == len(self._batches.share) else 1
        stacked = {
            name: _stack([batch[name] for batch in batches], num_steps) for name in batches[0]
        }
        placed = self._shard(stacked)
        if self._constants:
            shape = num_steps, size
            if shape not in self._masks:
                self._masks[shape] = self._shard(np.ones(shape, np.float32))
            placed['mask'] = self._masks[shape]
        if num_steps > 1:
            placed['count'] = parallel.replicate(np.int32(len(batches)), self._mesh)
        return {**self._constants, **placed}

    def _shard(self, arrays: Any) -> Any:
        return parallel.shard_batch(arrays, self._mesh, parallel.STEPS_AND_BATCH)


def _stack(arrays: list[np.ndarray], num_steps: int) -> np.ndarray:
    if num_steps == 1:
        return arrays[0][None]
    stacked = np.zeros((num_steps, *arrays[0].shape), arrays[0].dtype)
    np.stack(arrays, out=stacked[: len(arrays)])
    return stacked
