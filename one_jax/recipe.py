"""What a config and a data set's description determine, put together."""

import dataclasses
import zlib
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn

from one_jax import fine_tuning, methods, models, optimizer, parallel, teachers
from one_jax.data import datasets
from one_jax.state import TrainState, init_state
from one_jax.student import Student


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that training needs to know.

    Attributes:
      config: resolved: every field has a value.
      spec: the data set's description, mean and std included.
      method: the distillation method.
      network: the branched network.
      teachers: the frozen teachers.
      initial: the student whose weights a fresh run starts from, or None.
      steps_per_epoch: whole batches in the training split.
      total_steps: of the run.
      schedule: learning rate by step.
      optimizer: with that schedule.
    """

    config: Any
    spec: datasets.DatasetSpec
    method: methods.Method
    network: nn.Module
    teachers: tuple[Student, ...]
    initial: Student | None
    steps_per_epoch: int
    total_steps: int
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation

    def random_state(self, seed: jax.typing.ArrayLike | None = None) -> TrainState:
        """The fresh state of the run's seed, or of another; to be jitted, or evaluated
        abstractly.
        """
        return init_state(
            self.network,
            self.optimizer,
            self.spec.image_shape,
            self.config.seed if seed is None else seed,
            with_averages=self.config.train.ema_decay > 0,
            method_state=self.method.initial_state(),
        )

    @property
    def total_epochs(self) -> float:
        return self.total_steps / self.steps_per_epoch

    def student_checksums(self) -> dict[str, int]:
        """Of the weights of each exported student that the run makes use of."""
        students = {f'teacher {index}': teacher for index, teacher in enumerate(self.teachers)}
        if self.initial is not None:
            students['initial'] = self.initial
        return {name: _checksum(student.variables) for name, student in students.items()}


def _checksum(tree: Any) -> int:
    checksum = 0
    for leaf in jax.tree.leaves(tree):
        checksum = zlib.crc32(np.asarray(leaf).tobytes(), checksum)
    return checksum


def make_recipe(config: Any, spec: datasets.DatasetSpec, steps_per_epoch: int) -> Recipe:
    """Puts together what training needs; `config` is resolved and valid.

    Raises:
      UserError: a frozen teacher or the student to start from cannot be read, or does not suit.
    """
    method = methods.create(config)
    network = models.make_network(
        config.model,
        spec.num_classes,
        method,
        parallel.DATA_AXIS if config.sync_batch_norm else None,
    )
    total_steps = config.train.steps or config.train.epochs * steps_per_epoch
    schedule = optimizer.make_schedule(
        config.optimizer, steps_per_epoch, total_steps, config.data.batch_size
    )
    return Recipe(
        config,
        spec,
        method,
        network,
        teachers.load(method, spec, config.model.dtype),
        fine_tuning.load(config, method),
        steps_per_epoch,
        total_steps,
        schedule,
        optimizer.make_optimizer(config.optimizer, schedule),
    )
