"""Augmentation on the device: crop, flip, normalise, mixup and CutMix; pure functions to be jitted.

Random choices are drawn for the whole (global) batch, separately from their application: devices
crop their own share of the images, and the result does not depend on the number of devices.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


def draw_crops(
    key: jax.Array, batch_size: int, padding: int, flip: bool
) -> tuple[jax.Array, jax.Array]:
    """Draws where to crop each of B images, and whether to mirror it.

    Returns:
      Offsets int32 [B, 2] (row, column), uniform over 0 to 2 * padding, where `padding` is the
      centre; and flips bool [B], half of them true, or none unless `flip`.
    """
    offset_key, flip_key = jax.random.split(key)
    offsets = jax.random.randint(offset_key, (batch_size, 2), 0, 2 * padding + 1, jnp.int32)
    flips = jax.random.bernoulli(flip_key, shape=(batch_size,))
    return offsets, flips if flip else jnp.zeros_like(flips)


def crop_and_flip(
    images: jax.Array, offsets: jax.Array, flips: jax.Array, padding: int
) -> jax.Array:
    """Pads with zeros, crops to the original size at the offsets, then mirrors left to right.

    Takes uint8 [b, H, W, C] and what `draw_crops` returns for these images. Padding is black, not
    the mean: it precedes normalisation, as in the reference code. Vmapped slices compile to one
    gather, which was faster on CPU than products with one-hot matrices and than a cascade of shifts
    by powers of two.
    """
    sides = (padding, padding)
    padded = jnp.pad(images, ((0, 0), sides, sides, (0, 0)))

    def crop(image: jax.Array, offset: jax.Array, flipped: jax.Array) -> jax.Array:
        start = (offset[0], offset[1], jnp.zeros_like(offset[0]))
        window = jax.lax.dynamic_slice(image, start, images.shape[1:])
        return jnp.where(flipped, window[:, ::-1], window)

    return jax.vmap(crop)(padded, offsets, flips)


def crop_and_flip_by_products(
    images: jax.Array, offsets: jax.Array, flips: jax.Array, padding: int
) -> jax.Array:
    """Does what `crop_and_flip` does, exactly, by products with one-hot matrices.

    For TPU, where a gather is a loop over the images. bfloat16 holds the numbers 0 to 255.
    """
    _, height, width, _ = images.shape
    columns = jnp.arange(width)
    columns = jnp.where(flips[:, None], columns[::-1][None], columns[None])
    rows = jnp.broadcast_to(jnp.arange(height), (len(images), height))

    def one_hot(indices: jax.Array, offset: jax.Array, size: int) -> jax.Array:
        # All zeros, which is black, where the window leaves the image.
        return jax.nn.one_hot(indices + offset[:, None] - padding, size, dtype=jnp.bfloat16)

    images = images.astype(jnp.bfloat16)
    cropped = jnp.einsum('biy,byxc->bixc', one_hot(rows, offsets[:, 0], height), images)
    cropped = jnp.einsum('bjx,bixc->bijc', one_hot(columns, offsets[:, 1], width), cropped)
    return cropped.astype(jnp.uint8)


def normalise(
    images: jax.Array, mean: Sequence[float], std: Sequence[float], dtype: DTypeLike
) -> jax.Array:
    """Scales pixels to [0, 1], subtracts the mean and divides by the standard deviation.

    Takes uint8 [b, H, W, C], and statistics of the C channels on the [0, 1] scale. Computes in
    float32 at least, and returns `dtype`.
    """
    compute_dtype = jnp.promote_types(dtype, jnp.float32)
    mean, std = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    scale = jnp.asarray(1 / (255 * std), compute_dtype).reshape(1, 1, 1, -1)
    shift = jnp.asarray(mean / std, compute_dtype).reshape(1, 1, 1, -1)
    return (images.astype(compute_dtype) * scale - shift).astype(dtype)


def draw_box(key: jax.Array, ratio: jax.Array, height: int, width: int) -> jax.Array:
    """Draws which pixels an image keeps, bool [height, width] (Yun et al. 2019, equation 2).

    The partner's box has the share 1 - `ratio` of the image's area and a uniformly random centre;
    the image clips it, so it may be smaller.
    """
    side = jnp.sqrt(1 - ratio)
    centre = jax.random.uniform(key, (2,))

    def inside(position: jax.Array, size: int) -> jax.Array:
        middle = jnp.floor(position * size)
        half = jnp.floor(side * size) / 2
        pixels = jnp.arange(size)
        return (pixels >= jnp.floor(middle - half)) & (pixels < jnp.floor(middle + half))

    box = inside(centre[0], height)[:, None] & inside(centre[1], width)[None, :]
    return ~box


def mix(
    key: jax.Array,
    images: jax.Array,
    partners: jax.Array,
    mixup_alpha: float,
    cutmix_alpha: float,
) -> tuple[jax.Array, jax.Array]:
    """Mixes a batch with its partners by one ratio (mixup, Zhang et al. 2018; CutMix, Yun et al.).

    Args:
      key: a JAX random key, the same on every device.
      images: [B, H, W, C], floating.
      partners: the same shape.
      mixup_alpha: parameter of mixup's Beta distribution; 0 for no mixup.
      cutmix_alpha: parameter of CutMix's; 0 for no CutMix. One at least is above 0; with both, each
        batch takes one of the two at random.

    Returns:
      Images [B, H, W, C], and the share of each image's own label, a scalar.
    """
    choice_key, mixup_key, cutmix_key, box_key = jax.random.split(key, 4)
    _, height, width, _ = images.shape
    # The share of itself that every pixel keeps.
    candidates = []
    if mixup_alpha > 0:
        ratio = jax.random.beta(mixup_key, mixup_alpha, mixup_alpha, dtype=jnp.float32)
        candidates.append(jnp.full((height, width), ratio))
    if cutmix_alpha > 0:
        ratio = jax.random.beta(cutmix_key, cutmix_alpha, cutmix_alpha, dtype=jnp.float32)
        candidates.append(draw_box(box_key, ratio, height, width).astype(jnp.float32))
    own = candidates[0]
    if len(candidates) == 2:
        own = jnp.where(jax.random.bernoulli(choice_key), *candidates)
    share = own.astype(images.dtype)[None, :, :, None]
    return images * share + partners * (1 - share), own.mean()
