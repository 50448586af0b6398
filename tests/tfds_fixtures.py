"""Small data sets, written by TFDS in its own format, and configs to open them."""

import io
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from ml_collections import config_dict
from PIL import Image

from one_jax import config as config_lib
from one_jax.data import Examples

# Kinds of the first images that `encode` makes.
ODD = ('grey', 'cmyk', 'png')


def data_config(**fields: Any) -> config_dict.ConfigDict:
    """Returns the group `data` of a config."""
    config = config_lib.default_config().data
    config.update(name='cifar10', batch_size=8, eval_batch_size=8)
    config.update(fields)
    return config


def rows(examples: Examples) -> set[bytes]:
    """Returns the examples as a set, whatever their order."""
    return {
        image.tobytes() + label.tobytes()
        for image, label in zip(examples.images, examples.labels, strict=True)
    }


def written_rows(split: tuple[np.ndarray, np.ndarray]) -> set[bytes]:
    images, labels = split
    return rows(Examples(images, labels.astype(np.int32)))


def random_split(count: int, shape: tuple[int, ...], num_classes: int, seed: int) -> tuple:
    """Returns random images uint8 [count, *shape] with the labels 0, 1, ... in turn."""
    images = np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)
    return images, np.arange(count) % num_classes


def cifar10_splits() -> dict[str, tuple]:
    return {
        'train': random_split(40, (32, 32, 3), 10, seed=0),
        'test': random_split(20, (32, 32, 3), 10, seed=1),
    }


def write_set(
    data_dir: Path,
    name: str,
    splits: Mapping[str, tuple[np.ndarray, np.ndarray]],
    names: Iterable[str] | int = 10,
    image_shape: tuple[int | None, ...] | None = None,
    file_format: str = 'array_record',
    version: str = '3.0.2',
    num_shards: int = 1,
    **features: Any,
) -> Path:
    """Prepares a data set with the features id, image and label, as in TFDS's cifar10.

    Args:
      data_dir: TFDS's directory.
      name: name of the data set; does not affect TFDS's registered builder of that name.
      splits: (images, labels) of each.
      names: names or number of the classes.
      image_shape: declared shape; None takes it from the images.
      file_format: 'array_record' or 'tfrecord'.
      version: version of the data set.
      num_shards: files of each split.
      **features: replace the three.

    Returns:
      The folder of the prepared version.
    """
    images, _ = next(iter(splits.values()))
    classes = {'num_classes': names} if isinstance(names, int) else {'names': list(names)}
    features = features or {
        'id': tfds.features.Text(),
        'image': tfds.features.Image(shape=image_shape or images.shape[1:]),
        'label': tfds.features.ClassLabel(**classes),
    }

    def examples(split: str) -> Iterator[dict[str, Any]]:
        for index, (image, label) in enumerate(zip(*splits[split], strict=True)):
            # Encoding arrays would take TensorFlow.
            pil_image = Image.fromarray(image.squeeze())
            example = {'id': f'{split}_{index}', 'image': pil_image, 'label': int(label)}
            yield {key: example[key] for key in features}

    generators = {split: examples(split) for split in splits}
    return _prepare(data_dir, name, version, features, generators, file_format, num_shards)


def write_imagenet(
    data_dir: Path, images: Iterable[bytes], labels: Iterable[int], num_shards: int = 4
) -> tfds.core.DatasetBuilder:
    """Prepares encoded images in the format of TFDS's imagenet2012."""
    features = {
        'image': tfds.features.Image(encoding_format='jpeg'),
        'label': tfds.features.ClassLabel(num_classes=1000),
        'file_name': tfds.features.Text(),
    }
    examples = [
        {'image': image, 'label': label, 'file_name': f'n{label:08}_{index}.JPEG'}
        for index, (image, label) in enumerate(zip(images, labels, strict=True))
    ]

    def copies() -> Iterator[dict[str, Any]]:
        for example in examples:
            yield {**example, 'image': io.BytesIO(example['image'])}

    generators = {'train': copies(), 'validation': copies()}
    folder = _prepare(
        data_dir, 'imagenet2012', '5.1.0', features, generators, 'tfrecord', num_shards
    )
    return tfds.builder_from_directory(folder)


def _prepare(
    data_dir: Path,
    name: str,
    version: str,
    features: Mapping[str, Any],
    splits: Mapping[str, Iterator[dict[str, Any]]],
    file_format: str,
    num_shards: int,
) -> Path:
    class SmallSet(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)
        code_path = None

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
            return {split: enumerate(examples) for split, examples in splits.items()}

        def _generate_examples(self) -> None:
            """Required by TFDS; `_split_generators` has the examples."""

    SmallSet.name = name
    builder = SmallSet(data_dir=str(data_dir), file_format=file_format)
    builder.download_and_prepare(
        download_dir=str(data_dir / 'downloads'),
        download_config=tfds.download.DownloadConfig(num_shards=num_shards),
    )
    return Path(builder.data_dir)


def damage_set(folder: Path, damage: str) -> None:
    """Damages a prepared set: 'missing shard', 'cut shard' or 'cut description'."""
    (shard,) = folder.glob('*train*')
    if damage == 'missing shard':
        shard.unlink()
    elif damage == 'cut shard':
        os.truncate(shard, shard.stat().st_size // 2)
    else:
        os.truncate(folder / 'dataset_info.json', 50)


def colour(label: int) -> np.ndarray:
    """Returns red and green of each label, far enough apart to survive JPEG."""
    return np.array([40 + 20 * (label % 10), 40 + 20 * (label // 10 % 10)])


def encode(index: int, label: int) -> bytes:
    """Encodes an image of its label's colour, whose size and kind depend on its number.

    Blue grows towards the lower right, so that different crops are different pixels.
    """
    width, height = 20 + 7 * (index % 5), 20 + 11 * (index % 3)
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[..., :2] = colour(label)
    pixels[..., 2] = 40 + 2 * np.arange(height)[:, None] + 2 * np.arange(width)
    kind = ODD[index] if index < len(ODD) else 'jpeg'
    image = Image.fromarray(pixels).convert({'grey': 'L', 'cmyk': 'CMYK'}.get(kind, 'RGB'))
    return save(image, 'PNG' if kind == 'png' else 'JPEG')


def save(image: Image.Image, image_format: str = 'JPEG', quality: int = 95) -> bytes:
    data = io.BytesIO()
    image.save(data, image_format, quality=quality, subsampling=0)
    return data.getvalue()
