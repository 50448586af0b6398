"""Distillation methods: one small file each; `base.py` has the interface and the registry."""

from one_jax.methods.base import Method, create, register, registered

__all__ = ['Method', 'create', 'register', 'registered']
