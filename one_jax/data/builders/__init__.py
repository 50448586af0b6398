"""TFDS builders of one_jax; importing this package registers them with TFDS."""

from one_jax.data.builders.cinic10 import Cinic10
from one_jax.data.builders.mnist5k import Mnist5k

__all__ = ['Cinic10', 'Mnist5k']
