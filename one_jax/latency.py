"""How long a forward pass takes on this machine."""

import statistics
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from one_jax import workdir
from one_jax.self_check import Predict

BATCH_SIZES = (1, 256)
_REPETITIONS, _SECONDS = 20, 5.0


def measure(formats: Mapping[str, Predict], image_size: tuple[int, int]) -> dict[str, Any]:
    """The latency of each format: the median of up to 20 calls after a first one.

    Images come from the host's memory and logits go back there, as in use.

    Args:
      formats: functions of uint8 images, by name.
      image_size: (H, W).

    Returns:
      `device`; and in `milliseconds`, for each format, the median by the batch size in words.
    """
    generator = np.random.default_rng(0)
    batches = [
        generator.integers(0, 256, (batch_size, *image_size, 3), np.uint8)
        for batch_size in BATCH_SIZES
    ]
    return {
        'device': workdir.device_name(),
        'milliseconds': {
            name: {str(len(images)): _median(predict, images) for images in batches}
            for name, predict in formats.items()
        },
    }


def _median(predict: Predict, images: np.ndarray) -> float:
    # The first call compiles.
    np.asarray(predict(images))
    times, started = [], time.perf_counter()
    while len(times) < 3 or (
        len(times) < _REPETITIONS and time.perf_counter() - started < _SECONDS
    ):
        before = time.perf_counter()
        np.asarray(predict(images))
        times.append(1000 * (time.perf_counter() - before))
    return statistics.median(times)
