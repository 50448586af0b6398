"""Strict settings for every test: four CPU devices, no silent rank promotion."""

import os
import shutil
import tempfile

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Four devices; and programs compiled in half the time, for most of a test is compilation.
for flag, value in {
    'xla_force_host_platform_device_count': '4',
    'xla_backend_optimization_level': '0',
    'xla_llvm_disable_expensive_passes': 'true',
}.items():
    if flag not in os.environ.get('XLA_FLAGS', ''):
        os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --{flag}={value}'
# Tests compile the same programs again and again: all worker processes share what is compiled.
OWN_CACHE = 'JAX_COMPILATION_CACHE_DIR' not in os.environ
if OWN_CACHE:
    os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp(prefix='one_jax_tests_')

import jax  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')


def pytest_unconfigure(config):
    """Removes the cache at the end of the process that made it."""
    if OWN_CACHE:
        shutil.rmtree(os.environ['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True)
