"""Reading image classification sets that TFDS has prepared on disk, whichever builder wrote them.

They are opened from their files alone: no builder code runs, nothing touches the network, and any
version on disk will do. ArrayRecord files are read without TensorFlow.
"""

import importlib.util
import io
import os
import shlex
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import read_only_builder, registered

from one_jax.data import jpeg
from one_jax.data.resident import Examples
from one_jax.errors import ConfigError, UserError

# Records read at a time.
_CHUNK = 1000


def resolve_data_dir(data_dir: str) -> str:
    """The directory of TFDS; '' is TFDS's own default."""
    return os.path.expanduser(
        data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
    )


def prepare_command(name: str, data_dir: str) -> str:
    """The command that prepares a data set where `open_prepared` finds it."""
    return f'python -m one_jax.prepare {name} --data_dir={shlex.quote(resolve_data_dir(data_dir))}'


def is_tfds_name(name: str) -> bool:
    """Whether a builder of that name comes with TFDS, or is one of ours that has been imported."""
    builders = tfds.list_builders(with_community_datasets=False)
    return name.partition('/')[0].partition(':')[0] in builders


def open_prepared(
    name: str, data_dir: str, any_size: bool = False
) -> tfds.core.DatasetBuilder | None:
    """Opens a prepared data set; reads its description, no images.

    Args:
      name: as TFDS has it: `name`, `name/config`, `name:version`.
      data_dir: '' for TFDS's own default.
      any_size: also a set whose images differ in size, which is to be streamed.

    Returns:
      The builder, or None if there is no such set on disk.

    Raises:
      ConfigError: it is there, but not an image classification set, or not of one image size.
      UserError: it is there, but cannot be read, or not without TensorFlow, which is missing.
    """
    directory = resolve_data_dir(data_dir)
    try:
        builder = read_only_builder.builder_from_files(name, data_dir=directory)
    except registered.DatasetNotFoundError:
        return None
    except Exception as error:  # whatever the parsers of damaged descriptions raise
        raise _damaged(name, directory, error) from error
    _check_features(name, builder.info.features, any_size)
    # Streamed sets are for their reader to judge.
    tensorflow_needed = not any_size and not _is_array_record(builder)
    if tensorflow_needed and importlib.util.find_spec('tensorflow') is None:
        raise UserError(
            f'data.name={name!r} is prepared in {builder.data_path} as '
            f'{builder.info.file_format.value}, which only TensorFlow reads: '
            "pip install 'one_jax[tensorflow]'"
        )
    return builder


def image_shape(builder: tfds.core.DatasetBuilder) -> tuple[int, int, int]:
    """(H, W, 3) of the images that `read_split` returns."""
    height, width, _ = builder.info.features['image'].shape
    return height, width, 3


def read_split(builder: tfds.core.DatasetBuilder, split: str) -> Examples:
    """Reads a whole split into memory, in the order it has on disk; grey images become RGB.

    Args:
      builder: from `open_prepared`.
      split: a split of it, or an expression such as 'train+extra'.

    Raises:
      UserError: a file is missing or damaged, or the split has no labels.
    """
    count = builder.info.splits[split].num_examples
    images = np.empty((count, *image_shape(builder)), np.uint8)
    labels = np.empty(count, np.int32)
    if _is_array_record(builder):
        _read_array_record(builder, split, images, labels)
    else:
        _read_with_tensorflow(builder, split, images, labels)
    num_classes = builder.info.features['label'].num_classes
    if count and not 0 <= labels.min() <= labels.max() < num_classes:
        raise UserError(
            f'data.name={builder.name!r}: split {split!r} has labels from {labels.min()} to '
            f'{labels.max()}, not 0 to {num_classes - 1}'
        )
    return Examples(images, labels)


def _is_array_record(builder: tfds.core.DatasetBuilder) -> bool:
    return tfds.core.FileFormat.ARRAY_RECORD in builder.info.available_file_formats()


def _check_features(name: str, features: Any, any_size: bool) -> None:
    wanted = 'an image classification set' + ('' if any_size else ' of one image size')

    def reject(reason: str) -> None:
        raise ConfigError('data.name', name, f'{wanted}, but {reason}')

    feature = dict(features) if isinstance(features, tfds.features.FeaturesDict) else {}
    image, label = feature.get('image'), feature.get('label')
    if not isinstance(image, tfds.features.Image) or not isinstance(
        label, tfds.features.ClassLabel
    ):
        reject(
            "this one lacks the features 'image' (Image) and 'label' (ClassLabel): it has "
            + ', '.join(f'{key} ({type(value).__name__})' for key, value in sorted(feature.items()))
        )
    height_and_width_known = None not in image.shape[:2]
    if (
        len(image.shape) != 3
        or image.shape[-1] not in (1, 3)
        or not (any_size or height_and_width_known)
    ):
        reject(f'the images of this one have the shape {image.shape}')
    if image.np_dtype != np.uint8:
        reject(f'the images of this one are {np.dtype(image.np_dtype).name}')


def _read_array_record(
    builder: tfds.core.DatasetBuilder, split: str, images: np.ndarray, labels: np.ndarray
) -> None:
    skipped = {key: tfds.decode.SkipDecoding() for key in builder.info.features if key != 'label'}
    try:
        source = builder.as_data_source(split, decoders=skipped, file_format='array_record')
        for start in range(0, len(labels), _CHUNK):
            indices = range(start, min(start + _CHUNK, len(labels)))
            for index, example in zip(indices, source.__getitems__(list(indices)), strict=True):
                with Image.open(io.BytesIO(example['image'])) as image:
                    images[index] = image.convert('RGB')
                labels[index] = example['label']
    except (OSError, RuntimeError, ValueError, LookupError) as error:
        raise _damaged(builder.name, builder.data_path, error) from error


def _read_with_tensorflow(
    builder: tfds.core.DatasetBuilder, split: str, images: np.ndarray, labels: np.ndarray
) -> None:
    tensorflow = jpeg.import_tensorflow()
    try:
        dataset = builder.as_dataset(
            split=split,
            batch_size=_CHUNK,
            decoders=tfds.decode.PartialDecoding({'image': True, 'label': True}),
            # Shards one after the other: the order of the ArrayRecord files.
            read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
        )
        start = 0
        for batch in tfds.as_numpy(dataset):
            stop = start + len(batch['label'])
            # The one channel of grey images is broadcast to three.
            images[start:stop], labels[start:stop] = batch['image'], batch['label']
            start = stop
        if start != len(labels):
            raise ValueError(f'{start} examples in place of {len(labels)}')
    except (OSError, RuntimeError, ValueError, tensorflow.errors.OpError) as error:
        raise _damaged(builder.name, builder.data_path, error) from error


def _damaged(name: str, directory: Any, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(
        f'data.name={name!r} in {directory} cannot be read ({reason}): '
        'delete it and prepare it again'
    )
