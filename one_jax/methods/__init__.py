"""Distillation methods: one small file each; `base.py` has the interface and the registry."""

from one_jax.methods.base import Context, Method, Terms, create, fields, register, registered

__all__ = ['Context', 'Method', 'Terms', 'create', 'fields', 'register', 'registered']
