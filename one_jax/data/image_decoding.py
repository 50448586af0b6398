"""Opens, turns, converts and resizes images: in memory, in streams and for predictions alike."""

import contextlib
import io
import re
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

# Decoders that only decode. Pillow has others: it would run the program in a PostScript file.
FORMATS = ('PNG', 'JPEG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'PPM', 'ICO')
# Pixels of an image; decoding and turning more takes gigabytes of memory in every thread.
MAX_PIXELS = 2**26
# Pillow warns of images near its own higher limit, and of odd files: our errors name them.
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)
warnings.filterwarnings('ignore', module=r'PIL\.')
# Bytes without which an image has no orientation: a quick look saves parsing most files.
_ORIENTATION_MARKS = (b'Exif', b'EXIF', b'eXIf', b'exif', b'Orientation', b'XML:com.adobe.xmp')
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(file: io.BytesIO) -> Image.Image:
    """Opens an image without decoding it; no other function of this package opens images.

    Raises:
      Exception: it has more than `MAX_PIXELS`; readers of damaged files raise anything.
    """
    try:
        image = Image.open(file, formats=FORMATS)
        count = image.width * image.height
    except UnidentifiedImageError:
        raise UnidentifiedImageError(
            f'cannot identify image file: not {", ".join(FORMATS)}'
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        count = int(re.search(r'\d+', str(error))[0])
    if count > MAX_PIXELS:
        raise ValueError(
            f'it has {count} pixels, more than {MAX_PIXELS}: make it smaller, such as 8192x8192'
        )
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any mode to RGB; drops transparency, and reduces 16 bits of grey to 8."""
    low, high = image.getextrema() if image.mode == 'I' else (0, 0)
    if image.mode == 'F' or low < 0 or high >= 2**16:
        raise ValueError('its pixels have more than 16 bits: save it with 8 bits per channel')
    if image.mode.startswith('I'):
        # PIL would clip the values at 255.
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    elif 'transparency' in image.info:
        # Avoids PIL's warning about converting a palette with transparency directly.
        image = image.convert('RGBA')
    return image.convert('RGB')


def upright(data: bytes) -> bytes:
    """Returns an encoded image, turned as its EXIF data says (then encoded as BMP, losslessly).

    Images without a readable orientation, damaged ones among them, are returned as they are.
    """
    if any(mark in data for mark in _ORIENTATION_MARKS):
        with contextlib.suppress(Exception), open_image(io.BytesIO(data)) as image:
            # Some formats have it behind the pixels; loading turns a TIFF.
            if image.format != 'JPEG':
                image.load()
            method = _TRANSPOSITIONS.get(image.getexif().get(ExifTags.Base.Orientation))
            if method is not None:
                return encode(to_rgb(image.transpose(method)))
    return data


def encode(image: Image.Image) -> bytes:
    """Encodes an RGB image quickly and without loss."""
    data = io.BytesIO()
    image.save(data, 'BMP')
    return data.getvalue()


def decode(data: bytes, size: tuple[int, int] | None = None, crop: float = 1.0) -> np.ndarray:
    """Decodes an image, uint8 [H, W, 3]; ignores its EXIF data, as TensorFlow does.

    With a `size` (H, W), crops the centre, whose shorter side is the share `crop` of the image's,
    and resizes it (bilinear, antialiased).

    Raises:
      Exception: decoders of damaged files raise anything.
    """
    with open_image(io.BytesIO(data)) as file:
        image = to_rgb(file)
    if size:
        # Crops and resizes at once, which differs by rounding only.
        bleed = (1 - crop) / 2
        image = ImageOps.fit(image, size[::-1], Image.Resampling.BILINEAR, bleed=bleed)
    return np.asarray(image)


def read_image(path: Path, size: tuple[int, int] | None = None, crop: float = 1.0) -> np.ndarray:
    """Reads one image file upright, otherwise as `decode` does: in memory, streams and predict."""
    return decode(upright(path.read_bytes()), size, crop)
