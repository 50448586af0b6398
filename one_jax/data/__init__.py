"""Data sets, opened once: batches as a function of (seed, step), augmentation on the device.

Importing this package imports neither TFDS nor TensorFlow.
"""

from one_jax.data.batches import Batches
from one_jax.data.opening import exists, open
from one_jax.data.resident import Examples
from one_jax.data.source import Source
from one_jax.data.table import DATASETS, DatasetSpec

__all__ = ['DATASETS', 'Batches', 'DatasetSpec', 'Examples', 'Source', 'exists', 'open']
