"""Reads image classification sets that TFDS has prepared on disk, whichever builder wrote them.

Sets are opened from their files alone: no builder code runs, nothing touches the network, and any
version on disk is accepted. ArrayRecord files are read without TensorFlow.
"""

import dataclasses
import logging
import os
import shlex
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import read_only_builder, registered

from one_jax.data import image_decoding, jpeg, table, tfrecord
from one_jax.data.builders import mnist5k
from one_jax.data.resident import Examples
from one_jax.errors import UserError, explain, require

# Examples to read at a time.
_CHUNK = 1000


def resolve_data_dir(data_dir: str) -> str:
    """Returns TFDS's directory; '' is TFDS's own default."""
    return os.path.expanduser(
        data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
    )


def is_tfds_name(name: str) -> bool:
    """Returns whether TFDS or this package has a builder of that name."""
    base = name.partition('/')[0].partition(':')[0]
    return base in tfds.list_builders(with_community_datasets=False)


def find(name: str, data_dir: str, any_size: bool) -> tfds.core.DatasetBuilder:
    """Opens a prepared data set as `open_prepared` does; builds mnist5k if it is missing.

    Raises:
      ConfigError: the set is unknown.
      UserError: it is not prepared.
    """
    directory = resolve_data_dir(data_dir)
    builder = open_prepared(name, directory, any_size)
    if builder is None and name == table.MNIST5K:
        mnist5k.build(directory)
        builder = open_prepared(name, directory, any_size)
    if builder:
        return builder
    allowed = f'{table.known_names()}, or an image classification set prepared by TFDS'
    require(name in table.DATASETS or is_tfds_name(name), 'data.name', name, allowed)
    raise UserError(
        f'data.name={name!r} is not prepared in data.data_dir={directory!r}: '
        f'run python -m one_jax.prepare {name} --data_dir={shlex.quote(directory)}'
    )


def open_prepared(
    name: str, data_dir: str, any_size: bool = False
) -> tfds.core.DatasetBuilder | None:
    """Opens a prepared data set, or returns None if it is not on disk; reads no images.

    Takes any value of `data.name`, such as `name`, `name/config` or `name:version`. Accepts images
    that differ in size only if `any_size`: they must be streamed.

    Raises:
      ConfigError: the images have no class labels, or are not of one size.
      UserError: its description cannot be read.
    """
    directory, source = resolve_data_dir(data_dir), table.tfds_name(name)
    try:
        tfds.core.naming.parse_builder_name_kwargs(source)
    except ValueError:
        return None
    # Parsers of damaged descriptions raise anything.
    with explain(_unreadable(name, directory), Exception):
        try:
            builder = read_only_builder.builder_from_files(source, data_dir=directory)
        except registered.DatasetNotFoundError:
            return None
    _check_features(name, builder.info.features, any_size)
    return builder


def describe(name: str, builder: tfds.core.DatasetBuilder) -> table.DatasetSpec:
    """Returns the description of a set; sizes and classes are those on disk.

    Raises:
      UserError: a split is missing.
    """
    splits, shape = builder.info.splits, _image_shape(builder)
    names = {'test_split': 'test' if 'test' in splits else 'validation'}
    if [*splits] == ['train'] and not builder.info.disable_shuffling and name not in table.DATASETS:
        # TFDS has shuffled the images.
        names = {'train_split': 'train[:80%]', 'test_split': 'train[80%:]'}
    spec = table.DATASETS.get(name) or table.DatasetSpec(
        name=name,
        num_classes=0,
        image_shape=shape,
        num_train=0,
        num_test=0,
        padding=table.default_padding(shape),
        **names,
    )
    required = f'the splits {spec.train_split!r} and {spec.test_split!r}'
    with explain(f'data.name={name!r} must have {required}', KeyError, ValueError):
        num_train = splits[spec.train_split].num_examples
        num_test = splits[spec.test_split].num_examples
    return dataclasses.replace(
        spec,
        num_classes=builder.info.features['label'].num_classes,
        image_shape=shape,
        num_train=num_train,
        num_test=num_test,
    )


def read_split(builder: tfds.core.DatasetBuilder, split: str) -> Examples:
    """Reads a whole split into memory, in its order on disk; grey images become RGB.

    Raises:
      UserError: a file is missing or damaged, the split has no labels, or TensorFlow is missing.
    """
    if tfds.core.FileFormat.ARRAY_RECORD in builder.info.available_file_formats():
        chunks = _array_record_chunks(builder, split)
    else:
        jpeg.import_tensorflow()
        chunks = _tensorflow_chunks(builder, split)
    num_classes = builder.info.features['label'].num_classes
    count, start = builder.info.splits[split].num_examples, 0
    images = np.empty((count, *_image_shape(builder)), np.uint8)
    # Stays -1 where an example is missing.
    labels = np.full(count, -1, np.int32)
    # TFDS, TensorFlow and decoders of damaged files raise anything.
    with explain(_unreadable(builder.name, builder.data_path), Exception):
        for chunk_images, chunk_labels in chunks:
            stop = start + len(chunk_labels)
            # The one channel of grey images is broadcast to three.
            images[start:stop], labels[start:stop] = chunk_images, chunk_labels
            start = stop
        if count and not 0 <= labels.min() <= labels.max() < num_classes:
            found = f'labels from {labels.min()} to {labels.max()}'
            raise ValueError(f'split {split!r} has {found}, not 0 to {num_classes - 1}')
    return Examples(images, labels)


def _image_shape(builder: tfds.core.DatasetBuilder) -> tuple[int, int, int]:
    """Returns (H, W, 3), 0 for sides that differ among images."""
    height, width, _ = builder.info.features['image'].shape
    return height or 0, width or 0, 3


def _check_features(name: str, features: Any, any_size: bool) -> None:
    kind = 'an image classification set' + ('' if any_size else ' of one image size')

    def check(condition: bool, reason: str) -> None:
        require(condition, 'data.name', name, f'{kind}, but {reason}')

    feature = dict(features) if isinstance(features, tfds.features.FeaturesDict) else {}
    image, label = feature.get('image'), feature.get('label')
    found = ', '.join(f'{key} ({type(value).__name__})' for key, value in sorted(feature.items()))
    check(
        isinstance(image, tfds.features.Image) and isinstance(label, tfds.features.ClassLabel),
        f"this one lacks the features 'image' (Image) and 'label' (ClassLabel): it has {found}",
    )
    suitable = image.shape[2:] in ((1,), (3,)) and (any_size or None not in image.shape)
    advice = ': give data.stream=True' if None in image.shape else ''
    check(suitable, f'its images have the shape {image.shape}{advice}')
    check(image.np_dtype == np.uint8, f'its images are {np.dtype(image.np_dtype).name}')


def _array_record_chunks(builder: tfds.core.DatasetBuilder, split: str) -> Iterator[tuple]:
    skipped = {key: tfds.decode.SkipDecoding() for key in builder.info.features if key != 'label'}
    source = builder.as_data_source(split, decoders=skipped, file_format='array_record')
    for start in range(0, len(source), _CHUNK):
        examples = source.__getitems__(list(range(start, min(start + _CHUNK, len(source)))))
        images = [image_decoding.decode(example['image']) for example in examples]
        yield images, [example['label'] for example in examples]


def _tensorflow_chunks(builder: tfds.core.DatasetBuilder, split: str) -> Iterator[tuple]:
    if builder.info.file_format is tfds.core.FileFormat.TFRECORD:
        for file in builder.info.splits[split].file_instructions:
            # TensorFlow ignores what follows the last whole record.
            tfrecord.Shard(file.filename, file.examples_in_shard)
    # TFDS warns of its own code.
    logging.getLogger('absl').setLevel(logging.ERROR)
    dataset = builder.as_dataset(
        split=split,
        batch_size=_CHUNK,
        decoders=tfds.decode.PartialDecoding({'image': True, 'label': True}),
        # Reads shards one after the other: the order of ArrayRecord files.
        read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
    )
    for batch in tfds.as_numpy(dataset):
        yield batch['image'], batch['label']


def _unreadable(name: str, directory: Any) -> str:
    return f'data.name={name!r} in {directory} cannot be read (delete it and prepare it again)'
