"""Reads a run back from its workdir."""

import dataclasses
from pathlib import Path
from typing import Any

from one_jax import methods
from one_jax.training import checkpoint, workdir
from one_jax.training.state import Progress


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """A run, as its newest checkpoint has it.

    Attributes:
      config: resolved.
      method: the method that trained it.
      variables: of the branched network, NumPy arrays; the moving averages if there are any.
      progress: what was saved beside the arrays.
      step: completed steps.
    """

    config: Any
    method: methods.Method
    variables: dict[str, Any]
    progress: Progress
    step: int


def load(directory: Path) -> SavedRun:
    """Reads the newest undamaged checkpoint of the run in `directory`.

    Raises:
      UserError: there is no run or no checkpoint.
    """
    config = workdir.read_config(directory)
    with checkpoint.Checkpoints(directory / workdir.CHECKPOINTS, read_only=True) as checkpoints:
        state, progress, step = checkpoints.read()
    variables = {name: state[name] for name in ('params', 'batch_stats')}
    variables = state.get('averages', variables)
    return SavedRun(config, methods.create(config), variables, Progress.from_dict(progress), step)
