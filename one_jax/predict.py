"""What a student says of image files.

    python -m one_jax.predict --student=DIR IMAGE_OR_FOLDER... [--top=5] [--json]

Prints the most probable classes of each image as a table, or as JSON lines with --json. Folders are
searched with all that is below them. Images of any size and mode are brought to the student's size
as the test images of its training were.
"""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageOps

from one_jax import student as student_lib
from one_jax.analysis.tables import format_table
from one_jax.data import image_folder
from one_jax.errors import UserError

BATCH_SIZE = 64


def find_images(arguments: Iterable[str | Path]) -> list[Path]:
    """The image files that the arguments name, and those in and below the folders, sorted.

    Raises:
      UserError: there is no such file or folder, or no image in a folder.
    """
    found = []
    for path in map(Path, arguments):
        # Where Python's own tests would raise an error, as of a name too long, these say no.
        if os.path.isfile(path):
            found.append(path)
            continue
        if not os.path.isdir(path):
            raise UserError(f'{str(path)!r}: no such file or folder')
        inside = sorted(
            entry
            for entry in path.rglob('*')
            if entry.is_file() and entry.name.lower().endswith(image_folder.EXTENSIONS)
        )
        if not inside:
            endings = ', '.join(image_folder.EXTENSIONS)
            raise UserError(f'{str(path)!r} holds no image: files that end in {endings}')
        found += inside
    return found


def read_image(path: Path, size: tuple[int, int], crop: float = 1.0) -> np.ndarray:
    """Reads one image of any size and mode as uint8 [H, W, 3], its centre at the right size.

    Args:
      path: of the file.
      size: (H, W).
      crop: the share of the shorter side that is kept; the rest is cut off at all sides.

    Raises:
      UserError: the file is no image, or a damaged one.
    """
    try:
        with Image.open(path, formats=image_folder.FORMATS) as file:
            image = image_folder.to_rgb(ImageOps.exif_transpose(file))
    except Exception as error:  # whatever the decoders of damaged files raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f'{str(path)!r} cannot be read as an image: {reason}') from None
    if image.size == (size[1], size[0]) and crop == 1:
        return np.asarray(image)
    bleed = (1 - crop) / 2
    fitted = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BILINEAR, bleed=bleed)
    return np.asarray(fitted)


def predict(
    student: student_lib.Student, paths: Sequence[Path], top: int = 5, batch_size: int = BATCH_SIZE
) -> Iterator[dict[str, Any]]:
    """The most probable classes of each image.

    Args:
      student: from `load_student`.
      paths: of image files.
      top: how many classes.
      batch_size: images at a time; the last batch is padded, so one program is compiled.

    Yields:
      For each file in turn its 'file' and its 'classes', a list of 'label', 'name' and
      'probability' that begins with the most probable one.

    Raises:
      UserError: a file is no image.
    """
    size, crop = tuple(student.config['input_size']), student.config.get('crop', 1.0)
    batch_size = min(batch_size, len(paths))
    for start in range(0, len(paths), batch_size):
        batch = paths[start : start + batch_size]
        images = np.zeros((batch_size, *size, 3), np.uint8)
        for place, path in enumerate(batch):
            images[place] = read_image(path, size, crop)
        probabilities = np.asarray(jax.nn.softmax(student(images)))
        for path, row in zip(batch, probabilities, strict=False):
            order = np.argsort(-row, kind='stable')[:top]
            classes = [
                {
                    'label': int(label),
                    'name': student.label_names[label],
                    'probability': round(float(row[label]), 6),
                }
                for label in order
            ]
            yield {'file': str(path), 'classes': classes}


def _table(predictions: Iterable[dict[str, Any]]) -> str:
    rows = []
    for prediction in predictions:
        rows += [
            {
                'file': '' if rank else prediction['file'],
                'class': entry['name'],
                'probability': f'{100 * entry["probability"]:.2f} %',
            }
            for rank, entry in enumerate(prediction['classes'])
        ]
    return format_table(rows, ['file', 'class', 'probability'])


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints what the student says of the files that the arguments name."""
    parser = argparse.ArgumentParser(
        prog='python -m one_jax.predict', description='What a student says of image files.'
    )
    parser.add_argument('images', nargs='+', metavar='IMAGE_OR_FOLDER')
    parser.add_argument('--student', required=True, metavar='DIR', help='an exported student')
    parser.add_argument('--top', type=int, default=5, help='how many classes of each image')
    parser.add_argument('--json', action='store_true', help='JSON lines in place of a table')
    options = parser.parse_args(arguments)
    if options.top < 1:
        raise UserError(f'--top={options.top} is not allowed: at least 1')
    student = student_lib.load_student(options.student)
    predictions = predict(student, find_images(options.images), options.top)
    if options.json:
        for prediction in predictions:
            print(json.dumps(prediction), flush=True)
        return
    # A large folder is shown as it goes on.
    while page := list(itertools.islice(predictions, BATCH_SIZE)):
        print(_table(page), flush=True)


if __name__ == '__main__':
    try:
        main()
    except UserError as error:
        sys.exit(f'error: {error}')
