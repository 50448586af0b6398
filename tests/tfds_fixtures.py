"""Writes small data sets to disk in TFDS's own format, with TFDS's own writer."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

CIFAR10_NAMES = [
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
]


def random_split(count: int, shape: tuple[int, ...], num_classes: int, seed: int) -> tuple:
    """Random images uint8 [count, *shape] with the labels 0, 1, ... in turn."""
    images = np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)
    return images, np.arange(count) % num_classes


def write_set(
    data_dir: Path,
    name: str,
    splits: Mapping[str, tuple[np.ndarray, np.ndarray]],
    names: list[str] | int = 10,
    image_shape: tuple[int | None, ...] | None = None,
    file_format: str = 'array_record',
    version: str = '3.0.2',
    num_shards: int = 1,
    **features: Any,
) -> Path:
    """Prepares a data set of the features id, image and label, as TFDS's cifar10 has them.

    Args:
      data_dir: where TFDS keeps its data.
      name: of the data set; TFDS's registered builder of that name, if any, is left alone.
      splits: (images, labels) of each.
      names: of the classes, or how many.
      image_shape: as declared; None takes it from the images.
      file_format: 'array_record' or 'tfrecord'.
      version: of the data set.
      num_shards: files of each split.
      **features: in place of the three.

    Returns:
      The folder of the prepared version.
    """
    images, _ = next(iter(splits.values()))
    classes = {'num_classes': names} if isinstance(names, int) else {'names': names}
    features = features or {
        'id': tfds.features.Text(),
        'image': tfds.features.Image(shape=image_shape or images.shape[1:]),
        'label': tfds.features.ClassLabel(**classes),
    }

    class SmallSet(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)
        code_path = None

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
            for index, (image, label) in enumerate(zip(*splits[split], strict=True)):
                example = {
                    'id': f'{split}_{index}',
                    # Encoding arrays would take TensorFlow.
                    'image': Image.fromarray(image.squeeze()),
                    'label': int(label),
                }
                yield index, {key: example[key] for key in features}

    SmallSet.name = name
    builder = SmallSet(data_dir=str(data_dir), file_format=file_format)
    builder.download_and_prepare(
        download_dir=str(data_dir / 'downloads'),
        download_config=tfds.download.DownloadConfig(num_shards=num_shards),
    )
    return Path(builder.data_dir)
