"""Strict settings for every test: four CPU devices, no silent rank promotion."""

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

# The helpers beside this file.
sys.path.insert(1, str(Path(__file__).parent))

# A shell's background jobs ignore Ctrl-C, and so would the commands that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Four devices; and programs that compile in half the time, because tests mostly compile.
for flag, value in {
    'xla_force_host_platform_device_count': '4',
    'xla_backend_optimization_level': '0',
    'xla_llvm_disable_expensive_passes': 'true',
}.items():
    if flag not in os.environ.get('XLA_FLAGS', ''):
        os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --{flag}={value}'
# All worker processes, and the commands that tests start, share compiled programs.
OWN_CACHE = 'JAX_COMPILATION_CACHE_DIR' not in os.environ
if OWN_CACHE:
    os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp(prefix='one_jax_tests_')
# They neither see nor change what the user's own runs found in data folders. Fonts are shared.
os.environ.setdefault('MPLCONFIGDIR', os.path.expanduser('~/.cache/matplotlib'))
CACHE_HOME = os.environ['XDG_CACHE_HOME'] = tempfile.mkdtemp(prefix='one_jax_tests_')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture(scope='module', autouse=True)
def _free_compiled_programs():
    """Frees a module's programs: those of the whole suite take gigabytes."""
    yield
    jax.clear_caches()


def pytest_unconfigure(config):
    """Removes the caches at the end of the process that made them."""
    if OWN_CACHE:
        shutil.rmtree(os.environ['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True)
    shutil.rmtree(CACHE_HOME, ignore_errors=True)
