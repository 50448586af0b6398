"""The packages and the device that a result depends on."""

import os
import platform
from importlib import metadata

import jax

import one_jax


def versions() -> dict[str, str]:
    """Returns the versions of one_jax, Python and the packages that compute."""
    packages = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
    return {
        'one_jax': one_jax.__version__,
        'python': platform.python_version(),
        **{package: metadata.version(package) for package in packages},
    }


def device_name() -> str:
    """Returns the accelerator's name, or the processor's architecture and number of cores."""
    device = jax.devices()[0]
    if device.platform == 'cpu':
        return f'cpu ({platform.machine()}, {os.cpu_count()} cores)'
    return device.device_kind
