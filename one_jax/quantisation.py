"""Weights stored in fewer bits than they are computed with.

`float16` and `bfloat16` halve the kernels. `int8` takes a quarter: symmetric, one scale for each
output channel, weights only. All are made float32 again when they are read, so they save space and
no time. Vectors (normalisations, their statistics, biases) stay float32: they are a few percent of
the bytes, and running variances may be out of float16's range.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from one_jax.errors import ConfigError, UserError

TYPES = {
    'float32': np.float32,
    'float16': np.float16,
    'bfloat16': jnp.bfloat16,
    'int8': np.int8,
}
_SCALE = '_scale'


def encode(state_dict: Mapping[str, np.ndarray], weights: str) -> dict[str, np.ndarray]:
    """A float32 state dict with its kernels stored as `weights`, one of `TYPES`.

    Of int8, `NAME_scale` [out] stands beside a kernel [out, ...] called `NAME`; the kernel is
    their product.

    Raises:
      ConfigError: a weight is too large for float16.
    """
    encoded = {}
    for name, array in state_dict.items():
        if array.ndim < 2 or weights == 'float32':
            encoded[name] = array
        elif weights == 'int8':
            encoded[name], encoded[name + _SCALE] = _quantise(array)
        else:
            with np.errstate(over='ignore'):
                encoded[name] = array.astype(TYPES[weights])
            if not np.isfinite(encoded[name]).all():
                raise ConfigError('weights', weights, f'bfloat16 or float32: {name} overflows')
    return encoded


def _quantise(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    largest = np.abs(array).max(axis=tuple(range(1, array.ndim)))
    # A channel of zeros has any scale.
    scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return np.rint(array / _beside(scale, array)).astype(np.int8), scale


def _beside(scale: np.ndarray, array: np.ndarray) -> np.ndarray:
    return scale.reshape(-1, *(1,) * (array.ndim - 1))


def decode(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `encode`, up to rounding: all floats are float32.

    Raises:
      UserError: an int8 kernel has no scale, or one of another shape.
    """
    decoded = {}
    for name, array in state_dict.items():
        if name.endswith(_SCALE) and name.removesuffix(_SCALE) in state_dict:
            continue
        if array.dtype == np.int8:
            scale = state_dict.get(name + _SCALE)
            if scale is None or scale.shape != array.shape[:1]:
                found = 'missing' if scale is None else f'of shape {scale.shape}'
                raise UserError(
                    f'the weights are damaged: {name}{_SCALE}, of shape {array.shape[:1]}, is '
                    f'{found}'
                )
            array = array.astype(np.float32) * _beside(scale, array)
        elif array.dtype in (np.float16, jnp.bfloat16):
            array = array.astype(np.float32)
        decoded[name] = array
    return decoded
