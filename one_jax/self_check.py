"""Whether what is exported computes what the network in training did, on the run's test images."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict

from one_jax import evaluate, methods, models
from one_jax.data import augment, datasets
from one_jax.errors import UserError

NUM_IMAGES = 1000
_BATCH_SIZE = 100
# Of float32 weights, relative to the largest logit where that is above 1.
TOLERANCE = 1e-4

Predict = Callable[[np.ndarray], Any]


class Images(NamedTuple):
    """What is checked on.

    Attributes:
      images: uint8 [N, H, W, 3].
      labels: [N], or None of random images.
    """

    images: np.ndarray
    labels: np.ndarray | None


def load_images(data_config: Any, description: Mapping[str, Any], required: bool) -> Images:
    """Up to 1,000 images of a run's test split, or 100 random ones where the data set is not here.

    Args:
      data_config: `config.data` of the run.
      description: what the run noted of its data: 'image_shape' and 'num_classes'.
      required: whether it is an error that the data set is not here.

    Raises:
      UserError: `required`, and the data set is not here or is another one.
    """
    height, width, _ = description['image_shape']
    try:
        dataset = datasets.load(data_config)
        found = [list(dataset.spec.image_shape), dataset.spec.num_classes]
        wanted = [list(description['image_shape']), description['num_classes']]
        if found != wanted:
            raise UserError(f'image shape and classes are {found} and were {wanted} in training')
        return _test_images(dataset)
    except UserError as error:
        if required:
            raise
        print(f'note: random images in place of the test images for the self-check: {error}')
    shape = (_BATCH_SIZE, height, width, 3)
    return Images(np.random.default_rng(0).integers(0, 256, shape, np.uint8), None)


def _test_images(dataset: datasets.Dataset | datasets.StreamedDataset) -> Images:
    if isinstance(dataset, datasets.Dataset):
        # Spread over the split, which may be sorted by class.
        number = len(dataset.splits['test'])
        chosen = np.linspace(0, number - 1, min(number, NUM_IMAGES)).round().astype(int)
        examples = dataset.splits['test'].take(chosen)
        return Images(examples.images, examples.labels)
    batches = dataset.evaluation_batches('test', _BATCH_SIZE)
    batches = list(itertools.islice(batches, NUM_IMAGES // _BATCH_SIZE))
    images, labels, mask = (
        np.concatenate([batch[name] for batch in batches]) for name in ('image', 'label', 'mask')
    )
    return Images(images[mask > 0], labels[mask > 0])


def training_logits(
    config: Any,
    method: methods.Method,
    variables: Any,
    branch: int | str,
    description: Mapping[str, Any],
) -> Predict:
    """The outputs of the network in training, at evaluation and in float32.

    Args:
      config: of the run.
      method: of the run.
      variables: of the run, float32.
      branch: from 0; 'ensemble', the mean of the branches; or 'teacher'.
      description: what the run noted of its data: 'num_classes', 'mean' and 'std'.

    Returns:
      A function of uint8 images [B, H, W, 3] that gives logits [B, C].
    """
    model_config = config_dict.ConfigDict({**config.model.to_dict(), 'dtype': 'float32'})
    model_config.share_stages = method.share_stages
    network = models.make_network(model_config, description['num_classes'], method)
    # The order of `predictor_logits`: branches, teacher, ensemble.
    index = {'ensemble': -1, 'teacher': method.num_branches}.get(branch, branch)

    @jax.jit
    def predict(variables: Any, images: jax.Array) -> jax.Array:
        mean, std = tuple(description['mean']), tuple(description['std'])
        normalised = augment.normalise(images, mean, std, jnp.float32)
        outputs = network.apply(variables, normalised, train=False)
        return evaluate.predictor_logits(outputs)[index]

    return functools.partial(predict, variables)


def run(predict: Predict, images: np.ndarray) -> np.ndarray:
    """Logits [N, C] of images [N, H, W, 3], in batches of one size."""
    logits = []
    batch_size = min(_BATCH_SIZE, len(images))
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        missing = batch_size - len(batch)
        padded = np.pad(batch, [(0, missing), (0, 0), (0, 0), (0, 0)])
        logits.append(np.asarray(predict(padded))[: len(batch)])
    return np.concatenate(logits)


@contextlib.contextmanager
def on_processor() -> Iterator[None]:
    """Computes on the processor, where there is one: accelerators round float32 products."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(RuntimeError):
            stack.enter_context(jax.default_device(jax.local_devices(backend='cpu')[0]))
        yield


def compare(
    formats: Mapping[str, Predict], reference: Predict, rounded: bool, examples: Images
) -> dict[str, Any]:
    """Runs every written format and the network in training on the same images.

    Args:
      formats: what each file computes, by its name, the weights first.
      reference: the network in training.
      rounded: whether the weights are stored in fewer bits than float32. Then they are free to
        differ from `reference`, and the other formats must be as the first.
      examples: from `load_images`.

    Returns:
      `split` ('test', or 'random'), `num_images`, `top1` of the reference in percent or None, and
      in `formats` for each its `largest_difference` from the reference, the share of equal argmax
      `same_argmax` in percent, and `top1`.

    Raises:
      RuntimeError: a format computes something else.
    """
    images, labels = examples

    def top1(logits: np.ndarray) -> float | None:
        return None if labels is None else 100 * float((logits.argmax(-1) == labels).mean())

    with on_processor():
        expected = run(reference, images)
        logits = {name: run(predict, images) for name, predict in formats.items()}
    baseline = next(iter(logits.values())) if rounded else expected
    measured = {}
    for name, actual in logits.items():
        if not np.abs(actual - baseline).max() <= TOLERANCE * max(1, np.abs(baseline).max()):
            difference = np.abs(actual - baseline).max()
            raise RuntimeError(f'{name} does not compute what the run does: {difference} apart')
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
    """The outcome of `compare` for people, a line for each format."""
    kind = 'test images' if checks['split'] == 'test' else 'random images, not of the data set'
    lines = [f'checked on {checks["num_images"]} {kind}, against the network in training:']
    for name, check in checks['formats'].items():
        line = f'  {name}: largest difference {check["largest_difference"]:.2g}, the same class '
        line += f'for {check["same_argmax"]:.2f} %'
        if check['top1'] is not None:
            line += f', top-1 {check["top1"]:.2f} % (in training {checks["top1"]:.2f} %)'
        lines.append(line)
    return '\n'.join(lines)
