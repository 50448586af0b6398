"""one_jax: online and ensemble knowledge distillation of small image classifiers in JAX."""

import importlib
from typing import Any

__version__ = '0.1.0'
__all__ = ['Student', 'load_student']


def __getattr__(name: str) -> Any:
    # Imported on first use: commands without a student do not wait for it.
    if name in __all__:
        return getattr(importlib.import_module('one_jax.students.student'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
