"""Crops, flips and normalisation against a second implementation in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from one_jax.data import augment


def numpy_crop_and_flip(
    images: np.ndarray, offsets: np.ndarray, flips: np.ndarray, padding: int
) -> np.ndarray:
    """The definition, pixel by pixel."""
    result = np.zeros_like(images)
    _, height, width, _ = images.shape
    for n, row, column in np.ndindex(images.shape[:3]):
        source_column = width - 1 - column if flips[n] else column
        i = row + offsets[n, 0] - padding
        j = source_column + offsets[n, 1] - padding
        if 0 <= i < height and 0 <= j < width:
            result[n, row, column] = images[n, i, j]
    return result


def random_images(count: int, height: int = 6, width: int = 5, channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(1, 256, (count, height, width, channels), np.uint8)


@pytest.mark.parametrize('padding', [0, 1, 4])
@pytest.mark.parametrize('crop', [augment.crop_and_flip, augment.crop_and_flip_by_products])
def test_crop_and_flip_at_every_offset_equals_the_definition(crop, padding):
    offsets = np.array(list(np.ndindex(2 * padding + 1, 2 * padding + 1)) * 2, np.int32)
    flips = np.arange(len(offsets)) < len(offsets) // 2
    images = random_images(len(offsets))
    result = jax.jit(crop, static_argnums=3)(images, offsets, flips, padding)
    assert result.dtype == jnp.uint8
    np.testing.assert_array_equal(result, numpy_crop_and_flip(images, offsets, flips, padding))


def test_crop_and_flip_at_the_centre_only_mirrors():
    images = random_images(4)
    centre, flips = np.full((4, 2), 3, np.int32), np.ones(4, bool)
    np.testing.assert_array_equal(augment.crop_and_flip(images, centre, ~flips, 3), images)
    mirrored = augment.crop_and_flip(images, centre, flips, 3)
    np.testing.assert_array_equal(mirrored, images[:, :, ::-1])
    np.testing.assert_array_equal(augment.crop_and_flip(mirrored, centre, flips, 3), images)


def test_draw_crops_is_uniform_and_flips_half():
    padding, draws = 2, 20_000
    offsets, flips = augment.draw_crops(jax.random.key(0), draws, padding, flip=True)
    assert offsets.dtype == jnp.int32
    assert flips.dtype == jnp.bool_
    side = 2 * padding + 1
    cells = np.bincount(np.asarray(offsets) @ [side, 1], minlength=side**2)
    assert len(cells) == side**2
    expected = draws / side**2
    # Chi-square with 24 degrees of freedom: below 51 but once in a thousand.
    assert ((cells - expected) ** 2 / expected).sum() < 51
    assert abs(np.mean(flips) - 0.5) < 4 * 0.5 / np.sqrt(draws)
    # Flips do not go with offsets.
    for axis in range(2):
        assert abs(np.corrcoef(offsets[:, axis], flips)[0, 1]) < 4 / np.sqrt(draws)


def test_draw_crops_without_flip_draws_the_same_offsets():
    offsets, flips = augment.draw_crops(jax.random.key(0), 64, 4, flip=True)
    unflipped_offsets, no_flips = augment.draw_crops(jax.random.key(0), 64, 4, flip=False)
    np.testing.assert_array_equal(offsets, unflipped_offsets)
    assert flips.any()
    assert not no_flips.any()
    other, _ = augment.draw_crops(jax.random.key(1), 64, 4, flip=True)
    assert (other != offsets).any()


def test_crop_and_flip_on_several_devices_equals_one_device():
    images = random_images(8)

    def augmented(num_devices: int) -> np.ndarray:
        mesh = jax.make_mesh((num_devices,), ('data',), axis_types=(AxisType.Auto,))
        batch = PartitionSpec('data')
        crop = jax.shard_map(
            lambda *arrays: augment.crop_and_flip(*arrays, padding=2),
            mesh=mesh,
            in_specs=(batch, batch, batch),
            out_specs=batch,
        )

        def step(key: jax.Array) -> jax.Array:
            return crop(images, *augment.draw_crops(key, len(images), 2, flip=True))

        return np.asarray(jax.jit(step)(jax.random.key(3)))

    whole = augmented(1)
    np.testing.assert_array_equal(augmented(4), whole)
    offsets, flips = augment.draw_crops(jax.random.key(3), 8, 2, flip=True)
    np.testing.assert_array_equal(
        augment.crop_and_flip(images[2:4], offsets[2:4], flips[2:4], 2), whole[2:4]
    )


def test_normalise_of_every_pixel_value_equals_the_definition():
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    images = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(1, 16, 16, 3)
    expected = (images / 255 - np.array(mean).reshape(1, 1, 1, 3)) / np.array(std).reshape(
        1, 1, 1, 3
    )
    result = augment.normalise(images, mean, std, jnp.float32)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, atol=1e-6)
    half = augment.normalise(images, mean, std, 'bfloat16')
    assert half.dtype == jnp.bfloat16
    # Rounded once, from float32.
    np.testing.assert_array_equal(half, result.astype(jnp.bfloat16))
