"""TFDS builders of one_jax; importing this package registers them with TFDS."""

from one_jax.data.builders.mnist5k import Mnist5k

__all__ = ['Mnist5k']
