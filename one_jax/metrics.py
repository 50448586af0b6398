"""Measures as masked sums, and where they go: metrics.jsonl and TensorBoard."""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import chex
import jax
import jax.numpy as jnp
import numpy as np
import tensorboardX
from jax import lax

from one_jax import losses
from one_jax.errors import UserError

FILE_NAME = 'metrics.jsonl'
CALIBRATION_BINS = 15


def prediction_sums(
    logits: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    num_bins: int = CALIBRATION_BINS,
) -> dict[str, jax.Array]:
    """Sums over a batch from which `summarise` computes exact accuracies, NLL and calibration.

    Pure, and sums of sums over batches or devices are again such sums. Among equal logits the lower
    class ranks higher, as in `lax.top_k`. A top probability on the edge of two bins belongs to the
    lower one.

    Args:
      logits: [..., B, C].
      labels: [B], integers.
      mask: [B], 0 for padding; what stands there changes nothing.
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
    """Sums over a batch of how far the branches are apart, the mean over their pairs.

    Args:
      logits: [K, B, C], K at least 2.
      mask: [B], 0 for padding.

    Returns:
      'pairwise_l2', the Euclidean distance between two branches' softmax outputs (Lan et al. 2018,
      section 4.4), and 'disagreement', 1 where their classes differ; and 'pair_examples'. Scalars.
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
    """Adds up the `prediction_sums` of several batches on the host, in float64.

    Raises:
      UserError: there is no batch.
    """
    if not batches:
        raise UserError('there are no examples to evaluate: give a split that is not empty')
    return {
        name: sum(np.asarray(sums[name], np.float64) for sums in batches) for name in batches[0]
    }


def summarise(sums: Mapping[str, Any]) -> dict[str, float | list]:
    """The measures of a whole split.

    The expected calibration error is sum_m n_m / n |accuracy_m - confidence_m| (Guo, Pleiss, Sun,
    Weinberger 2017, equation 3).

    Args:
      sums: of `add_sums`, or of one `prediction_sums`.

    Returns:
      'top1', 'top5' and 'ece' in percent, 'nll' in nats: Python floats, or lists over the leading
      dimensions. With `diversity_sums`, 'pairwise_l2' and, in percent, 'disagreement' as floats.

    Raises:
      UserError: there is no example.
    """
    sums = {name: np.asarray(values, np.float64) for name, values in sums.items()}
    examples = sums['examples']
    if not examples.all():
        raise UserError('there are no examples to evaluate: give a split that is not empty')
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


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in order; `path` is the file or its workdir.

    Lines that are no record are left out: a process that is killed leaves half a line behind.

    Raises:
      UserError: there is no such file.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    try:
        lines = path.read_bytes().split(b'\n')
    except OSError as error:
        raise UserError(f'{str(path)!r} cannot be read: {error.strerror}') from None
    return [record for line in lines if (record := _parse_record(line)) is not None]


def _parse_record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode())
    except ValueError:
        return None
    if isinstance(record, dict) and isinstance(record.get('step'), int):
        return record
    return None


class RecordWriter:
    """Writes records to metrics.jsonl and TensorBoard events in a workdir.

    metrics.jsonl gets one JSON object a line: 'step', 'epoch', 'split' and the measures, which are
    numbers or lists of numbers. It holds nothing that depends on the clock, so that a resumed run
    leaves the same file as an uninterrupted one. Undefined and infinite values, which JSON does not
    have, become null; TensorBoard gets them as they are.

    Args:
      workdir: made if need be.
      resume_step: the step of the checkpoint to go on from: later records are cut off, because the
        run makes them again, and so is what a killed process left half written. None starts afresh.
    """

    def __init__(self, workdir: str | Path, resume_step: int | None = None):
        path = Path(workdir) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_records(path, -1 if resume_step is None else resume_step)
        self._file = path.open('ab')
        self._events = tensorboardX.SummaryWriter(
            str(workdir),
            purge_step=0 if resume_step is None else resume_step + 1,
            # No bound: its thread ends when the disk is full, and would let us wait for ever.
            max_queue=0,
            flush_secs=10,
            # By itself the name tells only seconds apart: a quick resume would overwrite the file.
            filename_suffix=f'.{time.time_ns()}',
        )

    def write(
        self,
        step: int,
        epoch: float,
        split: str,
        metrics: Mapping[str, Any],
        timing: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes one record, and makes sure that it outlives the process.

        Args:
          step: completed steps.
          epoch: completed epochs.
          split: 'train', 'validation' or 'test'.
          metrics: scalars and [K] arrays by name; in TensorBoard the entries of `branch_top1` are
            `test/branch_top1/0`, `test/branch_top1/1`, ... None is left out.
          timing: what depends on the clock, such as images a second: for TensorBoard only.
        """
        arrays = {
            name: np.asarray(values, np.float64)
            for name, values in metrics.items()
            if values is not None
        }
        record = {'step': int(step), 'epoch': float(epoch), 'split': split}
        record |= {name: jsonable(values.tolist()) for name, values in arrays.items()}
        self._file.write(json.dumps(record, allow_nan=False).encode() + b'\n')
        self._file.flush()
        for name, values in (arrays | dict(timing or {})).items():
            for index, value in np.ndenumerate(values):
                tag = '/'.join([split, name, *map(str, index)])
                self._events.add_scalar(tag, float(value), int(step))
        # What its thread could not write fails here.
        self._events.flush()

    def close(self) -> None:
        try:
            self._file.close()
        finally:
            self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class NoRecords:
    """Takes records and writes nothing: that of the processes that are not the first."""

    def write(self, *record: Any) -> None:
        """The arguments are those of `RecordWriter.write`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def jsonable(value: Any) -> Any:
    """Nested lists and dictionaries with None in place of NaN and infinity, which JSON has not."""
    if isinstance(value, Mapping):
        return {name: jsonable(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cut_records(path: Path, last_step: int) -> None:
    """Leaves the records up to `last_step`, byte for byte; the file changes whole or not at all."""
    before = path.read_bytes() if path.exists() else b''
    kept = b''
    for line in before.split(b'\n'):
        record = _parse_record(line)
        if record is not None and record['step'] <= last_step:
            kept += line + b'\n'
    if kept == before:
        return
    temporary = path.with_name(f'.{path.name}.{os.getpid()}')
    with temporary.open('wb') as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
