"""The undamaged inputs: a folder of images, a run, its student, and a TFRecord set."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from benchmarks.bad_inputs import runner

CLASSES = ('cat', 'dog', 'fox')
SIDE = 8
# A plain ResNet-8 for a few steps.
RECIPE = (
    'main',
    '--config=configs/image_folder.py:plain',
    '--config.model.name=resnet8',
    f'--config.data.image_size={SIDE}',
    '--config.data.batch_size=4',
    '--config.data.eval_batch_size=4',
    '--config.optimizer.warmup_epochs=0',
    '--config.train.steps=6',
)
WORKDIR = '--workdir={output}'
TRAIN = (*RECIPE, '--config.data.root={images}')
STREAM = '--config.data.stream=True'
# The same for the options of a recipe, on generated images.
SMALL = ('--config.data.image_size=8', '--config.optimizer.warmup_epochs=0')
GENERATED = ('--config=configs/image_folder.py:smoke', *SMALL)


def pixels(seed: int = 0, side: int = SIDE) -> np.ndarray:
    """Returns random pixels uint8 [side, side, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


def write_images(folder: Path, train: int = 4, test: int = 2) -> None:
    """Writes a folder of images with train/<class>/ and test/<class>/."""
    for split, count in (('train', train), ('test', test)):
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                image = Image.fromarray(pixels(100 * label + index))
                image.save(folder / split / name / f'{index}.png')


NAMES = ('images', 'run', 'unfinished', 'student', 'folded', 'records')


def make(places: Mapping[str, Path]) -> None:
    """Makes all `NAMES` at their places, by the commands themselves.

    Raises:
      RuntimeError: a command failed on an undamaged input.
    """
    tfds.disable_progress_bar()
    folder = places['run'].parent
    write_images(places['images'])
    write_records(places['records'])
    for command in (
        (*TRAIN, '--workdir={run}'),
        ('export', '--workdir={run}', '--output={student}'),
        ('export', '--workdir={run}', '--output={folded}', '--weights=int8', '--fold_batch_norm'),
    ):
        outcome = runner.run(runner.fill(command, places), folder)
        if outcome.status != 0:
            raise RuntimeError(f'{command} failed on undamaged inputs: {outcome.errors}')
    shutil.copytree(places['run'], places['unfinished'])
    (places['unfinished'] / 'result.json').unlink()
    steps = sorted((places['unfinished'] / 'checkpoints').iterdir(), key=lambda p: int(p.name))
    shutil.rmtree(steps[-1])


def write_records(data_dir: Path) -> None:
    """Prepares `tiny`, 12 training and 6 test images in TFRecord files of two shards each."""

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version('1.0.0')
        code_path = None

        def _info(self) -> tfds.core.DatasetInfo:
            features = {
                'image': tfds.features.Image(shape=(SIDE, SIDE, 3)),
                'label': tfds.features.ClassLabel(names=CLASSES),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
            return {split: self._generate_examples(n) for split, n in (('train', 12), ('test', 6))}

        def _generate_examples(self, count: int) -> Iterator[tuple[int, dict]]:
            for index in range(count):
                yield index, {'image': Image.fromarray(pixels(index)), 'label': index % 3}

    Tiny.name = 'tiny'
    Tiny(data_dir=str(data_dir), file_format='tfrecord').download_and_prepare(
        download_dir=str(data_dir / 'downloads'),
        download_config=tfds.download.DownloadConfig(num_shards=2),
    )


def copy(base: Path, change: Callable[[Path], None], name: str = '') -> Callable[[Path], None]:
    """Returns a function that copies `base` into a folder (as `name`), and changes the copy."""

    def make(folder: Path) -> None:
        shutil.copytree(base, folder / name, dirs_exist_ok=True)
        change(folder / name)

    return make


def in_turn(*changes: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Returns a function that makes several changes to a folder."""

    def apply(folder: Path) -> None:
        for change in changes:
            change(folder)

    return apply


def write(name: str, content: bytes = b'') -> Callable[[Path], None]:
    """Returns a function that puts a file into a folder, in place of what has its name."""
    put = lambda folder: (folder / name).write_bytes(content)  # noqa: E731
    return in_turn(remove(name), put)


def link(name: str, target: str) -> Callable[[Path], None]:
    """Returns a function that puts a link into a folder, in place of what has its name."""
    put = lambda folder: (folder / name).symlink_to(target)  # noqa: E731
    return in_turn(remove(name), put)


def edit(file: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Returns a function that replaces the bytes of a file in a folder; `file` may be a pattern."""

    def apply(folder: Path) -> None:
        path = next(iter(sorted(folder.glob(file))))
        path.write_bytes(change(path.read_bytes()))

    return apply


def edit_json(file: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Returns a function that changes the content of a JSON file in a folder."""

    def apply(content: bytes) -> bytes:
        value = json.loads(content)
        changed = change(value)
        return json.dumps(value if changed is None else changed).encode()

    return edit(file, apply)


def set_field(field: str, value: Any) -> Callable[[Any], None]:
    """Returns a function that sets a dotted field of nested objects."""
    *groups, last = field.split('.')

    def apply(content: Any) -> None:
        for group in groups:
            content = content[group]
        content[last] = value

    return apply


def remove_field(field: str) -> Callable[[Any], None]:
    """Returns a function that removes a dotted field of nested objects."""
    *groups, last = field.split('.')

    def apply(content: Any) -> None:
        for group in groups:
            content = content[group]
        del content[last]

    return apply


def remove(name: str) -> Callable[[Path], None]:
    """Returns a function that removes a file or folder from a folder; `name` may be a pattern."""

    def apply(folder: Path) -> None:
        for path in sorted(folder.glob(name)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return apply


def replace_by_folder(name: str) -> Callable[[Path], None]:
    """Returns a function that replaces a file of a folder by an empty folder."""

    return in_turn(remove(name), lambda folder: (folder / name).mkdir())


def flip(at: float, bit: int = 0) -> Callable[[bytes], bytes]:
    """Returns a function that flips a bit of the byte at a share of the length."""

    def apply(content: bytes) -> bytes:
        index = int(at * (len(content) - 1))
        return content[:index] + bytes([content[index] ^ 1 << bit]) + content[index + 1 :]

    return apply


def cut(share: float) -> Callable[[bytes], bytes]:
    """Returns a function that keeps a share of the bytes."""
    return lambda content: content[: int(share * len(content))]


# Contents that are no JSON object.
NOT_OBJECTS = {
    'empty': b'',
    'binary': bytes(range(256)),
    'null': b'null',
    'list': b'[]',
    'number': b'1e999',
    'text': b'"config"',
    'open': b'{"a": ',
    'not UTF-8': '{"é": 1}'.encode('latin-1'),
    'deep': b'[' * 100_000 + b']' * 100_000,
    'huge integer': b'{"a": ' + b'1' * 5000 + b'}',
}
