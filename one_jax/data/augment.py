"""Augmentation on the device: pad, crop, flip, normalise; pure functions to be jitted.

The random choices are drawn apart from their application, for the whole (global) batch: devices
then crop their own share of the images, and the result does not depend on how many they are.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


def draw_crops(
    key: jax.Array, batch_size: int, padding: int, flip: bool
) -> tuple[jax.Array, jax.Array]:
    """Draws where to crop each image, and whether to flip it.

    Args:
      key: a JAX random key.
      batch_size: B, of the global batch.
      padding: pixels of zeros around an image.
      flip: whether half of the images are mirrored, left to right.

    Returns:
      Offsets int32 [B, 2] (row, column), uniform over 0 to 2 * padding, of which `padding` is the
      centre; and flips bool [B].
    """
    offset_key, flip_key = jax.random.split(key)
    offsets = jax.random.randint(offset_key, (batch_size, 2), 0, 2 * padding + 1, jnp.int32)
    if flip:
        flips = jax.random.bernoulli(flip_key, shape=(batch_size,))
    else:
        flips = jnp.zeros((batch_size,), bool)
    return offsets, flips


def crop_and_flip(
    images: jax.Array, offsets: jax.Array, flips: jax.Array, padding: int
) -> jax.Array:
    """Pads with zeros, crops to the former size at the offsets, then mirrors left to right.

    The zeros are black, not the mean: padding comes before normalisation, as in the reference.

    Vmapped slices are one gather; on a CPU they were the fastest form, before products with one-hot
    matrices and a cascade of shifts by powers of two.

    Args:
      images: uint8 [b, H, W, C].
      offsets: int [b, 2], each 0 to 2 * padding.
      flips: bool [b].
      padding: pixels of zeros on every side.

    Returns:
      uint8 [b, H, W, C].
    """
    sides = (padding, padding)
    padded = jnp.pad(images, ((0, 0), sides, sides, (0, 0)))

    def crop(image: jax.Array, offset: jax.Array, flipped: jax.Array) -> jax.Array:
        start = (offset[0], offset[1], jnp.zeros_like(offset[0]))
        window = jax.lax.dynamic_slice(image, start, images.shape[1:])
        return jnp.where(flipped, window[:, ::-1], window)

    return jax.vmap(crop)(padded, offsets, flips)


def normalise(
    images: jax.Array, mean: Sequence[float], std: Sequence[float], dtype: DTypeLike
) -> jax.Array:
    """Scales pixels to [0, 1], subtracts the mean and divides by the standard deviation.

    Computed in float32 at least, whatever the result's dtype.

    Args:
      images: uint8 [b, H, W, C].
      mean: of the C channels, on the [0, 1] scale.
      std: of the C channels, on the [0, 1] scale.
      dtype: of the result.

    Returns:
      dtype [b, H, W, C].
    """
    compute_dtype = jnp.promote_types(dtype, jnp.float32)
    mean, std = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    scale = jnp.asarray(1 / (255 * std), compute_dtype).reshape(1, 1, 1, -1)
    shift = jnp.asarray(mean / std, compute_dtype).reshape(1, 1, 1, -1)
    return (images.astype(compute_dtype) * scale - shift).astype(dtype)
