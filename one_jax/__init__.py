"""one_jax: online and ensemble knowledge distillation of small image classifiers in JAX."""

__version__ = '0.1.0'
