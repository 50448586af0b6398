"""Commands as a user types them, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
# ONE on generated 8x8 images: eight steps per epoch for two epochs, and a record within each.
TINY = (
    '--config=configs/image_folder.py:smoke',
    '--config.data.image_size=8',
    '--config.data.generated_examples=64',
    '--config.data.batch_size=8',
    '--config.optimizer.schedule=constant',
    '--config.optimizer.warmup_epochs=0',
    '--config.train.steps=16',
    '--config.train.log_every=3',
)
TIMEOUT = 600
_QUICKLY_COMPILED = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'


def environment(**variables: str) -> dict[str, str]:
    """Returns the environment of a command: one CPU device, and quick compilation."""
    return {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': _QUICKLY_COMPILED, **variables}


def cache_flag() -> str:
    """Returns the flag by which commands share the compiled programs of the tests."""
    return f'--config.train.compilation_cache_dir={os.environ["JAX_COMPILATION_CACHE_DIR"]}'


def start(module: str, *flags: str, cwd: Path = REPOSITORY, **variables: str) -> subprocess.Popen:
    """Starts `python -m one_jax.MODULE FLAGS...`, by default at the root of the repository."""
    return subprocess.Popen(
        [sys.executable, '-m', f'one_jax.{module}', *flags],
        cwd=cwd,
        env=environment(**{'PYTHONPATH': str(REPOSITORY), **variables}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(
    module: str, *flags: str, status: int = 0, cwd: Path = REPOSITORY, **variables: str
) -> tuple[str, str]:
    """Runs a command, checks its exit status, and returns its output and error output."""
    process = start(module, *flags, cwd=cwd, **variables)
    output, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == status, f'{output}\n{errors}'
    return output, errors
