"""How long a forward pass takes on this machine."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from one_jax import workdir
from one_jax.self_check import Predict

BATCH_SIZES = (1, 256)
_REPETITIONS, _SECONDS = 20, 5.0


def measure(
    formats: Mapping[str, Predict],
    image_size: tuple[int, int],
    ensemble: Mapping[str, Predict] | None = None,
) -> dict[str, Any]:
    """The latency of each format: the median of up to 20 calls after a first one.

    Images come from the host's memory and logits go back there, as in use.

    Args:
      formats: functions of uint8 images, by name.
      image_size: (H, W).
      ensemble: what the same formats of the ensemble compute; its calls take turns with the
        student's, so that what else the machine does is shared.

    Returns:
      `device`; and in `milliseconds` and, of an ensemble, `ensemble_milliseconds`, for each format,
      the median by the batch size in words.
    """
    columns = {'milliseconds': formats}
    if ensemble is not None:
        columns['ensemble_milliseconds'] = ensemble
    generator = np.random.default_rng(0)
    batches = [
        generator.integers(0, 256, (batch_size, *image_size, 3), np.uint8)
        for batch_size in BATCH_SIZES
    ]
    measured: dict[str, Any] = {column: {name: {} for name in formats} for column in columns}
    for name in formats:
        for images in batches:
            medians = _medians([column[name] for column in columns.values()], images)
            for column, median in zip(columns, medians, strict=True):
                measured[column][name][str(len(images))] = median
    return {'device': workdir.device_name(), **measured}


def _medians(functions: Sequence[Predict], images: np.ndarray) -> list[float]:
    """The median milliseconds of each function; they take turns."""
    for predict in functions:
        # The first call compiles.
        np.asarray(predict(images))
    times, started = [[] for _ in functions], time.perf_counter()
    while len(times[0]) < 3 or (
        len(times[0]) < _REPETITIONS and time.perf_counter() - started < _SECONDS * len(functions)
    ):
        for predict, own in zip(functions, times, strict=True):
            before = time.perf_counter()
            np.asarray(predict(images))
            own.append(1000 * (time.perf_counter() - before))
    return [statistics.median(own) for own in times]
