"""Checks that exported files compute what the network in training computes."""

import contextlib
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from one_jax import data
from one_jax.errors import UserError, require
from one_jax.students import classes

NUM_IMAGES = 1000
_BATCH_SIZE = 100
# For float32 weights, relative to the largest logit if that is above 1.
TOLERANCE = 1e-4

Predict = Callable[[np.ndarray], Any]


class Images(NamedTuple):
    """Images uint8 [N, H, W, 3] to compare on, and their labels [N]; None for random images."""

    images: np.ndarray
    labels: np.ndarray | None


def load_images(data_config: Any, description: Mapping[str, Any], required: bool) -> Images:
    """Reads up to 1,000 test images, or draws 100 random ones if the data set is not on disk.

    If `required`, raises `UserError` if it is missing or differs from the run's `description`.
    """
    try:
        source = data.open(data_config)
        for field in ('image_shape', 'num_classes'):
            found, expected = getattr(source.spec, field), description[field]
            allowed = f'{expected}, as in training'
            require(np.array_equal(found, expected), f'data set: {field}', found, allowed)
        names = description['label_names'], source.label_names
        order = classes.match(*names, 'data set', source.spec.name)
        order = np.arange(len(source.label_names)) if order is None else np.asarray(order)
        examples = source.examples('test')
        if examples is not None:
            # Spread over the split, which may be sorted by class.
            places = np.linspace(0, len(examples) - 1, min(len(examples), NUM_IMAGES))
            chosen = examples.take(places.round().astype(int))
            return Images(chosen.images, order[chosen.labels])
        batches = source.evaluation_batches('test', _BATCH_SIZE)
        batches = list(itertools.islice(batches, NUM_IMAGES // _BATCH_SIZE))
        images, labels, mask = (
            np.concatenate([batch[name] for batch in batches])
            for name in ('image', 'label', 'mask')
        )
        return Images(images[mask > 0], order[labels[mask > 0]])
    except UserError as error:
        if required:
            raise
        print(f'note: random images in place of the test images for the self-check: {error}')
    return random_images(description['image_shape'], _BATCH_SIZE)


def random_images(image_shape: tuple[int, int, int], number: int) -> Images:
    """Draws images [number, H, W, 3], the same ones on every call."""
    shape = (number, *image_shape)
    return Images(np.random.default_rng(0).integers(0, 256, shape, np.uint8), None)


def run(predict: Predict, images: np.ndarray) -> np.ndarray:
    """Computes logits [N, C] of images [N, H, W, 3], in batches of one size."""
    batch_size = min(_BATCH_SIZE, len(images))
    padded = np.pad(images, [(0, -len(images) % batch_size), (0, 0), (0, 0), (0, 0)])
    batches = np.split(padded, len(padded) // batch_size)
    return np.concatenate([predict(batch) for batch in batches])[: len(images)]


def compare(
    formats: Mapping[str, Predict], reference: Predict, rounded: bool, examples: Images
) -> dict[str, Any]:
    """Runs every written format and the network in training, `reference`, on the same images.

    Raises `RuntimeError` if a format computes something else. If the weights are `rounded`, stored
    in fewer bits than float32, the first format may, and the others must agree with the first.

    Returns:
      `checks` of config.json: `split` ('test' or 'random'), `num_images`, `largest_logit` and
      `top1` of the reference; and in `formats` for each its `largest_difference` from the
      reference, the percentage of images with the same argmax, `same_argmax`, and `top1`.
    """
    images, labels = examples

    def top1(logits: np.ndarray) -> float | None:
        return None if labels is None else 100 * float((logits.argmax(-1) == labels).mean())

    # Accelerators round float32 products; a JAX without the CPU has no other choice.
    device = contextlib.nullcontext()
    with contextlib.suppress(RuntimeError):
        device = jax.default_device(jax.local_devices(backend='cpu')[0])
    with device:
        expected = run(reference, images)
        logits = {name: run(predict, images) for name, predict in formats.items()}
    baseline = next(iter(logits.values())) if rounded else expected
    measured = {}
    for name, actual in logits.items():
        difference = np.abs(actual - baseline).max()
        if not difference <= TOLERANCE * max(1, np.abs(baseline).max()):
            raise RuntimeError(f'{name} differs from the network in training by {difference}')
        measured[name] = {
            'largest_difference': float(np.abs(actual - expected).max()),
            'same_argmax': 100 * float((actual.argmax(-1) == expected.argmax(-1)).mean()),
            'top1': top1(actual),
        }
    return {
        'split': 'random' if labels is None else 'test',
        'num_images': len(images),
        'top1': top1(expected),
        'largest_logit': float(np.abs(expected).max()),
        'formats': measured,
    }


def summary(checks: Mapping[str, Any]) -> str:
    """Formats the outcome of `compare` as text, a line for each format."""
    kind = 'test images' if checks['split'] == 'test' else 'random images, not of the data set'
    lines = [f'checked on {checks["num_images"]} {kind}, against the network in training:']
    for name, check in checks['formats'].items():
        difference, same = check['largest_difference'], check['same_argmax']
        line = f'  {name}: largest difference {difference:.2g}, the same class for {same:.2f} %'
        if check['top1'] is not None:
            line += f', top-1 {check["top1"]:.2f} % (in training {checks["top1"]:.2f} %)'
        lines.append(line)
    return '\n'.join(lines)
