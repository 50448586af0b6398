"""Ends a run whose loss, gradient or parameters are no longer finite, and reports the cause."""

from typing import Any

import jax
import numpy as np

from one_jax.errors import UserError
from one_jax.training.experiment import Experiment
from one_jax.training.state import TrainState
from one_jax.training.step import all_finite


class NonFiniteError(UserError):
    """The loss, one of its terms, the gradient or a parameter is NaN or infinite."""


@jax.jit
def _is_finite(state: TrainState) -> jax.Array:
    return (state.metrics.first_nonfinite_step == 0) & all_finite(state.variables)


def require_finite(experiment: Experiment, step: int, state: TrainState, saved: int | None) -> None:
    """Raises `NonFiniteError` if a step up to this one ends the run; waits for the device.

    Args:
      experiment: of the run.
      step: completed steps.
      state: after `step`.
      saved: the step of the newest checkpoint, or None.
    """
    if _is_finite(state):
        return
    metrics = jax.device_get(state.metrics)
    # No metric shows a step whose loss is finite and whose update is not.
    names = ['parameters or statistics that it updated']
    if metrics.first_nonfinite_step:
        step = int(metrics.first_nonfinite_step)
        names = _nonfinite(metrics.sums) or names
    checkpoint = 'there is no checkpoint yet'
    if saved is not None:
        checkpoint = f'the checkpoint of step {saved} is kept'
    config = experiment.config
    skipped = config.train.skip_nonfinite_steps
    after = f' and {skipped} steps before it were skipped' if skipped else ''
    raise NonFiniteError(
        f'step {step} (epoch {step / experiment.steps_per_epoch:.2f}) is not finite: '
        f'{"; ".join(names[:3])}{after}; {checkpoint}. Lower '
        f'optimizer.learning_rate={config.optimizer.learning_rate}, set optimizer.warmup_epochs, '
        'or allow such steps to be skipped: '
        f'--config.train.skip_nonfinite_steps={max(10, 2 * skipped)}'
    )


def _nonfinite(sums: dict[str, Any]) -> list[str]:
    """Names the metrics that are not finite; the terms first, for the loss is their sum."""
    names = [
        f'{name}{f" of branch {place[0]}" if place else ""} is {value}'
        for name, values in sums.items()
        for place, value in np.ndenumerate(values)
        if not np.isfinite(value)
    ]
    return sorted(names, key=lambda name: name.startswith(('loss ', 'gradient_norm ')))
