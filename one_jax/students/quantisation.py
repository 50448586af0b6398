"""Storing weights in fewer bits than they are computed with.

`float16` and `bfloat16` halve the kernels, `int8` quarters them: symmetric, weights only, with one
scale for each output channel. Reading converts all of them to float32, so they save space and no
time. Vectors (normalisations, their statistics, biases) stay float32: they are a few percent of the
bytes, and running variances may exceed float16's range.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from one_jax.errors import require

TYPES = {'float32': np.float32, 'float16': np.float16, 'bfloat16': jnp.bfloat16, 'int8': np.int8}
_SCALE = '_scale'


def encode(state_dict: Mapping[str, np.ndarray], weights: str) -> dict[str, np.ndarray]:
    """Stores the kernels of a float32 state dict as `weights`, one of `TYPES`.

    With int8, a kernel [out, ...] called `NAME` is the product of `NAME` and `NAME_scale` [out].
    Raises `ConfigError` if a weight is too large for float16.
    """
    encoded = {}
    for name, array in state_dict.items():
        if array.ndim < 2 or weights == 'float32':
            encoded[name] = array
        elif weights == 'int8':
            largest = np.abs(array).max(axis=tuple(range(1, array.ndim)))
            # Any scale suits a channel of zeros.
            scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
            encoded[name] = np.rint(array / _broadcast(scale, array)).astype(np.int8)
            encoded[name + _SCALE] = scale
        else:
            with np.errstate(over='ignore'):
                encoded[name] = array.astype(TYPES[weights])
            finite = np.isfinite(encoded[name]).all()
            require(finite, 'weights', weights, f'bfloat16 or float32: {name} overflows')
    return encoded


def _broadcast(scale: np.ndarray, array: np.ndarray) -> np.ndarray:
    return scale.reshape(-1, *(1,) * (array.ndim - 1))


def decode(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inverts `encode`, up to rounding: all floats become float32.

    Raises `ConfigError` if an int8 kernel has no scale, or one of another shape.
    """
    decoded = {}
    for name, array in state_dict.items():
        if name.endswith(_SCALE) and name.removesuffix(_SCALE) in state_dict:
            continue
        if array.dtype == np.int8:
            scale, shape = state_dict.get(name + _SCALE), array.shape[:1]
            found = None if scale is None else scale.shape
            require(found == shape, f'the shape of {name}{_SCALE}', found, f'{shape}')
            array = array.astype(np.float32) * _broadcast(scale, array)
        elif array.dtype in (np.float16, jnp.bfloat16):
            array = array.astype(np.float32)
        decoded[name] = array
    return decoded
