"""The images of the train split that a run trains on, and those it holds out."""

import numpy as np
from ml_collections import config_dict

from one_jax.data.resident import Examples, random_bits
from one_jax.data.table import DatasetSpec
from one_jax.errors import ConfigError

# Stream of random bits of the subsets: apart from the epochs, see `resident.random_bits`.
_SUBSET_STREAM = 2**63 + 3


def select(
    train: Examples, spec: DatasetSpec, data_config: config_dict.ConfigDict
) -> dict[str, Examples]:
    """The splits 'train' and, if some are held out, 'validation' of the images of a train split.

    Every class is put in one random order: training takes from its front, validation from its back.
    So subsets are nested, and the same whatever is held out.
    """
    fraction, wanted = data_config.validation_fraction, data_config.examples_per_class
    if not fraction and not wanted:
        return {'train': train}
    labels = train.labels
    counts = np.bincount(labels, minlength=spec.num_classes)
    # A share below 1 leaves at least one image of each class for training.
    held_out = np.clip(np.rint(fraction * counts).astype(int), 0, np.maximum(counts - 1, 0))
    if fraction and not held_out.any():
        raise ConfigError(
            'data.validation_fraction', fraction, f'0, or more: classes have {counts.max()} images'
        )
    remaining = counts - held_out
    if wanted > remaining.min():
        raise ConfigError(
            'data.examples_per_class',
            wanted,
            f'0 (all) to {remaining.min()}, what the smallest class has for training',
        )
    score = random_bits(data_config.subset_seed, _SUBSET_STREAM, len(labels))
    order = np.lexsort((score, labels))
    rank = np.empty(len(labels), np.int64)
    rank[order] = np.arange(len(labels)) - (np.cumsum(counts) - counts)[labels[order]]
    limit = np.full_like(counts, wanted) if wanted else remaining
    selected = {'train': train.take(np.flatnonzero(rank < limit[labels]))}
    if fraction:
        selected['validation'] = train.take(np.flatnonzero(rank >= remaining[labels]))
    return selected
