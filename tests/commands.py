"""Commands as a user types them, for the tests."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from one_jax import checkpoint

REPOSITORY = Path(__file__).parent.parent
# Eight batches an epoch, two epochs, a record within each epoch; seconds on a processor.
TINY_FIELDS = (
    '--config.data.generated_examples=128',
    '--config.train.steps=16',
    '--config.train.log_every=3',
)
TINY = ('--config=configs/cifar100_resnet32.py:smoke', *TINY_FIELDS)
TINY_PLAIN = ('--config=configs/cifar100_resnet32.py:smoke,plain', *TINY_FIELDS)


def environment(**variables: str) -> dict[str, str]:
    """One CPU device, as outside of the tests."""
    inherited = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
    return {**inherited, 'JAX_PLATFORMS': 'cpu', **variables}


def start(module: str, *flags: str, **variables: str) -> subprocess.Popen:
    """`python -m one_jax.MODULE FLAGS...` at the root of the repository."""
    return subprocess.Popen(
        [sys.executable, '-m', f'one_jax.{module}', *flags],
        cwd=REPOSITORY,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(module: str, *flags: str, status: int = 0, **variables: str) -> tuple[str, str]:
    """Runs a command to its end, checks its exit status, and gives its output and error output."""
    process = start(module, *flags, **variables)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == status, f'{output}\n{errors}'
    return output, errors


def final_state(workdir: Path) -> tuple[dict[str, np.ndarray], int]:
    """Every array of the newest checkpoint by name, and its step."""
    with checkpoint.Checkpoints(workdir / 'checkpoints', read_only=True) as checkpoints:
        state, _, step = checkpoints.read()
    return dict(leaves(state)), step


def leaves(tree: dict, prefix: str = ''):
    """The leaves of nested dictionaries with their dotted names."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f'{prefix}{name}.')
        else:
            yield prefix + name, np.asarray(value)


def assert_same_run(workdir: Path, reference: Path) -> None:
    """The same parameters, statistics and optimiser state bit for bit, and the same records."""
    state, step = final_state(workdir)
    expected, expected_step = final_state(reference)
    assert step == expected_step
    assert state.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(state[name], values, err_msg=name, strict=True)
    records = (workdir / 'metrics.jsonl').read_bytes()
    assert records == (reference / 'metrics.jsonl').read_bytes()


def snapshot(directory: Path) -> dict[str, bytes]:
    """The content of every file under a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob('*'))
        if path.is_file()
    }
