"""CINIC-10 from its archive, as a TFDS data set. The archive is downloaded by hand."""

import collections
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from one_jax.data import image_decoding
from one_jax.data.table import CIFAR10_CLASSES, CINIC10, DATASETS
from one_jax.errors import UserError, explain

ARCHIVE = 'CINIC-10.tar.gz'
SOURCE_URL = 'https://datashare.ed.ac.uk/handle/10283/3192'
# Folder of the extracted archive, used if it exists.
TREE = 'CINIC-10'
SPLITS = ('train', 'valid', 'test')
IMAGES_PER_CLASS = 9_000
_SHAPE = DATASETS[CINIC10].image_shape


class Cinic10(tfds.core.GeneratorBasedBuilder):
    """90,000 images each in `train`, `valid` and `test`; PNG files are stored unchanged."""

    VERSION = tfds.core.Version('1.0.0')
    MANUAL_DOWNLOAD_INSTRUCTIONS = f'Download {ARCHIVE} (0.66 GB) from {SOURCE_URL}'
    # As in mnist5k: there are no checksums beside the code.
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Image(shape=_SHAPE, encoding_format='png')
        return tfds.core.DatasetInfo(
            builder=self,
            description='CIFAR-10 images and downsampled ImageNet images of its ten classes.',
            homepage=SOURCE_URL,
            features=tfds.features.FeaturesDict(
                {'image': image, 'label': tfds.features.ClassLabel(names=CIFAR10_CLASSES)}
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict]]]:
        source = find_source(Path(dl_manager.manual_dir))
        return {split: self._generate_examples(source, split) for split in SPLITS}

    def _generate_examples(self, source: Path, split: str) -> Iterator[tuple[str, dict]]:
        counts = collections.Counter()
        for path, content in _files(source, split):
            label, file_name = path.parts[-2:]
            # Decoders of damaged files raise anything.
            with explain(f'{source}: {path} cannot be read, download it again', Exception):
                shape = image_decoding.decode(content).shape
            if shape != _SHAPE:
                raise UserError(f'{source}: {path} is {shape}, not {_SHAPE}: download it again')
            counts[label] += 1
            yield f'{label}/{file_name}', {'image': content, 'label': label}
        for label in CIFAR10_CLASSES:
            if counts[label] != IMAGES_PER_CLASS:
                raise UserError(
                    f'{source} has {counts[label]} images in {split}/{label} in place of '
                    f'{IMAGES_PER_CLASS}: download or extract it again'
                )


def find_source(manual_dir: Path) -> Path | None:
    """Returns the extracted tree, which is faster, or the archive; None if neither exists."""
    for tree in (manual_dir / TREE, manual_dir):
        if all((tree / split).is_dir() for split in SPLITS):
            return tree
    return manual_dir / ARCHIVE if (manual_dir / ARCHIVE).is_file() else None


def _files(source: Path, split: str) -> Iterator[tuple[Path, bytes]]:
    """Yields path and content of every PNG file `.../split/class/file.png`.

    Raises:
      UserError: the archive is damaged.
    """
    if source.is_dir():
        for label in CIFAR10_CLASSES:
            for path in sorted((source / split / label).glob('[!.]*.png')):
                yield path, path.read_bytes()
        return
    damage = (tarfile.TarError, EOFError, zlib.error, OSError)
    with (
        explain(f'{source} is damaged or incomplete, download it again', *damage),
        # As a stream: reads files in the order of the archive.
        tarfile.open(source, 'r|gz') as archive,
    ):
        for member in archive:
            path = Path(member.name)
            wanted = path.parts[-3:-2] == (split,) and path.parts[-2] in CIFAR10_CLASSES
            if wanted and path.suffix == '.png' and path.name[0] != '.' and member.isfile():
                yield path, archive.extractfile(member).read()
