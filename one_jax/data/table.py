"""What is known of a data set without reading it, and the table of the known ones."""

import dataclasses

from one_jax.data import image_folder
from one_jax.data.builders import cinic10, mnist5k

AUGMENTATIONS = ('none', 'pad_crop', 'pad_crop_flip')


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """What is known of a data set without reading its images.

    Attributes:
      name: value of `data.name`.
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
      source: TFDS's name of the set, where it has another one.
      streamed: whether it is too large for memory; its images may differ in size on disk.
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
    source: str = ''
    streamed: bool = False


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

# The reference code normalises SVHN by these, and crops and flips nothing.
_SVHN = {
    'source': 'svhn_cropped',
    'num_classes': 10,
    'image_shape': (32, 32, 3),
    'num_test': 26_032,
    'mean': (0.5,) * 3,
    'std': (0.2,) * 3,
    'padding': 4,
}

_CINIC10 = {
    'source': cinic10.NAME,
    'num_classes': len(cinic10.CLASSES),
    'image_shape': (cinic10.IMAGE_SIZE, cinic10.IMAGE_SIZE, 3),
    'num_test': 90_000,
    'mean': (0.47889522, 0.47227842, 0.43047404),
    'std': (0.24205776, 0.23828046, 0.25874835),
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
        DatasetSpec(name='svhn', num_train=604_388, train_split='train+extra', **_SVHN),
        DatasetSpec(name='svhn_train', num_train=73_257, **_SVHN),
        DatasetSpec(name='cinic10', num_train=90_000, **_CINIC10),
        DatasetSpec(
            name='cinic10_train_valid', num_train=180_000, train_split='train+valid', **_CINIC10
        ),
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
        # Classes, sizes and statistics are those of the folder; these are for generated images.
        DatasetSpec(
            name=image_folder.NAME,
            num_classes=10,
            image_shape=(32, 32, 3),
            num_train=0,
            num_test=0,
            padding=4,
        ),
    )
}
