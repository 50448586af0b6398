"""An experiment: everything that a config and a data set determine, built once."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from one_jax import methods, models
from one_jax.data.table import DatasetSpec
from one_jax.errors import require
from one_jax.runtime import parallel
from one_jax.students.student import Student
from one_jax.training import initialisation, optimizer, teachers
from one_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Experiment:
    """All that training needs to know.

    Attributes:
      config: resolved: every field has a value.
      spec: the data set, with mean and standard deviation.
      label_names: of the classes.
      method: the distillation method.
      network: the branched network.
      teachers: the frozen teachers.
      initial_student: the student whose weights a new run starts from, or None.
      steps_per_epoch: whole batches in the training split.
      total_steps: of the run.
      schedule: learning rate by step.
      optimizer: with that schedule.
    """

    config: Any
    spec: DatasetSpec
    label_names: tuple[str, ...]
    method: methods.Method
    network: nn.Module
    teachers: tuple[Student, ...]
    initial_student: Student | None
    steps_per_epoch: int
    total_steps: int
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation

    @property
    def total_epochs(self) -> float:
        return self.total_steps / self.steps_per_epoch

    def ends_epoch(self, step: int, every: int = 1) -> bool:
        """Whether `step` completes a multiple of `every` epochs, or the run."""
        return step == self.total_steps or step % (every * self.steps_per_epoch) == 0

    def logs_at(self, step: int) -> bool:
        """Whether a training record follows `step`."""
        return step % self.config.train.log_every == 0 or self.ends_epoch(step)

    def initial_state(self, seed: jax.typing.ArrayLike) -> TrainState:
        """Returns the state before the first step, without metric sums; to be jitted.

        It depends on the seed alone, not on the number of devices.

        Args:
          seed: below 2**32; an array must be uint32.
        """
        init_key, rng = jax.random.split(jax.random.PRNGKey(seed))
        images = jnp.zeros((1, *self.spec.image_shape), jnp.float32)
        variables = self.network.init(init_key, images, train=False)
        # Flax initialises float64 statistics in float32; one step would change their dtype.
        dtype = jnp.result_type(*jax.tree.leaves(variables['params']))
        state = TrainState(
            step=jnp.zeros((), jnp.int32),
            params=variables['params'],
            batch_stats=jax.tree.map(lambda x: x.astype(dtype), variables['batch_stats']),
            opt_state=self.optimizer.init(variables['params']),
            rng=rng,
            averages=() if self.config.train.ema_decay else None,
            method=self.method.initial_state(),
        )
        if self.initial_student is not None:
            state = initialisation.from_student(state, self.initial_student, self.label_names)
        return state.with_fresh_averages()

    def student_digests(self) -> dict[str, str]:
        """SHA-256 of the weights of every exported student that the run uses, by config field."""
        digests = map(teachers.digest, self.method.teacher_folders)
        found = {f'method.teachers[{index}]': digest for index, digest in enumerate(digests)}
        if self.initial_student is not None:
            found['model.init_from'] = teachers.digest(self.config.model.init_from)
        return found


def make_experiment(
    config: Any, spec: DatasetSpec, label_names: tuple[str, ...], steps_per_epoch: int
) -> Experiment:
    """Builds the experiment of a resolved, valid config.

    Raises:
      UserError: a frozen teacher or the initial student cannot be read, or does not fit.
    """
    method = methods.create(config)
    axis_name = parallel.DATA_AXIS if config.sync_batch_norm else None
    network = models.make_multibranch(config.model, spec.num_classes, method, axis_name)
    total_steps = config.train.steps or config.train.epochs * steps_per_epoch
    allowed = f'fewer: devices count steps in int32, and an epoch has {steps_per_epoch}'
    require(total_steps < 2**31, 'train.epochs', config.train.epochs, allowed)
    warmup = config.optimizer.warmup_epochs
    allowed = f'0, or from one step up to below the {total_steps} steps of the run'
    rises = not warmup or 0 < round(warmup * steps_per_epoch) < total_steps
    require(rises, 'optimizer.warmup_epochs', warmup, f'{allowed}; an epoch has {steps_per_epoch}')
    schedule = optimizer.make_schedule(
        config.optimizer, steps_per_epoch, total_steps, config.data.batch_size
    )
    return Experiment(
        config,
        spec,
        label_names,
        method,
        network,
        teachers.load(method, spec, label_names, config.model.dtype),
        initialisation.load_student(config, method, label_names),
        steps_per_epoch,
        total_steps,
        schedule,
        optimizer.make_optimizer(config.optimizer, schedule),
    )
