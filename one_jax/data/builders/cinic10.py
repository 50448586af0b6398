"""CINIC-10 from its archive, as a TFDS data set. The archive is downloaded by hand."""

import collections
import io
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from PIL import Image

from one_jax.errors import UserError

NAME = 'cinic10'
ARCHIVE = 'CINIC-10.tar.gz'
# What the archive holds is found here too, if it has been extracted already.
TREE = 'CINIC-10'
# CIFAR-10's, in the same order.
CLASSES = (
    'airplane',
    'automobile',
    'bird',
    'cat',
    'deer',
    'dog',
    'frog',
    'horse',
    'ship',
    'truck',
)
SPLITS = ('train', 'valid', 'test')
IMAGES_PER_CLASS = 9_000
IMAGE_SIZE = 32


class Cinic10(tfds.core.GeneratorBasedBuilder):
    """90,000 images each in `train`, `valid` and `test`; PNG files are stored as they are."""

    VERSION = tfds.core.Version('1.0.0')
    RELEASE_NOTES = {'1.0.0': 'First version.'}  # noqa: RUF012 (TFDS declares the type)
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f'Download {ARCHIVE} (0.66 GB) from https://datashare.ed.ac.uk/handle/10283/3192'
    )
    # As in mnist5k: there are no checksums beside the code.
    code_path = None

    def __init__(self, *, file_format: str = 'array_record', **kwargs: Any):
        # TFDS's own default, TFRecord, can neither be written nor read without TensorFlow.
        super().__init__(file_format=file_format, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Image(shape=(IMAGE_SIZE, IMAGE_SIZE, 3), encoding_format='png')
        return tfds.core.DatasetInfo(
            builder=self,
            description='CIFAR-10 images and downsampled ImageNet images of its ten classes.',
            homepage='https://datashare.ed.ac.uk/handle/10283/3192',
            features=tfds.features.FeaturesDict(
                {'image': image, 'label': tfds.features.ClassLabel(names=CLASSES)}
            ),
            supervised_keys=('image', 'label'),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict]]]:
        source = find_source(Path(dl_manager.manual_dir))
        return {split: self._generate_examples(source, split) for split in SPLITS}

    def _generate_examples(self, source: Path, split: str) -> Iterator[tuple[str, dict]]:
        counts = collections.Counter()
        for path, content in _files(source, split):
            label, file_name = path.parts[-2:]
            _check_image(source, path, content)
            counts[label] += 1
            yield f'{label}/{file_name}', {'image': content, 'label': label}
        for label in CLASSES:
            if counts[label] != IMAGES_PER_CLASS:
                raise UserError(
                    f'{source} has {counts[label]} images in {split}/{label} in place of '
                    f'{IMAGES_PER_CLASS}: download or extract it again'
                )


def find_source(manual_dir: Path) -> Path | None:
    """The extracted tree (of two, it is quicker) or the archive; None if there is neither."""
    for tree in (manual_dir / TREE, manual_dir):
        if all((tree / split).is_dir() for split in SPLITS):
            return tree
    return manual_dir / ARCHIVE if (manual_dir / ARCHIVE).is_file() else None


def _files(source: Path, split: str) -> Iterator[tuple[Path, bytes]]:
    """Path and content of every PNG file `.../split/class/file.png`.

    Raises:
      UserError: the archive is damaged.
    """
    if source.is_dir():
        for label in CLASSES:
            for path in sorted((source / split / label).glob('*.png')):
                yield path, path.read_bytes()
        return
    try:
        # As a stream: members are read in the order they have in the file.
        with tarfile.open(source, 'r|gz') as archive:
            for member in archive:
                path = Path(member.name)
                wanted = path.parts[-3:-2] == (split,) and path.parts[-2] in CLASSES
                if wanted and path.suffix == '.png' and member.isfile():
                    yield path, archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise UserError(
            f'{source} is damaged or incomplete ({error}): download it again'
        ) from error


def _check_image(source: Path, path: Path, content: bytes) -> None:
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            size = image.size
    except Exception as error:  # whatever the decoder of a damaged file raises
        raise UserError(f'{source}: {path} cannot be read ({error}): download it again') from error
    if size != (IMAGE_SIZE, IMAGE_SIZE):
        raise UserError(f'{source}: {path} has {size[0]}x{size[1]} pixels in place of 32x32')
