"""Encoded images to pixels of one size, as a TensorFlow graph: crops, decoding, resizing.

Grey and colour JPEGs, nearly all there are, are decoded by TensorFlow, for training only the part
inside of the crop. The few others (CMYK JPEGs; the PNG that ImageNet has under a JPEG's name) go
through PIL. Both give the same pixels: libjpeg's accurate transform costs nothing here.

Evaluation resizes bilinearly with antialiasing, as torchvision does PIL images. Training does so
without antialiasing, which would take longer than decoding: crops of twice the wanted size or
more are reduced by 2, 4 or 8 in the JPEG's own transform, which leaves less than a factor of two to
bilinear resizing (up to sixteen times the wanted size). A reduced crop's edges are rounded to the
reduced image's pixels.
"""

import contextlib
import functools
import io
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from one_jax.errors import UserError

# Random-resized crop (Szegedy et al. 2015, as torchvision has it).
CROP_AREA = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
# By how much libjpeg can reduce an image while it decodes it.
_JPEG_RATIOS = (1, 2, 4, 8)
# The centre crop of evaluation is this share of the resized image's shorter side.
EVALUATION_CROP = 0.875
# Random words of an image: four for each attempt, one for the flip, and three left over because
# Philox makes four at a time.
_WORDS = 4 * CROP_ATTEMPTS + 4
# Streams of random bits, one for each epoch: apart from the orders', see `resident.random_bits`.
_STREAM = 2**63 + 2**32


def import_tensorflow() -> ModuleType:
    """TensorFlow, kept from taking the accelerator's memory, which is JAX's.

    Raises:
      UserError: it is not installed.
    """
    try:
        import tensorflow
    except ImportError as error:
        raise UserError(
            'streamed images and TFRecord files are read by TensorFlow, which is missing: '
            "pip install 'one_jax[tensorflow]'"
        ) from error
    # Too late, and then not ours to change, where TensorFlow is already at work.
    with contextlib.suppress(RuntimeError):
        tensorflow.config.set_visible_devices([], 'GPU')
    return tensorflow


def draw_crops(seed: int, epoch: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws candidate crops, and whether to flip, for images at consecutive places of an epoch.

    What is drawn for a place follows from (seed, epoch, place) alone.

    Args:
      seed: of the run.
      epoch: counted from 0.
      start: the first place in the epoch's order.
      count: n.

    Returns:
      Candidates float64 [n, 10, 4], each height and width relative to the square root of the
      image's area, then top and left in [0, 1) of the room there is; and flips bool [n].
    """
    generator = np.random.Philox(
        key=np.array([seed, _STREAM + epoch], np.uint64), counter=start * _WORDS // 4
    )
    words = generator.random_raw(count * _WORDS).reshape(count, _WORDS)
    # The upper 53 bits of each word, the precision of a float64.
    uniform = (words >> np.uint64(11)) * 2.0**-53
    area, ratio, top, left = np.moveaxis(
        uniform[:, : 4 * CROP_ATTEMPTS].reshape(count, CROP_ATTEMPTS, 4), -1, 0
    )
    area = CROP_AREA[0] + (CROP_AREA[1] - CROP_AREA[0]) * area
    low, high = np.log(CROP_RATIO)
    ratio = np.exp(low + (high - low) * ratio)
    candidates = np.stack([np.sqrt(area / ratio), np.sqrt(area * ratio), top, left], axis=-1)
    return candidates, uniform[:, 4 * CROP_ATTEMPTS] < 0.5


def choose_crop(height: Any, width: Any, candidates: Any) -> Any:
    """The first candidate that fits into the image, or else the largest centre crop.

    Args:
      height: of the image, an int32 scalar tensor.
      width: likewise.
      candidates: float64 [10, 4], from `draw_crops`.

    Returns:
      int32 [4]: top, left, height and width in pixels.
    """
    tf = import_tensorflow()
    size = tf.cast(tf.stack([height, width]), tf.float64)
    sides = tf.round(tf.sqrt(size[0] * size[1]) * candidates[:, :2])
    fits = tf.reduce_all((sides > 0) & (sides <= size), axis=1)
    chosen = tf.argmax(fits)

    def random_crop() -> Any:
        corner = tf.floor(candidates[chosen, 2:] * (size - sides[chosen] + 1))
        return tf.concat([corner, sides[chosen]], axis=0)

    def centre_crop() -> Any:
        # Cuts the longer side of an image that is longer than the ratios allow.
        limits = tf.stack([size[1] / CROP_RATIO[0], size[0] * CROP_RATIO[1]])
        largest = tf.minimum(size, tf.round(limits))
        return tf.concat([(size - largest) // 2, largest], axis=0)

    return tf.cast(tf.cond(fits[chosen], random_crop, centre_crop), tf.int32)


def training_image(encoded: Any, candidates: Any, flip: Any, image_size: int) -> Any:
    """A random-resized crop, perhaps mirrored left to right.

    Args:
      encoded: string scalar tensor.
      candidates: float64 [10, 4], from `draw_crops`.
      flip: bool scalar.
      image_size: S.

    Returns:
      uint8 [S, S, 3].
    """
    tf = import_tensorflow()
    size = (image_size, image_size)

    def plain_jpeg(shape: Any) -> Any:
        box = choose_crop(shape[0], shape[1], candidates)
        shrink = tf.reduce_min(box[2:]) // image_size
        branches = [
            functools.partial(
                tf.io.decode_and_crop_jpeg,
                encoded,
                box // ratio,
                channels=3,
                ratio=ratio,
                dct_method='INTEGER_ACCURATE',
            )
            for ratio in _JPEG_RATIOS
        ]
        choice = tf.reduce_sum([tf.cast(shrink >= ratio, tf.int32) for ratio in _JPEG_RATIOS[1:]])
        return _resize(tf.switch_case(choice, branches), size, antialias=False)

    def other() -> Any:
        image = _decode_with_pil(encoded)
        shape = tf.shape(image)
        top, left, height, width = tf.unstack(choose_crop(shape[0], shape[1], candidates))
        return _resize(image[top : top + height, left : left + width], size, antialias=True)

    image = tf.ensure_shape(_decode(encoded, plain_jpeg, other), (*size, 3))
    return tf.cond(flip, lambda: tf.reverse(image, [1]), lambda: image)


def evaluation_image(encoded: Any, image_size: int) -> Any:
    """The shorter side resized to `image_size` / 0.875, then the centre crop.

    Args:
      encoded: string scalar tensor.
      image_size: S.

    Returns:
      uint8 [S, S, 3].
    """
    tf = import_tensorflow()

    def plain_jpeg(_: Any) -> Any:
        return tf.io.decode_jpeg(encoded, channels=3, dct_method='INTEGER_ACCURATE')

    image = _decode(encoded, plain_jpeg, lambda: _decode_with_pil(encoded))
    shape = tf.shape(image)[:2]
    side = round(image_size / EVALUATION_CROP)
    # The longer side is rounded down, as torchvision does.
    shape = side * shape // tf.reduce_min(shape)
    top, left = tf.unstack(tf.cast(tf.round(tf.cast(shape - image_size, tf.float64) / 2), tf.int32))
    image = _resize(image, shape, antialias=True)[top : top + image_size, left : left + image_size]
    return tf.ensure_shape(image, (image_size, image_size, 3))


def _decode(encoded: Any, plain_jpeg: Any, other: Any) -> Any:
    """`plain_jpeg(shape)` of a grey or colour JPEG, `other()` of all else."""
    tf = import_tensorflow()

    def jpeg() -> Any:
        shape = tf.image.extract_jpeg_shape(encoded)
        return tf.cond(shape[2] <= 3, lambda: plain_jpeg(shape), other)

    return tf.cond(tf.io.is_jpeg(encoded), jpeg, other)


def _decode_with_pil(encoded: Any) -> Any:
    tf = import_tensorflow()

    def decode(data: bytes) -> np.ndarray:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert('RGB'))

    image = tf.numpy_function(decode, [encoded], tf.uint8, stateful=False)
    return tf.ensure_shape(image, (None, None, 3))


def _resize(image: Any, size: Any, antialias: bool) -> Any:
    tf = import_tensorflow()
    resized = tf.image.resize(image, size, method='bilinear', antialias=antialias)
    # Means of values of 0 to 255: nothing to saturate.
    return tf.cast(resized + 0.5, tf.uint8)
