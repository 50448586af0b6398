"""Images per second and core of the input: streamed JPEGs, and images in memory.

python -m benchmarks.input [--images=2000]

Streamed: generated JPEGs of 400x350 pixels in TFRecord files, read from the page cache and turned
into training batches of 128x224x224x3. Resident: batches of 128x32x32x3 gathered in numpy, then
padded, cropped, mirrored and normalised by one compiled program. Both rates are per second of
processor time over all threads, so other work on the machine does not count.
"""

import io
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds
from absl import app, flags
from PIL import Image

from one_jax.data import augment, jpeg, resident, streaming
from one_jax.data.tfrecord import TFRecords

BATCH_SIZE, IMAGE_SIZE = 128, 224
HEIGHT, WIDTH = 350, 400
# Distinct pictures; further images are copies.
PICTURES = 64
RESIDENT_REPEATS = 20
PADDING = 4

IMAGES = flags.DEFINE_integer('images', 2000, 'How many JPEGs to write and to stream.', 256)


def generated_jpegs() -> list[bytes]:
    """Returns JPEGs with the structure of photographs (large shapes, fine grain), 55 kB each."""
    generator = np.random.default_rng(0)
    encoded = []
    for _ in range(PICTURES):
        shapes = Image.fromarray(generator.integers(0, 256, (35, 40, 3), np.uint8))
        pixels = np.asarray(shapes.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.int16)
        grain = generator.integers(-12, 13, pixels.shape, np.int16)
        data = io.BytesIO()
        Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8)).save(
            data, 'JPEG', quality=90
        )
        encoded.append(data.getvalue())
    return encoded


def write_records(directory: str, count: int) -> tfds.core.DatasetBuilder:
    """Prepares the generated JPEGs in TFDS's format, in 16 TFRecord files."""

    class GeneratedJpegs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version('1.0.0')
        code_path = None
        name = 'generated_jpegs'

        def _info(self) -> tfds.core.DatasetInfo:
            features = {
                'image': tfds.features.Image(encoding_format='jpeg'),
                'label': tfds.features.ClassLabel(num_classes=PICTURES),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
            return {'train': self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict]]:
            jpegs = generated_jpegs()
            for index in range(count):
                picture = index % PICTURES
                yield index, {'image': io.BytesIO(jpegs[picture]), 'label': picture}

    builder = GeneratedJpegs(data_dir=directory, file_format='tfrecord')
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=16))
    return builder


def rate(work: Callable[[], int]) -> float:
    """Returns images per second of processor time; `work` returns how many images it handled."""
    started = time.process_time()
    images = work()
    return images / (time.process_time() - started)


def streamed_rate(count: int) -> float:
    """Returns the rate of the streamed pipeline after its first batch."""
    with tempfile.TemporaryDirectory() as directory:
        builder = write_records(directory, count)
        encoded = TFRecords(builder, 'train')
        batches = streaming.StreamedBatches(encoded, BATCH_SIZE, 0, IMAGE_SIZE)
        iterator = batches.iterate(0)
        next(iterator)
        steps = count // BATCH_SIZE
        return rate(lambda: sum(len(b['label']) for b in itertools.islice(iterator, steps)))


def resident_rate() -> float:
    """Returns the rate of gathered and augmented batches in memory."""
    generator = np.random.default_rng(0)
    examples = resident.Examples(
        generator.integers(0, 256, (10_000, 32, 32, 3), np.uint8), np.zeros(10_000, np.int32)
    )
    batches = resident.ResidentBatches(examples, BATCH_SIZE, seed=0)

    @jax.jit
    def transform(key: jax.Array, images: jax.Array) -> jax.Array:
        offsets, flips = augment.draw_crops(key, len(images), PADDING, flip=True)
        images = augment.crop_and_flip(images, offsets, flips, PADDING)
        return augment.normalise(images, (0.5,) * 3, (0.25,) * 3, np.float32)

    key = jax.random.key(0)
    transform(key, batches.batch(0)['image']).block_until_ready()

    def work() -> int:
        steps = RESIDENT_REPEATS * batches.steps_per_epoch
        for step in range(steps):
            images = transform(jax.random.fold_in(key, step), batches.batch(step)['image'])
            images.block_until_ready()
        return steps * BATCH_SIZE

    return rate(work)


def main(_: list[str]) -> None:
    """Measures both paths and prints a line for each."""
    tf = jpeg.import_tensorflow()
    print(f'{os.cpu_count()} cores, JAX {jax.__version__}, TensorFlow {tf.__version__}')
    streamed = streamed_rate(IMAGES.value)
    print(f'streamed, {WIDTH}x{HEIGHT} JPEGs to {IMAGE_SIZE}: {streamed:,.0f} images/s/core')
    print(f'resident, 32x32, gathered and augmented: {resident_rate():,.0f} images/s/core')


if __name__ == '__main__':
    app.run(main)
