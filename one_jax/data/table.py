"""The known data sets: names, sizes, normalisation statistics and augmentation."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

AUGMENTATIONS = ('none', 'pad_crop', 'pad_crop_flip')
# Evaluation of streamed images crops this share of the resized image's shorter side.
EVALUATION_CROP = 0.875
IMAGE_FOLDER = 'image_folder'
MNIST5K = 'mnist5k'
CINIC10 = 'cinic10'
CIFAR10_CLASSES = tuple(
    'airplane automobile bird cat deer dog frog horse ship truck'.split()  # noqa: SIM905
)


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """Describes a data set."""

    # Value of `data.name`.
    name: str
    num_classes: int
    # (H, W, 3); of a streamed set, the shape of its crops.
    image_shape: tuple[int, int, int]
    # Images in each split, before any are held out or left out.
    num_train: int
    num_test: int
    # Statistics of each channel on the [0, 1] scale; None until `open` computes them.
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    # One of `AUGMENTATIONS`.
    augment: str = 'none'
    # Pixels of zeros around an image before it is cropped.
    padding: int = 0
    # TFDS's names of the splits, or expressions.
    train_split: str = 'train'
    test_split: str = 'test'
    # TFDS's name of the set, if it differs from `name`.
    source: str = ''
    # Whether images are decoded while training; they may differ in size on disk.
    streamed: bool = False


_small_images = functools.partial(DatasetSpec, image_shape=(32, 32, 3), padding=4)

# Both CIFAR sets are normalised as in the reference code.
_cifar = functools.partial(
    _small_images,
    num_train=50_000,
    num_test=10_000,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2023, 0.1994, 0.2010),
    augment='pad_crop_flip',
)

# Normalised as in the reference code, which neither crops nor flips.
_svhn = functools.partial(
    _small_images,
    source='svhn_cropped',
    num_classes=10,
    num_test=26_032,
    mean=(0.5,) * 3,
    std=(0.2,) * 3,
)

_cinic10 = functools.partial(
    _small_images,
    source=CINIC10,
    num_classes=len(CIFAR10_CLASSES),
    num_test=90_000,
    mean=(0.47889522, 0.47227842, 0.43047404),
    std=(0.24205776, 0.23828046, 0.25874835),
    augment='pad_crop_flip',
)

DATASETS = {
    spec.name: spec
    for spec in (
        DatasetSpec(
            name=MNIST5K,
            num_classes=10,
            image_shape=(28, 28, 3),
            num_train=4_000,
            num_test=1_000,
            mean=(0.1309,) * 3,
            std=(0.3080,) * 3,
            augment='pad_crop',
            padding=2,
        ),
        _cifar(name='cifar10', num_classes=10),
        _cifar(name='cifar100', num_classes=100),
        _svhn(name='svhn', num_train=604_388, train_split='train+extra'),
        _svhn(name='svhn_train', num_train=73_257),
        _cinic10(name=CINIC10, num_train=90_000),
        _cinic10(name='cinic10_train_valid', num_train=180_000, train_split='train+valid'),
        DatasetSpec(
            name='imagenet2012',
            num_classes=1000,
            image_shape=(224, 224, 3),
            num_train=1_281_167,
            num_test=50_000,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            test_split='validation',
            streamed=True,
        ),
        # For generated images only: a real folder determines its own classes and sizes.
        _small_images(name=IMAGE_FOLDER, num_classes=10, num_train=0, num_test=0),
    )
}


def tfds_name(name: str) -> str:
    """Returns TFDS's name of a data set."""
    return (DATASETS[name].source if name in DATASETS else '') or name


def is_streamed(data_config: Mapping[str, Any]) -> bool:
    """Returns whether images are decoded while training: on request, or for sets too large."""
    known = DATASETS.get(data_config['name'])
    streamed = data_config['stream'] or (known is not None and known.streamed)
    return bool(streamed and not data_config['generated_examples'])


def resizes(data_config: Mapping[str, Any]) -> bool:
    """Returns whether `image_size` applies: to folders, streams, and what stands in for them."""
    known = DATASETS.get(data_config['name'])
    in_place = known is not None and known.streamed
    return data_config['name'] == IMAGE_FOLDER or in_place or is_streamed(data_config)


def default_padding(image_shape: tuple[int, int, int]) -> int:
    """Returns the padding of CIFAR, 4 of 32 pixels, for images of another size."""
    return min(image_shape[:2]) // 8


def known_names() -> str:
    """Returns the names of all known data sets, for messages."""
    return ', '.join(repr(name) for name in DATASETS)
