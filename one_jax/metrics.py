"""Evaluation measures as masked sums, which add up exactly over batches and devices."""

from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from one_jax import losses
from one_jax.errors import UserError

CALIBRATION_BINS = 15
# What an evaluation reports of every branch, the teacher and the ensemble.
MEASURES = ('top1', 'top5', 'nll', 'ece')


def prediction_sums(
    logits: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    num_bins: int = CALIBRATION_BINS,
) -> dict[str, jax.Array]:
    """Computes sums over a batch, for the accuracies, NLL and calibration of `summarise`.

    Among equal logits the lower class ranks higher, as in `lax.top_k`. A top probability on the
    edge of two bins belongs to the lower one.

    Args:
      logits: [..., B, C].
      labels: [B], integers.
      mask: [B], 0 for padding, whose values do not matter.
      num_bins: M, bins of equal width for the top probability.

    Returns:
      'examples', 'top1', 'top5' (counts; C < 5 makes it top C) and 'nll' (nats), each [...]; and
      'bin_examples', 'bin_confidence' (top probabilities) and 'bin_correct', each [..., M].
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    chex.assert_shape(mask, labels.shape)
    nll = losses.cross_entropy(logits, labels)
    valid = jnp.broadcast_to(jnp.asarray(mask).astype(bool), nll.shape)

    ranked = lax.top_k(logits, min(5, logits.shape[-1]))[1]
    hits = ranked == jnp.broadcast_to(labels[:, None], ranked.shape)
    confidence = jax.nn.softmax(logits.astype(nll.dtype)).max(axis=-1)
    bins = jnp.clip(jnp.ceil(confidence * num_bins).astype(jnp.int32) - 1, 0, num_bins - 1)
    in_bin = valid[..., None] & jax.nn.one_hot(bins, num_bins, dtype=bool)

    def masked_sum(values: jax.Array) -> jax.Array:
        return values.astype(nll.dtype).sum(axis=-1, where=valid)

    def bin_sums(values: jax.Array) -> jax.Array:
        values = jnp.broadcast_to(values.astype(nll.dtype)[..., None], in_bin.shape)
        return values.sum(axis=-2, where=in_bin)

    return {
        'examples': masked_sum(jnp.ones_like(nll)),
        'top1': masked_sum(hits[..., 0]),
        'top5': masked_sum(hits.any(axis=-1)),
        'nll': masked_sum(nll),
        'bin_examples': bin_sums(jnp.ones_like(nll)),
        'bin_confidence': bin_sums(confidence),
        'bin_correct': bin_sums(hits[..., 0]),
    }


def diversity_sums(
    logits: jax.typing.ArrayLike, mask: jax.typing.ArrayLike
) -> dict[str, jax.Array]:
    """Computes sums over a batch of the diversity of the branches, averaged over their pairs.

    Args:
      logits: [K, B, C], K at least 2.
      mask: [B], 0 for padding.

    Returns:
      Scalars: 'pairwise_l2', the Euclidean distance between the softmax outputs of two branches
      (Lan et al. 2018, section 4.4); 'disagreement', 1 if their classes differ; 'pair_examples'.
    """
    logits = jnp.asarray(logits)
    valid = jnp.asarray(mask).astype(bool)
    first, second = np.triu_indices(logits.shape[0], k=1)
    probabilities = jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    distances = jnp.linalg.norm(probabilities[first] - probabilities[second], axis=-1)
    classes = logits.argmax(axis=-1)
    differ = (classes[first] != classes[second]).astype(distances.dtype)
    return {
        'pairwise_l2': distances.mean(axis=0).sum(where=valid),
        'disagreement': differ.mean(axis=0).sum(where=valid),
        'pair_examples': valid.sum().astype(distances.dtype),
    }


def add_sums(batches: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Adds the sums of several batches on the host, in float64.

    Raises:
      UserError: there is no batch.
    """
    if not batches:
        raise UserError('there are no examples to evaluate: give a split that is not empty')
    return {
        name: sum(np.asarray(sums[name], np.float64) for sums in batches) for name in batches[0]
    }


def summarise(sums: Mapping[str, Any]) -> dict[str, float | list]:
    """Computes the measures of a whole split.

    The expected calibration error is sum_m n_m / n |accuracy_m - confidence_m| (Guo et al. 2017,
    equation 3).

    Args:
      sums: from `prediction_sums`, and from `diversity_sums` if there are several branches.

    Returns:
      'top1', 'top5' and 'ece' in percent, 'nll' in nats: Python floats, or lists over the leading
      dimensions; with `diversity_sums` also 'pairwise_l2', and 'disagreement' in percent.
    """
    sums = {name: np.asarray(values, np.float64) for name, values in sums.items()}
    examples = sums['examples']
    gap = np.abs(sums['bin_correct'] - sums['bin_confidence']).sum(axis=-1)
    diversity = {}
    if 'pair_examples' in sums:
        diversity['pairwise_l2'] = (sums['pairwise_l2'] / sums['pair_examples']).tolist()
        diversity['disagreement'] = (100 * sums['disagreement'] / sums['pair_examples']).tolist()
    return {
        'top1': (100 * sums['top1'] / examples).tolist(),
        'top5': (100 * sums['top5'] / examples).tolist(),
        'nll': (sums['nll'] / examples).tolist(),
        'ece': (100 * gap / examples).tolist(),
        **diversity,
    }
