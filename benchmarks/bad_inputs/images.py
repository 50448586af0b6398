"""Image files and folders of images."""

import io
import json
import os
import socket
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.bad_inputs import bases
from benchmarks.bad_inputs.runner import CANARY, COMPILES, Case, shows

_PIXELS = bases.pixels()
# Starts a program if Ghostscript interprets it.
_POSTSCRIPT = f"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 8
(%pipe%touch {CANARY}) (w) file closefile
showpage
%%EOF
""".encode()


def encode(image: Image.Image | np.ndarray, form: str, **options: object) -> bytes:
    """Encodes an image."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    data = io.BytesIO()
    image.save(data, form, **options)
    return data.getvalue()


def _png_chunk(name: bytes, content: bytes) -> bytes:
    checksum = struct.pack('>I', zlib.crc32(name + content))
    return struct.pack('>I', len(content)) + name + content + checksum


def _png(width: int, height: int, content: bytes = b'', chunks: bytes = b'') -> bytes:
    """Encodes a grey PNG of a declared size, whose pixels are `content`."""
    header = _png_chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0))
    pixels = _png_chunk(b'IDAT', zlib.compress(content, 1))
    return b'\x89PNG\r\n\x1a\n' + header + chunks + pixels + _png_chunk(b'IEND', b'')


def _with_exif(jpeg: bytes, content: bytes) -> bytes:
    """Inserts an Exif segment into a JPEG."""
    content = b'Exif\0\0' + content
    return jpeg[:2] + b'\xff\xe1' + struct.pack('>H', len(content) + 2) + content + jpeg[2:]


def _orientation(number: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif.tobytes().removeprefix(b'Exif\0\0')


def damaged_files() -> dict[str, bytes]:
    """Returns files that no reader may take for an image."""
    png, jpeg = encode(_PIXELS, 'PNG'), encode(_PIXELS, 'JPEG')
    whole = {
        'png': png,
        'jpg': jpeg,
        **{form: encode(_PIXELS, form) for form in ('gif', 'bmp', 'webp', 'tiff', 'ppm')},
    }
    files = {f'{name} cut to a half.{name}': data[: len(data) // 2] for name, data in whole.items()}
    files |= {f'{name} header alone.{name}': data[:20] for name, data in whole.items()}
    grey = _PIXELS[..., 0]
    start = png.index(b'IDAT')
    return files | {
        'empty.png': b'',
        'a byte.jpg': b'\xff',
        'text.png': b'not an image\n',
        'page of an error.jpg': b'<!doctype html><title>404</title>',
        'pointer of git-lfs.png': b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n',
        'random.jpg': np.random.default_rng(0).bytes(500),
        'zeros.bmp': bytes(500),
        'vectors.png': b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        'document.png': b'%PDF-1.4\n1 0 obj<<>>endobj\ntrailer<<>>\n%%EOF',
        'postscript.png': _POSTSCRIPT,
        'postscript with a preview.jpg': b'\xc5\xd0\xd3\xc6\x20' + bytes(27) + _POSTSCRIPT,
        'numpy.png': b'\x93NUMPY\x01\x00' + bytes(100),
        'size of zero.png': _png(0, 0),
        'width of zero.png': _png(0, 8),
        'sides of 60,000.png': _png(60_000, 60_000),
        'sides of two billion.png': _png(2**31 - 1, 2**31 - 1),
        'sides of 30,000.bmp': whole['bmp'][:18] + 2 * b'\x30\x75\0\0' + whole['bmp'][26:],
        'sides of 65,535.gif': whole['gif'][:6] + b'\xff\xff\xff\xff' + whole['gif'][10:],
        'sides in billions.ppm': b'P6 9999999999 9999999999 255\n' + bytes(100),
        'no pixels.png': png[: start - 4] + png[-12:],
        'pixels flipped.png': bases.flip((start + 20) / (len(png) - 1), 5)(png),
        'two bytes too few.png': _png(8, 8, bytes(70)),
        'floats.tiff': encode(grey.astype(np.float32), 'TIFF'),
        '32 bits.tiff': encode(grey.astype(np.int32) * 2**20, 'TIFF'),
        'negative.tiff': encode(-grey.astype(np.int32) - 1, 'TIFF'),
    }


def odd_files() -> dict[str, tuple[bytes, np.ndarray | Image.Image]]:
    """Returns files that are read, and the pixels that they show."""
    image, grey = Image.fromarray(_PIXELS), _PIXELS[..., 0]
    jpeg, png = encode(image, 'JPEG'), encode(image, 'PNG')
    decoded = Image.open(io.BytesIO(jpeg)).convert('RGB')
    other = Image.fromarray(bases.pixels(9))
    frames = {'save_all': True, 'append_images': [other]}
    gif, webp = encode(image, 'GIF', **frames), encode(image, 'WEBP', lossless=True, **frames)
    palette, cmyk = image.convert('P'), image.convert('CMYK')
    alpha = Image.fromarray(np.dstack([_PIXELS, grey]))
    text = _png_chunk(b'tEXt', b'Comment\0' + b'x' * 100)
    exif = {number: _with_exif(jpeg, _orientation(number)) for number in (0, 3, 6, 99)}
    cmyk_jpeg = encode(cmyk, 'JPEG')
    return {
        'a jpeg.png': (jpeg, decoded),
        'a png.jpg': (png, image),
        'a gif.bmp': (encode(image, 'GIF'), Image.open(io.BytesIO(gif)).convert('RGB')),
        'capitals.PNG': (png, image),
        'grey.png': (encode(grey, 'PNG'), grey),
        'one bit.png': (encode(image.convert('1'), 'PNG'), image.convert('1')),
        'palette.png': (encode(palette, 'PNG'), palette.convert('RGB')),
        'alpha.png': (encode(alpha, 'PNG'), image),
        '16 bits.png': (encode(grey.astype(np.uint16) * 256 + 77, 'PNG'), grey),
        '16 bits.tiff': (encode(grey.astype(np.uint16) * 256 + 77, 'TIFF'), grey),
        'cmyk.tiff': (encode(cmyk, 'TIFF'), cmyk.convert('RGB')),
        'cmyk.jpg': (cmyk_jpeg, Image.open(io.BytesIO(cmyk_jpeg)).convert('RGB')),
        'animated.gif': (gif, Image.open(io.BytesIO(gif)).convert('RGB')),
        'animated.webp': (webp, image),
        'animated.png': (encode(image, 'PNG', **frames), image),
        'two pages.tiff': (encode(image, 'TIFF', **frames), image),
        'text within.png': (_png(8, 8, b''.join(b'\0' + bytes(row) for row in grey), text), grey),
        'rest behind.png': (png + bytes(1000), image),
        'rest behind.jpg': (jpeg + b'rest', decoded),
        'orientation 3.jpg': (exif[3], decoded.transpose(Image.Transpose.ROTATE_180)),
        'orientation 6.jpg': (exif[6], decoded.transpose(Image.Transpose.ROTATE_270)),
        'orientation 99.jpg': (exif[99], decoded),
        'orientation 0.jpg': (exif[0], decoded),
        'exif of zeros.jpg': (_with_exif(jpeg, bytes(100)), decoded),
        'exif cut.jpg': (_with_exif(jpeg, _orientation(1)[:9]), decoded),
        'exif beyond.jpg': (_with_exif(jpeg, b'II*\0\xff\xff\xff\x7f'), decoded),
        'name of 255 bytes ' + 'x' * 233 + '.png': (png, image),
        'line\nbreak.png': (png, image),
        'escape\x1b[31m.png': (png, image),
        'not UTF-8 \udcff.png': (png, image),
        'quote\'".png': (png, image),
    }


def _among_images(add: Callable[[Path], object]) -> Callable[[Path], None]:
    """Returns a function that adds something to the first class of a folder of images."""

    def make(folder: Path) -> None:
        bases.write_images(folder)
        add(folder / 'train' / bases.CLASSES[0])

    return make


def _same_prediction(output: str) -> bool:
    first, second = (json.loads(line)['classes'] for line in output.splitlines())
    return first == second


def _bind_socket(folder: Path) -> None:
    here = os.getcwd()
    # The whole path may be too long for a socket.
    os.chdir(folder)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind('x.png')
    os.chdir(here)


# What is no file, under the name of one.
SPECIAL = {
    'a folder': lambda folder: (folder / 'x.png').mkdir(),
    'a pipe': lambda folder: os.mkfifo(folder / 'x.png'),
    'a socket': _bind_socket,
    'a link to itself': bases.link('x.png', 'x.png'),
    'a link to nothing': bases.link('x.png', 'absent'),
    'a link to its folder': bases.link('x.png', '.'),
    'a link to a device': bases.link('x.png', '/dev/zero'),
}


def image_cases(places: Mapping[str, Path]) -> Iterator[Case]:
    """Image files given to predict, and among others in a folder, in memory and streamed."""
    predict, root = ('predict', '--student={student}', '--json'), '--config.data.root={input}'
    readers = {
        'memory': (*bases.RECIPE, root, bases.WORKDIR),
        'stream': (*bases.RECIPE, root, bases.STREAM, bases.WORKDIR),
    }
    damaged = {name: bases.write(name, data) for name, data in damaged_files().items()}
    damaged['read error.png'] = bases.link('read error.png', '/proc/self/mem')
    for name, make in damaged.items():
        command = (*predict, f'{{input}}/{name}')
        yield Case('images', f'predict: {name}', command, make, names=name)
        for reader, command in readers.items():
            yield Case('images', f'{reader}: {name}', command, _among_images(make), names=name)
    for name, (data, shown) in odd_files().items():
        make = bases.write(name, data)
        both = bases.in_turn(make, bases.write('twin.png', encode(shown, 'PNG')))
        command = (*predict, f'{{input}}/{name}', '{input}/twin.png')
        label = f'predict: {name!r}'
        yield Case('images', label, command, both, accepts=_same_prediction, compiles=True)
        for reader, command in readers.items():
            accepts = shows(COMPILES)
            yield Case('images', f'{reader}: {name!r}', command, _among_images(make), accepts)
    for name, special in SPECIAL.items():
        for given in ('{input}/x.png', '{input}'):
            yield Case(
                'images', f'predict {given}: {name}', (*predict, given), special, names=given
            )
        for reader, command in readers.items():
            noted = shows('x.png', COMPILES)
            yield Case('images', f'{reader}: {name}', command, _among_images(special), noted)
