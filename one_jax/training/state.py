"""What a run carries from step to step: arrays in `TrainState`, everything else in `Progress`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct


@struct.dataclass
class MetricSums:
    """Sums of what the train step measures, over the steps since the last record.

    Attributes:
      sums: by name, scalars or [K].
      steps: the steps in the sums.
      skipped: the steps that were skipped because they were not finite.
      skipped_in_a_row: the skipped steps at the end, since the last that was not.
      first_nonfinite_step: the first step that ends the run; 0 for none. The sums include it, and
        nothing after it.
    """

    sums: dict[str, jax.Array]
    steps: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    first_nonfinite_step: jax.Array

    @classmethod
    def zeros(cls, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> 'MetricSums':
        """Empty sums of metrics of these shapes."""
        sums = {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}
        return cls(sums, *(jnp.zeros((), jnp.int32) for _ in range(4)))

    def add(
        self, step: jax.Array, metrics: dict[str, jax.Array], finite: jax.Array, max_skipped: int
    ) -> 'MetricSums':
        """Adds the metrics of a step.

        Args:
          step: completed steps, this one included.
          metrics: shapes as in `sums`.
          finite: whether the step is finite; a scalar.
          max_skipped: how many steps in a row may be skipped.
        """
        in_a_row = jnp.where(finite, 0, self.skipped_in_a_row + 1)
        ok = self.first_nonfinite_step == 0
        ends_run = ok & (in_a_row > max_skipped)
        counts = ok & (finite | ends_run)
        return MetricSums(
            jax.tree.map(lambda old, new: jnp.where(counts, old + new, old), self.sums, metrics),
            self.steps + counts,
            self.skipped + (ok & ~counts),
            in_a_row,
            jnp.where(ends_run, step, self.first_nonfinite_step),
        )

    def start_anew(self) -> 'MetricSums':
        """Empty sums; what is known of steps that are not finite stays."""
        return self.replace(
            sums=jax.tree.map(jnp.zeros_like, self.sums),
            steps=jnp.zeros_like(self.steps),
            skipped=jnp.zeros_like(self.skipped),
        )

    def means(self) -> dict[str, Any]:
        """The means over the steps, as Python floats or lists; NaN if every step was skipped.

        For sums on the host.
        """
        steps = np.float64(self.steps)
        with np.errstate(invalid='ignore'):
            return {name: (np.float64(x) / steps).tolist() for name, x in self.sums.items()}


@struct.dataclass
class TrainState:
    """With the data set and the config, all that the next step depends on.

    Attributes:
      step: completed steps, int32 scalar.
      params: parameters, `{'trunk': ..., 'head': ..., 'aggregator': ...}`.
      batch_stats: running statistics of batch normalisation, in the same structure.
      opt_state: state of the optimiser.
      rng: raw PRNG key, uint32 [2]; constant, because every step folds its number into it.
      averages: exponential moving averages of parameters and statistics, or None.
      method: state of the method, or None; see `Method.initial_state`.
      metrics: sums since the last record; None until `step.make_initial_state` adds them.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    rng: jax.Array
    averages: Any = None
    method: Any = None
    metrics: MetricSums | None = None

    @property
    def variables(self) -> dict[str, Any]:
        """What `network.apply` takes."""
        return {'params': self.params, 'batch_stats': self.batch_stats}

    @property
    def evaluated_variables(self) -> dict[str, Any]:
        """What is evaluated and exported: the moving averages if there are any."""
        return self.variables if self.averages is None else self.averages

    def with_fresh_averages(self) -> 'TrainState':
        """This state with its averages, if any, reset to the variables."""
        if self.averages is None:
            return self
        # A copy, because the step donates both sets of buffers.
        return self.replace(averages=jax.tree.map(jnp.copy, self.variables))

    def with_updated_averages(self, decay: float) -> 'TrainState':
        """This state with its averages, if any, moved towards the variables.

        The decay is min(decay, (1 + step) / (10 + step)), so that the averages soon forget the
        initial values.
        """
        if self.averages is None:
            return self
        decay = jnp.minimum(decay, (1 + self.step) / (10 + self.step))
        averages = optax.incremental_update(self.variables, self.averages, 1 - decay)
        return self.replace(averages=averages)


@dataclasses.dataclass
class Progress:
    """What a checkpoint holds beside the arrays.

    Attributes:
      seconds: of training so far.
      evaluations: the latest evaluation of each split, with its 'step'.
      data: the data set's `Source.description()`.
      teachers: what `teachers.describe` returns.
      config: the resolved config, as config.json has it.
      fingerprint: of the data and the exported students, as data.json has it.
    """

    seconds: float = 0.0
    evaluations: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    teachers: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    fingerprint: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> 'Progress':
        """Restores the progress in a checkpoint, which may be an older one with other keys."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in stored.items() if name in names})
