"""Reads a run back from its workdir."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from one_jax import methods, models
from one_jax.errors import UserError
from one_jax.students.student import abstract_variables
from one_jax.training import checkpoint, workdir
from one_jax.training.state import Progress

# Of reading a checkpoint while the run deletes expired ones.
_ATTEMPTS = 5


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
    """Reads the newest undamaged checkpoint of the run in `directory`, which may be training.

    Raises:
      UserError: there is no run or no checkpoint, the run deletes it before it is read, or it is of
        a run of another config, or does not fit the network.
    """
    config = workdir.read_config(directory)
    check = functools.partial(workdir.check_checkpoint, directory, config)
    with checkpoint.Checkpoints(
        directory / workdir.CHECKPOINTS, read_only=True, check=check
    ) as checkpoints:
        state, progress, step = _read(checkpoints)
    variables = {name: state[name] for name in ('params', 'batch_stats')}
    variables = state.get('averages', variables)
    run = SavedRun(config, methods.create(config), variables, Progress.from_dict(progress), step)
    _require_shapes(run, directory)
    return run


def _require_shapes(run: SavedRun, directory: Path) -> None:
    data, method = run.progress.data, run.method
    network = models.make_multibranch(run.config.model, data['num_classes'], method)
    template = abstract_variables(network, tuple(data['image_shape']))
    if jax.tree.map(np.shape, run.variables) != jax.tree.map(np.shape, template):
        raise UserError(
            f'{str(directory)!r}: checkpoint {run.step} does not fit {method.branch_networks}: an '
            'earlier version of one_jax gave them other widths; use that, or train again'
        )


def _read(checkpoints: checkpoint.Checkpoints) -> checkpoint.Restored:
    """Reads the newest checkpoint, and if the run deletes it meanwhile, a newer one."""
    for _ in range(_ATTEMPTS):
        before = checkpoints.steps()
        try:
            restored = checkpoints.read()
        except Exception:  # whatever Orbax raises when files vanish
            if set(before) <= set(checkpoints.steps()):
                raise
        else:
            if restored.step in checkpoints.steps():
                return restored
    raise UserError(
        f'{checkpoints.directory}: the run deletes its checkpoints before they are read: '
        'try again later'
    )
