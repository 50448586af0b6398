"""What a config and a data set's description determine, put together."""

import dataclasses
from typing import Any

import optax
from flax import linen as nn

from one_jax import methods, models, optimizer, parallel, teachers
from one_jax.data import datasets
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
    steps_per_epoch: int
    total_steps: int
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation

    @property
    def total_epochs(self) -> float:
        return self.total_steps / self.steps_per_epoch


def make_recipe(config: Any, spec: datasets.DatasetSpec, steps_per_epoch: int) -> Recipe:
    """Puts together what training needs; `config` is resolved and valid.

    Raises:
      UserError: a frozen teacher cannot be read, or does not suit the data set.
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
        teachers.load(method, spec),
        steps_per_epoch,
        total_steps,
        schedule,
        optimizer.make_optimizer(config.optimizer, schedule),
    )
