"""Generated images in place of a data set: its shape and classes, and no files."""

import numpy as np

from one_jax.data.resident import Examples, random_bits

# A class prototype is this many rows, and as many columns, of squares of one colour.
_SQUARES_PER_SIDE = 4
_PROTOTYPE_STREAM, _TRAIN_STREAM, _TEST_STREAM = (2**63 + i for i in range(3))


def generate(
    image_shape: tuple[int, int, int], num_classes: int, num_train: int, num_test: int, seed: int
) -> dict[str, Examples]:
    """Images that can be learnt: half the prototype of the class, half noise.

    A prototype is a coarse pattern of coloured squares, which small crops leave recognisable. The
    prototypes are the same for every seed.

    Args:
      image_shape: (H, W, C).
      num_classes: labels are 0, 1, ... in turn, so classes differ by one example at most.
      num_train: images of the split 'train'.
      num_test: images of the split 'test'.
      seed: of the noise.

    Returns:
      The splits 'train' and 'test'.
    """
    prototypes = _prototypes(image_shape, num_classes)
    return {
        'train': _draw(prototypes, num_train, seed, _TRAIN_STREAM),
        'test': _draw(prototypes, num_test, seed, _TEST_STREAM),
    }


def _prototypes(image_shape: tuple[int, int, int], num_classes: int) -> np.ndarray:
    """One image of each class, uint8 [num_classes, H, W, C]."""
    height, width, channels = image_shape
    grid = (num_classes, _SQUARES_PER_SIDE, _SQUARES_PER_SIDE, channels)
    squares = _random_bytes(0, _PROTOTYPE_STREAM, grid)
    rows = np.arange(height) * _SQUARES_PER_SIDE // height
    columns = np.arange(width) * _SQUARES_PER_SIDE // width
    return squares[:, rows[:, None], columns]


def _draw(prototypes: np.ndarray, count: int, seed: int, stream: int) -> Examples:
    labels = np.arange(count, dtype=np.int32) % len(prototypes)
    images = _random_bytes(seed, stream, (count, *prototypes.shape[1:])) // 2
    images += prototypes[labels] // 2
    return Examples(images, labels)


def _random_bytes(seed: int, stream: int, shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape))
    return random_bits(seed, stream, -(-size // 8)).view(np.uint8)[:size].reshape(shape)
