"""Opens the configured data set: a prepared TFDS set, a folder of images, or generated images."""

import dataclasses
import os
from collections.abc import Callable
from typing import NamedTuple

from ml_collections import config_dict

from one_jax.data import folder_reader, image_folder, resident, table
from one_jax.data.folder_reader import Loaded
from one_jax.data.source import ResidentSource, Source, StreamedSource
from one_jax.data.tfrecord import TFRecords
from one_jax.errors import UserError, require
from one_jax.runtime import memory

# As usual, ImageNet's mean and deviation stand in for unknown ones.
_IMAGENET = table.DATASETS['imagenet2012'].mean, table.DATASETS['imagenet2012'].std
_STREAMED_SIDE = table.DATASETS['imagenet2012'].image_shape[0]


def exists(data_config: config_dict.ConfigDict) -> bool:
    """Returns whether the configured data set is on disk, or can be made; reads no image."""
    name = data_config.name
    if data_config.generated_examples or name == table.MNIST5K:
        return True
    if name == table.IMAGE_FOLDER:
        return bool(data_config.root) and os.path.exists(os.path.expanduser(data_config.root))
    from one_jax.data import prepared  # Imports TFDS.

    return prepared.open_prepared(name, data_config.data_dir, any_size=True) is not None


def open(data_config: config_dict.ConfigDict, crop: float | None = None) -> Source:
    """Opens the configured data set; reads it into memory, or prepares to stream it.

    Takes the group `data` of a valid config. Held-out images are taken from the train split first;
    `examples_per_class` counts from the rest. Both choices, and generated images, depend on
    `subset_seed` alone: runs with different seeds share their data. mnist5k is built if missing.
    A student's `crop` makes resized images of a folder those that `predict` shows it.

    Raises:
      ConfigError: the data set is unknown, or a field does not suit it.
      UserError: the data set is missing, damaged, or larger than the available memory.
    """
    name, side, skip = data_config.name, data_config.image_size, data_config.skip_unreadable
    allowed = '0 for images in memory, which keep the size that they have on disk'
    require(not side or table.resizes(data_config), 'data.image_size', side, allowed)
    allowed = f'False unless data.name={table.IMAGE_FOLDER!r}: the images of a prepared set are one'
    require(not skip or name == table.IMAGE_FOLDER, 'data.skip_unreadable', skip, allowed)
    if data_config.generated_examples:
        found = _generated(data_config)
    elif name == table.IMAGE_FOLDER:
        found = _folder(data_config, crop)
    else:
        found = _prepared(data_config)
    spec, streamed = found.spec, table.is_streamed(data_config)
    augment, padding = data_config.augment, data_config.padding
    if streamed:
        side = side or _STREAMED_SIDE
        spec = dataclasses.replace(
            spec,
            image_shape=(side, side, 3),
            # Decoding crops and flips, unless another augmentation is chosen.
            augment='none',
            padding=table.default_padding((side, side, 3)),
            streamed=True,
        )
        allowed = '-1 for random crops of a stream: choose data.augment too'
        require(augment != 'default' or padding == -1, 'data.padding', padding, allowed)
    limit = min(spec.image_shape[:2])
    require(padding < limit, 'data.padding', padding, f'-1 to {limit - 1}')
    if augment != 'default':
        spec = dataclasses.replace(spec, augment=augment)
    if padding != -1:
        spec = dataclasses.replace(spec, padding=padding)
    if not streamed:
        _check_memory(spec, data_config, found.num_validation)
    splits, counts, unreadable = found.load()
    origin = 'as published'
    if spec.mean is None:
        if not streamed:
            counts = resident.count_values(splits['train'].images)
        origin = "ImageNet's" if counts is None else "the training images'"
        mean, std = _IMAGENET if counts is None else resident.channel_statistics(counts)
        spec = dataclasses.replace(spec, mean=mean, std=std)
    sizes = {'num_train': len(splits['train']), 'num_test': len(splits['test'])}
    spec = dataclasses.replace(spec, **sizes)
    splits = splits | resident.select(splits['train'], found.label_names, data_config)
    use = f'{"centre squares" if side else "whole images"}, data.augment={spec.augment!r}'
    # A chosen augmentation takes the images that a set in memory would take.
    crops = (1.0, found.crop or 1.0)
    if streamed and augment == 'default':
        crops = (None, found.crop)
        use = f'random-resized crops and flips; evaluation {found.crop or table.EVALUATION_CROP}'
    counts = ', '.join(f'{split} {len(examples)}' for split, examples in splits.items())
    mean, std = (', '.join(f'{x:.3f}' for x in values) for values in (spec.mean, spec.std))
    summary = (
        f'data: {name}, {spec.num_classes} classes ({image_folder.some(found.label_names)}); '
        f'images: {counts}\n'
        f'pixels: {spec.image_shape[0]}x{spec.image_shape[1]}, {use}; '
        f'mean {mean}, deviation {std} ({origin})'
    )
    options = {'summary': summary, 'unreadable': unreadable}
    if streamed:
        decoding = spec.image_shape[0], data_config.decode_threads, data_config.prefetch
        return StreamedSource(spec, found.label_names, splits, decoding, crops, **options)
    return ResidentSource(spec, found.label_names, splits, **options)


class _Found(NamedTuple):
    """A data set before its images are read by `load`."""

    spec: table.DatasetSpec
    label_names: tuple[str, ...]
    load: Callable[[], Loaded]
    # Of evaluation images of a stream, see `StreamedSource.crops`.
    crop: float | None = None
    num_validation: int = 0


def _generated(data_config: config_dict.ConfigDict) -> _Found:
    name, count, side = data_config.name, data_config.generated_examples, data_config.image_size
    allowed = f'0 for data.name={name!r}: only {table.known_names()} can be generated'
    require(name in table.DATASETS, 'data.generated_examples', count, allowed)
    spec = table.DATASETS[name]
    if side:
        spec = dataclasses.replace(spec, image_shape=(side, side, 3))
    # At least one test image of every class, but a thousand large ones would take long.
    num_test = max(count // 4, 1 if spec.streamed else spec.num_classes)
    spec = dataclasses.replace(spec, num_train=count, num_test=num_test, streamed=False)
    label_names = tuple(str(label) for label in range(spec.num_classes))

    def load() -> Loaded:
        seed = data_config.subset_seed
        return Loaded({split: resident.generate(spec, split, seed) for split in ('train', 'test')})

    return _Found(spec, label_names, load)


def _folder(data_config: config_dict.ConfigDict, crop: float | None) -> _Found:
    label_names, files, notes = image_folder.find(
        data_config.root, data_config.subset_seed, not data_config.validation_fraction
    )
    for note in notes:
        print(note)
    streamed, side, skip = data_config.stream, data_config.image_size, data_config.skip_unreadable
    chosen = data_config.augment != 'default'
    shape = (0, 0, 3) if streamed else folder_reader.image_shape(files['train'], side)

    def load() -> Loaded:
        if not streamed:
            return folder_reader.read_all(files, shape, side, crop or 1.0, skip)
        # A student that is evaluated, with its own crop, has its own mean and deviation.
        counted = (side or _STREAMED_SIDE) if chosen and crop is None else 0
        return folder_reader.check(files, counted, skip)

    spec = table.DatasetSpec(
        name=table.IMAGE_FOLDER,
        num_classes=len(label_names),
        image_shape=shape,
        num_train=len(files['train']),
        num_test=len(files['test']),
        padding=table.default_padding(shape),
    )
    crop_of_stream = crop or (1.0 if chosen else table.EVALUATION_CROP)
    return _Found(spec, label_names, load, crop_of_stream, len(files.get('validation', ())))


def _prepared(data_config: config_dict.ConfigDict) -> _Found:
    from one_jax.data import prepared  # Imports TFDS.

    builder = prepared.find(data_config.name, data_config.data_dir, table.is_streamed(data_config))
    spec = prepared.describe(data_config.name, builder)
    names = {'train': spec.train_split, 'test': spec.test_split}
    if spec.test_split.startswith('train'):
        print(f'data.name={spec.name!r} has no test images: {names} are used')
    reader = TFRecords if table.is_streamed(data_config) else prepared.read_split
    label_names = tuple(builder.info.features['label'].names)

    def load() -> Loaded:
        return Loaded({split: reader(builder, name) for split, name in names.items()})

    return _Found(spec, label_names, load)


def _check_memory(
    spec: table.DatasetSpec, data_config: config_dict.ConfigDict, num_validation: int
) -> None:
    # A selection is a copy of images that stay in memory meanwhile.
    copies = 2 if data_config.validation_fraction or data_config.examples_per_class else 1
    num_images = copies * spec.num_train + spec.num_test + num_validation
    height, width, channels = spec.image_shape
    # Each image takes its label and its place in an epoch's order too.
    needed = num_images * (height * width * channels + 12)
    available = memory.available_bytes()
    if available is not None and needed > available:
        raise UserError(
            f'data.name={spec.name!r} needs {memory.readable_size(needed)} of memory ({num_images} '
            f'images of {height}x{width}), but {memory.readable_size(available)} are available: '
            'free some, or lower data.image_size or data.generated_examples'
        )
