"""Stops a run whose loss or parameters are no longer finite, and says where it began."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from one_jax.errors import UserError

SKIPPED = 'skipped_steps'


class NonFiniteError(UserError):
    """The loss, a term of it, the gradient or the parameters are NaN or infinite."""


def all_finite(tree: Any) -> jax.Array:
    """Whether every number of a tree of arrays is finite; a scalar."""
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


class Guard:
    """Watches the scalars of the train steps, whenever they are read from the device anyway.

    Args:
      config: resolved; `train.skip_nonfinite_steps` steps in a row may be skipped.
      steps_per_epoch: for the message.
      skipped_in_a_row: at the end of the steps before, of a run that is resumed.
      label: in front of the message.
    """

    def __init__(
        self, config: Any, steps_per_epoch: int, skipped_in_a_row: int = 0, label: str = ''
    ):
        self._config, self._steps_per_epoch, self._label = config, steps_per_epoch, label
        self.skipped_in_a_row = skipped_in_a_row
        self._all_finite = jax.jit(all_finite)

    def check(self, first_step: int, scalars: Mapping[str, np.ndarray], saved: int | None) -> None:
        """Raises at the first step that must not be passed over.

        Args:
          first_step: completed steps after the first of these.
          scalars: of consecutive steps, each [n, ...].
          saved: the step of the newest checkpoint, or None.

        Raises:
          NonFiniteError: with the step, the term and the member.
        """
        numbers = {name: np.asarray(values, np.float64) for name, values in scalars.items()}
        good_steps = np.all(
            [np.isfinite(x.reshape(len(x), -1)).all(axis=1) for x in numbers.values()], axis=0
        )
        if SKIPPED in numbers:
            # The step also looks at the parameters it made, of which no scalar tells.
            good_steps &= numbers[SKIPPED] == 0
        for index, good in enumerate(good_steps):
            self.skipped_in_a_row = 0 if good else self.skipped_in_a_row + 1
            if self.skipped_in_a_row > self._config.train.skip_nonfinite_steps:
                values = {name: array[index] for name, array in numbers.items()}
                self._stop(first_step + index, values, saved)

    def check_variables(self, step: int, variables: Any, saved: int | None) -> None:
        """Raises `NonFiniteError` if what is about to be evaluated or saved is not finite."""
        if not self._all_finite(variables):
            self._stop(step, {}, saved)

    def _stop(self, step: int, scalars: Mapping[str, np.ndarray], saved: int | None) -> None:
        terms = [
            f'{name}{f" of branch {place[0]}" if place else ""} is {value}'
            for name, values in scalars.items()
            for place, value in np.ndenumerate(values)
            if not np.isfinite(value)
        ]
        # The loss is the sum of its terms, which say more.
        terms.sort(key=lambda term: term.startswith(('loss ', 'gradient_norm ')))
        # No scalar tells of a step whose loss is finite and whose result is not.
        terms = terms or ['parameters or statistics that it made']
        checkpoint = 'there is no checkpoint yet'
        if saved is not None:
            checkpoint = f'the checkpoint of step {saved} is kept'
        skipped = self._config.train.skip_nonfinite_steps
        after = f' and {skipped} steps before it were skipped' if skipped else ''
        raise NonFiniteError(
            f'{self._label}step {step} (epoch {step / self._steps_per_epoch:.2f}) is not finite: '
            f'{"; ".join(terms[:3])}{after}; {checkpoint}. Lower '
            f'optimizer.learning_rate={self._config.optimizer.learning_rate}, give '
            'optimizer.warmup_epochs, or let some such steps be skipped: '
            f'--config.train.skip_nonfinite_steps={max(10, 2 * skipped)}'
        )
