"""one_jax: online and ensemble knowledge distillation of small image classifiers in JAX."""

import importlib
import sys
from typing import Any

__version__ = '0.1.0'
__all__ = ['Student', 'load_student']

# While Python looks for the module of `python -m one_jax.main`: before all other imports.
if sys.argv[:1] == ['-m']:
    importlib.import_module('one_jax.runtime.interrupt').listen()


def __getattr__(name: str) -> Any:
    # Imported on first use: commands without a student do not wait for it.
    if name in __all__:
        return getattr(importlib.import_module('one_jax.students.student'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
