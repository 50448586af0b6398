"""Data sets in memory, batches as a function of (seed, step), augmentation on the device."""

from one_jax.data.datasets import DATASETS, Dataset, DatasetSpec, describe, load
from one_jax.data.resident import Examples, ResidentBatches, evaluation_batches

__all__ = [
    'DATASETS',
    'Dataset',
    'DatasetSpec',
    'Examples',
    'ResidentBatches',
    'describe',
    'evaluation_batches',
    'load',
]
