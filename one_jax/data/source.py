"""Opens the configured data set: a prepared TFDS set, a folder of images, or generated images."""

import abc
import dataclasses
import functools
import multiprocessing.pool
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import config_dict

from one_jax.data import image_folder, resident, table
from one_jax.data.batches import Batch
from one_jax.data.resident import Examples, ResidentBatches
from one_jax.data.streaming import EncodedExamples, StreamedBatches, streamed_evaluation_batches
from one_jax.data.tfrecord import TFRecords
from one_jax.errors import UserError, explain, require
from one_jax.runtime import memory

# Of a streamed set, the beginnings of so many files are part of its fingerprint.
_FILES_READ, _BYTES_READ = 1000, 2**16


@dataclasses.dataclass(frozen=True, eq=False)
class Source(abc.ABC):
    """An opened data set: its description, with `mean` and `std`, and the names of its classes."""

    spec: table.DatasetSpec
    label_names: tuple[str, ...]

    @property
    def evaluation_splits(self) -> tuple[str, ...]:
        """The splits to evaluate: 'validation', if images are held out, then 'test'."""
        return ('test',)

    @property
    def crop(self) -> float:
        """The share of an image's shorter side that evaluation sees."""
        return 1.0

    def examples(self, split: str) -> Examples | None:
        """Returns a split in memory, or None if it is streamed."""
        return None

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What tells this data set from another one, wherever it lies; JSON values.

        Covers the names of the classes and, of every split, the number and the content of its
        examples: a checksum of all pixels and labels in memory (1 s per gigabyte). Of a streamed
        split, the names and sizes of all its files, and the beginnings of 1,000 of them.
        """
        return {'label_names': list(self.label_names), **self._contents()}

    @abc.abstractmethod
    def _contents(self) -> dict[str, str]:
        """Describes the content of every split."""

    def facts(self) -> dict[str, Any]:
        """Returns what all processes must agree on."""
        return {**dataclasses.asdict(self.spec), **self.fingerprint}

    def description(self) -> dict[str, Any]:
        """Returns what checkpoints and students record about the data."""
        fields = ('num_classes', 'image_shape', 'mean', 'std')
        return {
            **{field: getattr(self.spec, field) for field in fields},
            'crop': self.crop,
            'label_names': list(self.label_names),
        }

    @abc.abstractmethod
    def train_batches(self, batch_size: int, seed: int) -> ResidentBatches | StreamedBatches:
        """Returns this process's share of shuffled batches of the train split."""

    @abc.abstractmethod
    def evaluation_batches(self, split: str, batch_size: int) -> Iterator[Batch]:
        """Yields every example of a split once over all processes, the last batch padded."""


@dataclasses.dataclass(frozen=True, eq=False)
class ResidentSource(Source):
    """A data set in memory: `splits` are 'train', 'test' and, if held out, 'validation'."""

    splits: Mapping[str, Examples]

    @property
    def evaluation_splits(self) -> tuple[str, ...]:
        return tuple(split for split in ('validation', 'test') if split in self.splits)

    def examples(self, split: str) -> Examples:
        return self.splits[split]

    def _contents(self) -> dict[str, str]:
        return {name: _content(len(x), x.checksum()) for name, x in self.splits.items()}

    def train_batches(self, batch_size: int, seed: int) -> ResidentBatches:
        return ResidentBatches(self.splits['train'], batch_size, seed)

    def evaluation_batches(self, split: str, batch_size: int) -> Iterator[Batch]:
        return resident.evaluation_batches(self.splits[split], batch_size)


@dataclasses.dataclass(frozen=True, eq=False)
class StreamedSource(Source):
    """A data set decoded while training: splits as in `ResidentSource`, in encoded form."""

    encoded: Mapping[str, EncodedExamples]
    # (image_size, decode_threads, prefetch), see `StreamedBatches`.
    decoding: tuple[int, int, int]
    # Of training and evaluation; None: as usual for ImageNet, see `jpeg`.
    crops: tuple[float | None, float | None] = (None, None)

    @property
    def evaluation_splits(self) -> tuple[str, ...]:
        return tuple(split for split in ('validation', 'test') if split in self.encoded)

    @property
    def crop(self) -> float:
        return self.crops[1] or table.EVALUATION_CROP

    def _contents(self) -> dict[str, str]:
        return {
            name: _content(sum(x.shard_lengths), _files_checksum(x.paths))
            for name, x in self.encoded.items()
        }

    def train_batches(self, batch_size: int, seed: int) -> StreamedBatches:
        encoded = self.encoded['train']
        return StreamedBatches(encoded, batch_size, seed, *self.decoding, self.crops[0])

    def evaluation_batches(self, split: str, batch_size: int) -> Iterator[Batch]:
        encoded = self.encoded[split]
        return streamed_evaluation_batches(encoded, batch_size, *self.decoding, self.crops[1])


def _content(count: int, checksum: int) -> str:
    return f'{count} images (checksum {checksum:08x})'


def _files_checksum(paths: Sequence[str | os.PathLike]) -> int:
    stride = -(-len(paths) // _FILES_READ)

    def describe(index: int) -> bytes:
        path, head = os.fspath(paths[index]), b''
        if index % stride == 0:
            with Path(path).open('rb') as file:
                head = file.read(_BYTES_READ)
        # The names of the file and of its folder.
        *_, folder, name = path.rsplit(os.sep, 2)
        return os.fsencode(f'{folder}/{name} {os.stat(path).st_size} {zlib.crc32(head)}')

    checksum = 0
    with (
        explain('the data set cannot be read', OSError),
        multiprocessing.pool.ThreadPool() as pool,
    ):
        for line in pool.imap(describe, range(len(paths)), chunksize=100):
            checksum = zlib.crc32(line, checksum)
    return checksum


def exists(data_config: config_dict.ConfigDict) -> bool:
    """Returns whether the configured data set is on disk, or can be made; reads no image."""
    name = data_config.name
    if data_config.generated_examples or name == table.MNIST5K:
        return True
    if name == table.IMAGE_FOLDER:
        return bool(data_config.root) and Path(data_config.root).expanduser().exists()
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
    if data_config.generated_examples:
        found = _generated(data_config)
    elif data_config.name == table.IMAGE_FOLDER:
        found = _folder(data_config, crop)
    else:
        found = _prepared(data_config)
    spec, streamed = found.spec, table.is_streamed(data_config)
    augment, padding = data_config.augment, data_config.padding
    if streamed:
        imagenet = table.DATASETS['imagenet2012']
        side = data_config.image_size or imagenet.image_shape[0]
        spec = dataclasses.replace(
            spec,
            image_shape=(side, side, 3),
            # Decoding crops and flips, unless another augmentation is chosen.
            augment='none',
            padding=table.default_padding((side, side, 3)),
            streamed=True,
            # As usual, ImageNet's statistics stand in for unknown ones.
            mean=spec.mean or imagenet.mean,
            std=spec.std or imagenet.std,
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
    splits = {split: found.read(split) for split in found.splits}
    if streamed:
        decoding = spec.image_shape[0], data_config.decode_threads, data_config.prefetch
        # A chosen augmentation takes the images that a set in memory would take.
        crops = (None, found.crop) if augment == 'default' else (1.0, found.crop or 1.0)
        return StreamedSource(spec, found.label_names, splits, decoding, crops)
    if spec.mean is None:
        mean, std = resident.channel_statistics(splits['train'].images)
        spec = dataclasses.replace(spec, mean=mean, std=std)
    splits |= resident.select(splits['train'], found.label_names, data_config)
    return ResidentSource(spec, found.label_names, splits)


class _Found(NamedTuple):
    """A data set before its images are read; `read` maps each of `splits` to its examples."""

    spec: table.DatasetSpec
    label_names: tuple[str, ...]
    read: Callable[[str], Any]
    splits: tuple[str, ...] = ('train', 'test')
    # Of evaluation images of a stream, see `StreamedSource.crops`.
    crop: float | None = None
    num_validation: int = 0


def _generated(data_config: config_dict.ConfigDict) -> _Found:
    name, count, side = data_config.name, data_config.generated_examples, data_config.image_size
    allowed = f'0 for data.name={name!r}: only {table.known_names()} can be generated'
    require(name in table.DATASETS, 'data.generated_examples', count, allowed)
    spec = table.DATASETS[name]
    if name == table.IMAGE_FOLDER and side:
        spec = dataclasses.replace(spec, image_shape=(side, side, 3))
    # At least one test image of every class, but a thousand large ones would take long.
    num_test = max(count // 4, 1 if spec.streamed else spec.num_classes)
    spec = dataclasses.replace(spec, num_train=count, num_test=num_test, streamed=False)
    label_names = tuple(str(label) for label in range(spec.num_classes))
    read = functools.partial(resident.generate, spec, seed=data_config.subset_seed)
    return _Found(spec, label_names, read)


def _folder(data_config: config_dict.ConfigDict, crop: float | None) -> _Found:
    label_names, files, notes = image_folder.find(
        data_config.root, data_config.subset_seed, not data_config.validation_fraction
    )
    for note in notes:
        print(note)
    streamed, side = data_config.stream, data_config.image_size
    if streamed:
        image_folder.check(files.values())
    shape = (0, 0, 3) if streamed else image_folder.image_shape(files['train'], side)
    spec = table.DatasetSpec(
        name=table.IMAGE_FOLDER,
        num_classes=len(label_names),
        image_shape=shape,
        num_train=len(files['train']),
        num_test=len(files['test']),
        padding=table.default_padding(shape),
    )

    def read(split: str) -> Examples | EncodedExamples:
        if streamed:
            return files[split]
        return image_folder.read_all(files[split], shape, side, crop or 1.0)

    crop_of_stream = crop or (table.EVALUATION_CROP if data_config.augment == 'default' else 1.0)
    num_validation = len(files.get('validation', ()))
    return _Found(spec, label_names, read, tuple(files), crop_of_stream, num_validation)


def _prepared(data_config: config_dict.ConfigDict) -> _Found:
    from one_jax.data import prepared  # Imports TFDS.

    builder = prepared.find(data_config.name, data_config.data_dir, table.is_streamed(data_config))
    spec = prepared.describe(data_config.name, builder)
    names = {'train': spec.train_split, 'test': spec.test_split}
    if spec.test_split.startswith('train'):
        print(f'data.name={spec.name!r} has no test images: {names} are used')
    reader = TFRecords if table.is_streamed(data_config) else prepared.read_split
    label_names = tuple(builder.info.features['label'].names)
    return _Found(spec, label_names, lambda split: reader(builder, names[split]))


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
