"""Mixup and CutMix: each image is combined with a partner, and so are their labels."""

import jax
import jax.numpy as jnp


def draw_ratio(key: jax.Array, alpha: float) -> jax.Array:
    """The share of the image itself, against its partner's: Beta(alpha, alpha), a scalar."""
    return jax.random.beta(key, alpha, alpha, dtype=jnp.float32)


def draw_box(key: jax.Array, ratio: jax.Array, height: int, width: int) -> jax.Array:
    """The pixels that stay the image's own, bool [height, width] (Yun et al. 2019, equation 2).

    The partner's box has the share 1 - `ratio` of the image's area and a uniformly random centre;
    what lies outside of the image is cut off, so the box may turn out smaller.

    Args:
      key: a JAX random key.
      ratio: in [0, 1].
      height: H.
      width: W.
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
    """Mixes a batch with its partners, all by one ratio (Zhang et al. 2018; Yun et al. 2019).

    With both alphas above 0 one of the two is tossed up for the batch.

    Args:
      key: a JAX random key, the same on every device.
      images: [B, H, W, C], floating.
      partners: the same shape.
      mixup_alpha: of mixup's Beta distribution; 0 for no mixup.
      cutmix_alpha: of CutMix's; 0 for no CutMix.

    Returns:
      Images [B, H, W, C], and the share of each image's own label, a scalar.
    """
    choice_key, mixup_key, cutmix_key, box_key = jax.random.split(key, 4)
    _, height, width, _ = images.shape
    own = jnp.ones((height, width), jnp.float32)
    candidates = []
    if mixup_alpha > 0:
        candidates.append(own * draw_ratio(mixup_key, mixup_alpha))
    if cutmix_alpha > 0:
        ratio = draw_ratio(cutmix_key, cutmix_alpha)
        candidates.append(draw_box(box_key, ratio, height, width).astype(jnp.float32))
    if len(candidates) == 2:
        own = jnp.where(jax.random.bernoulli(choice_key), *candidates)
    elif candidates:
        (own,) = candidates
    share = own.astype(images.dtype)[None, :, :, None]
    return images * share + partners * (1 - share), own.mean()
