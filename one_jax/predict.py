"""Classifies image files with an exported student.

    python -m one_jax.predict --student=DIR IMAGE_OR_FOLDER... [--top=5] [--json]

Prints the most probable classes of each image as a table, or as JSON lines with --json. Searches
folders recursively. Images of any size and mode are cropped and resized as the test images of the
student's data set were.
"""

import argparse
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from one_jax.data.image_decoding import read_image
from one_jax.data.image_folder import EXTENSIONS, is_image_name
from one_jax.errors import UserError, explain, printable, require
from one_jax.reporting.tables import format_table
from one_jax.runtime import cli
from one_jax.students.student import Student, load_student

# Images of a batch, and their pixels: large images come in smaller batches.
BATCH_SIZE, _MAX_PIXELS = 64, 2**24


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Lists the given files, and the image files in and below the given folders, sorted.

    Raises `UserError` for a path that does not exist, or a folder without images.
    """
    found = []
    for path in map(Path, paths):
        # Unlike `Path.is_file`, this returns False for a name that is too long.
        if os.path.isfile(path):
            found.append(path)
            continue
        if not os.path.isdir(path):
            raise UserError(f'{str(path)!r}: no such file or folder')
        inside = [
            p
            for p in path.rglob('*')
            if is_image_name(p.name)
            and os.path.isfile(p)
            and not any(part.startswith('.') for part in p.relative_to(path).parts)
        ]
        if not inside:
            endings = ', '.join(EXTENSIONS)
            raise UserError(f'{str(path)!r} holds no image: files that end in {endings}')
        found += sorted(inside)
    return found


def predict(
    student: Student, paths: Sequence[Path], top: int = 5, batch_size: int = BATCH_SIZE
) -> Iterator[dict[str, Any]]:
    """Predicts the most probable classes of each image file.

    Yields 'file' and 'classes': a list of 'label', 'name' and 'probability', the most probable
    first. Raises `UserError` if a file is not an image, or the logits are not finite.
    """
    size, crop = tuple(student.config['input_size']), student.config.get('crop', 1.0)
    # The last batch is padded, so that one program is compiled.
    batch_size = min(batch_size, len(paths), max(1, _MAX_PIXELS // (size[0] * size[1])))
    for start in range(0, len(paths), batch_size):
        batch = paths[start : start + batch_size]
        images = np.zeros((batch_size, *size, 3), np.uint8)
        for index, path in enumerate(batch):
            # Decoders of damaged files raise errors of any kind.
            with explain(f'{str(path)!r} cannot be read as an image', Exception):
                images[index] = read_image(path, size, crop)
        with explain(f'student={student.folder!r}', jax.errors.JaxRuntimeError):
            logits = np.asarray(student(images))
        allowed = 'a student with finite logits: on these images some are NaN or infinite'
        require(np.isfinite(logits[: len(batch)]).all(), 'student', student.folder, allowed)
        probabilities = np.asarray(jax.nn.softmax(logits))
        for path, row in zip(batch, probabilities, strict=False):
            classes = [
                {
                    'label': int(label),
                    'name': student.label_names[label],
                    'probability': round(float(row[label]), 6),
                }
                for label in np.argsort(-row, kind='stable')[:top]
            ]
            yield {'file': str(path), 'classes': classes}


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the classes of the image files that the arguments name."""
    parser = argparse.ArgumentParser(
        prog='python -m one_jax.predict', description='Classify image files with a student.'
    )
    parser.add_argument('images', nargs='+', metavar='IMAGE_OR_FOLDER')
    parser.add_argument('--student', required=True, metavar='DIR', help='an exported student')
    parser.add_argument('--top', type=int, default=5, help='the number of classes for each image')
    parser.add_argument('--json', action='store_true', help='JSON lines in place of a table')
    options = parser.parse_args(arguments)
    require(options.top >= 1, '--top', options.top, 'at least 1')
    student = load_student(options.student)
    predictions = predict(student, find_images(options.images), options.top)
    if options.json:
        for prediction in predictions:
            print(json.dumps(prediction), flush=True)
        return
    # Print the predictions of a large folder as they come.
    while page := list(itertools.islice(predictions, BATCH_SIZE)):
        rows = [
            {
                'file': '' if rank else printable(prediction['file']),
                'class': printable(entry['name']),
                'probability': f'{100 * entry["probability"]:.2f} %',
            }
            for prediction in page
            for rank, entry in enumerate(prediction['classes'])
        ]
        print(format_table(rows, list(rows[0])), flush=True)


if __name__ == '__main__':
    with cli.reporting_errors():
        main()
