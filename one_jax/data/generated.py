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
    squares = _random_bytes(
        0, _PROTOTYPE_STREAM, (num_classes, _SQUARES_PER_SIDE, _SQUARES_PER_SIDE, image_shape[-1])
    )
    return {
        'train': _draw(squares, image_shape, num_train, seed, _TRAIN_STREAM),
        'test': _draw(squares, image_shape, num_test, seed, _TEST_STREAM),
    }


def _draw(
    squares: np.ndarray, image_shape: tuple[int, int, int], count: int, seed: int, stream: int
) -> Examples:
    """Examples of the classes whose squares are uint8 [C, side, side, channels]."""
    labels = np.arange(count, dtype=np.int32) % len(squares)
    images = _random_bytes(seed, stream, (count, *image_shape)) // 2
    height, width, _ = image_shape
    rows = np.arange(height) * _SQUARES_PER_SIDE // height
    columns = np.arange(width) * _SQUARES_PER_SIDE // width
    # Only the drawn classes are enlarged: a thousand large prototypes would not be cheap.
    images += squares[labels][:, rows[:, None], columns] // 2
    return Examples(images, labels)


def _random_bytes(seed: int, stream: int, shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape))
    return random_bits(seed, stream, -(-size // 8)).view(np.uint8)[:size].reshape(shape)
