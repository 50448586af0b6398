"""Encoded images to pixels of one size, as a TensorFlow graph: crops, decoding, resizing.

TensorFlow decodes grey and colour JPEGs, nearly all there are; for training, only the part inside
the crop. PIL decodes the few others (CMYK JPEGs; the PNG that ImageNet has under a JPEG's name).
Both give the same pixels: libjpeg's accurate transform costs nothing here.

Evaluation resizes bilinearly with antialiasing, as torchvision resizes PIL images. Training skips
antialiasing, which would take longer than decoding: the JPEG transform itself reduces crops of at
least twice the wanted size by 2, 4 or 8, rounding their edges to the reduced image's pixels, which
leaves less than a factor of two to bilinear resizing (up to sixteen times the wanted size).
"""

import contextlib
import functools
from types import ModuleType
from typing import Any

import numpy as np

from one_jax.data import image_decoding
from one_jax.data.table import EVALUATION_CROP
from one_jax.errors import explain

# Random-resized crop (Szegedy et al. 2015, as in torchvision).
CROP_AREA = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
# Factors by which libjpeg can reduce an image while decoding it.
_JPEG_RATIOS = (1, 2, 4, 8)
# Random words per image: four per attempt, one for the flip, and three unused because Philox
# generates four at a time.
_WORDS = 4 * CROP_ATTEMPTS + 4
# Streams of random bits, one per epoch, apart from those of the orders: see `batches.random_bits`.
_STREAM = 2**63 + 2**32


def import_tensorflow() -> ModuleType:
    """Imports TensorFlow, and keeps it from taking the accelerator's memory, which is JAX's.

    Raises:
      UserError: TensorFlow is not installed.
    """
    purpose = 'TensorFlow reads streamed images and TFRecord files'
    with explain(f"{purpose}, pip install 'one_jax[tensorflow]'", ImportError):
        import tensorflow
    # Fails where TensorFlow is already in use; then its devices are the caller's choice.
    with contextlib.suppress(RuntimeError):
        tensorflow.config.set_visible_devices([], 'GPU')
    return tensorflow


def draw_crops(seed: int, epoch: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws candidate crops and flips for n images at the places from `start` on in an epoch.

    The draw for a place depends on (seed, epoch, place) alone.

    Returns:
      Candidates float64 [n, 10, 4]: height and width relative to the square root of the image's
      area, then top and left in [0, 1) relative to the free space; and flips bool [n].
    """
    generator = np.random.Philox(
        key=np.array([seed, _STREAM + epoch], np.uint64), counter=start * _WORDS // 4
    )
    words = generator.random_raw(count * _WORDS).reshape(count, _WORDS)
    # Takes the upper 53 bits of each word, the precision of a float64.
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
    """Returns the first candidate that fits into an image, or else the largest centre crop.

    Takes int32 scalars and float64 candidates [10, 4] from `draw_crops`; returns int32 [4]: top,
    left, height and width in pixels.
    """
    tf = import_tensorflow()
    size = tf.cast(tf.stack([height, width]), tf.float64)
    sides = tf.round(tf.sqrt(size[0] * size[1]) * candidates[:, :2])
    fits = tf.reduce_all((sides > 0) & (sides <= size), axis=1)
    chosen = tf.argmax(fits)

    corner = tf.floor(candidates[chosen, 2:] * (size - sides[chosen] + 1))
    random_crop = tf.concat([corner, sides[chosen]], axis=0)
    # Cuts the longer side of images more elongated than the ratios allow.
    limits = tf.stack([size[1] / CROP_RATIO[0], size[0] * CROP_RATIO[1]])
    largest = tf.minimum(size, tf.round(limits))
    centre_crop = tf.concat([(size - largest) // 2, largest], axis=0)
    return tf.cast(tf.where(fits[chosen], random_crop, centre_crop), tf.int32)


def training_image(encoded: Any, candidates: Any, flip: Any, image_size: int) -> Any:
    """Returns a random-resized crop of an encoded image, uint8 [S, S, 3], mirrored if `flip`.

    Takes one image's `candidates` [10, 4] and `flip` from `draw_crops`.
    """
    tf = import_tensorflow()
    size = (image_size, image_size)

    def plain_jpeg(shape: Any) -> Any:
        box = choose_crop(shape[0], shape[1], candidates)
        shrink = tf.reduce_min(box[2:]) // image_size

        def reduced(ratio: int) -> Any:
            return tf.io.decode_and_crop_jpeg(
                encoded, box // ratio, channels=3, ratio=ratio, dct_method='INTEGER_ACCURATE'
            )

        branches = [functools.partial(reduced, ratio) for ratio in _JPEG_RATIOS]
        choice = tf.reduce_sum([tf.cast(shrink >= ratio, tf.int32) for ratio in _JPEG_RATIOS[1:]])
        return _resize(tf.switch_case(choice, branches), size, antialias=False)

    def other() -> Any:
        image = _decode_with_pil(encoded)
        shape = tf.shape(image)
        top, left, height, width = tf.unstack(choose_crop(shape[0], shape[1], candidates))
        return _resize(image[top : top + height, left : left + width], size, antialias=True)

    image = tf.ensure_shape(_decode(encoded, plain_jpeg, other), (*size, 3))
    return tf.cond(flip, lambda: tf.reverse(image, [1]), lambda: image)


def evaluation_image(encoded: Any, image_size: int, crop: float | None = None) -> Any:
    """Resizes the shorter side to `image_size` / 0.875; returns the centre, uint8 [S, S, 3].

    With a `crop`, returns exactly what `image_decoding.decode` does.
    """
    tf = import_tensorflow()
    if crop is not None:
        size = (image_size, image_size)
        return tf.ensure_shape(_decode_with_pil(encoded, size=size, crop=crop), (*size, 3))

    image = _decode(
        encoded,
        lambda _: tf.io.decode_jpeg(encoded, channels=3, dct_method='INTEGER_ACCURATE'),
        lambda: _decode_with_pil(encoded),
    )
    shape = tf.shape(image)[:2]
    side = round(image_size / EVALUATION_CROP)
    # Rounds the longer side down, as torchvision does.
    shape = side * shape // tf.reduce_min(shape)
    top, left = tf.unstack(tf.cast(tf.round(tf.cast(shape - image_size, tf.float64) / 2), tf.int32))
    image = _resize(image, shape, antialias=True)[top : top + image_size, left : left + image_size]
    return tf.ensure_shape(image, (image_size, image_size, 3))


def _decode(encoded: Any, plain_jpeg: Any, other: Any) -> Any:
    """Returns `plain_jpeg(shape)` for a grey or colour JPEG, `other()` for all else."""
    tf = import_tensorflow()

    def jpeg() -> Any:
        shape = tf.image.extract_jpeg_shape(encoded)
        # PIL raises for images that are too large.
        small = tf.reduce_prod(tf.cast(shape[:2], tf.int64)) <= image_decoding.MAX_PIXELS
        return tf.cond(small & (shape[2] <= 3), lambda: plain_jpeg(shape), other)

    return tf.cond(tf.io.is_jpeg(encoded), jpeg, other)


def _decode_with_pil(encoded: Any, **options: Any) -> Any:
    tf = import_tensorflow()

    def decode(data: bytes) -> np.ndarray:
        with contextlib.suppress(Exception):
            return image_decoding.decode(data, **options)
        # An error in the next operation, of which TensorFlow prints no traceback.
        return np.empty((0, 0, 3), np.uint8)

    image = tf.numpy_function(decode, [encoded], tf.uint8, stateful=False)
    return tf.ensure_shape(image, (None, None, 3))


def _resize(image: Any, size: Any, antialias: bool) -> Any:
    tf = import_tensorflow()
    resized = tf.image.resize(image, size, method='bilinear', antialias=antialias)
    # Means of values from 0 to 255 need no saturation.
    return tf.cast(resized + 0.5, tf.uint8)
