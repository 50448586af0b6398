"""Evaluates a run: every branch, the teacher and the ensemble."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from one_jax import config as config_lib
from one_jax import data, methods, models
from one_jax.data import augment
from one_jax.errors import require
from one_jax.models.multibranch import Outputs
from one_jax.runtime import memory, parallel
from one_jax.students import classes
from one_jax.students.evaluation import (
    compile_ahead,
    evaluate_split,
    evaluation_record,
    make_evaluation_step,
)
from one_jax.training import saved
from one_jax.training.state import TrainState


class Evaluator:
    """Evaluates a branched network on the splits of a data set.

    Args:
      config: resolved.
      method: the method that trained the network.
      network: a `MultiBranch`.
      source: the data set.
      mesh: devices.
    """

    def __init__(
        self,
        config: Any,
        method: methods.Method,
        network: models.MultiBranch,
        source: data.Source,
        mesh: Mesh,
    ):
        self._config, self._method, self._source, self._mesh = config, method, source, mesh
        spec = source.spec

        def apply(variables: Any, images: jax.Array) -> Outputs:
            normalised = augment.normalise(images, spec.mean, spec.std, jnp.float32)
            return network.apply(variables, normalised, train=False)

        def validation_statistics(variables: Any, batch: dict[str, jax.Array]) -> Any:
            logits = apply(variables, batch['image']).logits
            statistics = method.validation_statistics(logits, batch['label'], batch['mask'])
            return lax.psum(statistics, parallel.DATA_AXIS)

        self._step = make_evaluation_step(
            lambda variables, images: apply(variables, images).evaluated_logits(),
            mesh,
            method.num_branches,
        )
        self._validation_step = parallel.data_parallel(validation_statistics, mesh)

    def compile(self, variables: Any, available: int | None = None) -> int:
        """Compiles the evaluation ahead; returns a device's bytes of a batch and temporaries."""
        size = self._config.data.eval_batch_size
        self._step, needed = compile_ahead(
            self._step, variables, self._source, size, self._mesh, available
        )
        return needed

    def splits(self, final: bool) -> tuple[str, ...]:
        """Returns all splits at the end of training, before that the first."""
        splits = self._source.evaluation_splits
        return splits if final else splits[:1]

    def __call__(self, variables: Any, split: str) -> dict[str, Any]:
        """Evaluates one split; see `evaluation_record`."""
        summary = evaluate_split(self._step, variables, self._batches(split), self._mesh)
        num_branches = self._method.num_branches
        has_teacher = len(summary['top1']) == num_branches + 2
        return evaluation_record(summary, num_branches, has_teacher, self._method.deployed)

    def update_method_state(self, state: TrainState) -> TrainState:
        """Recomputes the method's state from the validation split, if the method uses it."""
        if not self._method.uses_validation:
            return state
        statistics = [
            self._validation_step(state.variables, parallel.shard_batch(batch, self._mesh))
            for batch in self._batches('validation')
        ]
        total = jax.tree.map(lambda *values: sum(values), *statistics)
        method_state = self._method.state_from_validation(total)
        return state.replace(method=parallel.replicate(method_state, self._mesh))

    def _batches(self, split: str) -> Any:
        return self._source.evaluation_batches(split, self._config.data.eval_batch_size)


def one_line(epoch: float, split: str, record: dict[str, Any]) -> str:
    """Formats the top-1 of all branches and the teacher for the log."""
    branches = ' '.join(f'{top1:.2f}' for top1 in record['branch_top1'])
    teacher = record['teacher_top1']
    line = f'epoch {epoch:g}  {split} top-1: branches {branches}'
    return line if teacher is None else f'{line}  teacher {teacher:.2f}'


def evaluate_workdir(directory: Path) -> dict[str, Any]:
    """Evaluates the newest checkpoint of a run on the test split.

    Raises:
      UserError: there is no run, no checkpoint or no data set.
    """
    run = saved.load(directory)
    mesh = parallel.make_mesh()
    config_lib.validate(run.config, mesh.size, effects=False)
    # A place on the machine of the run.
    parallel.use_compilation_cache(run.config.train.compilation_cache_dir, required=False)
    source = data.open(run.config.data)
    names = run.progress.data.get('label_names', source.label_names), source.label_names
    same = classes.match(*names, 'workdir', str(directory)) is None
    require(same, 'data.name', run.config.data.name, 'classes in the order of training')
    # Those of a folder in memory change with its training images.
    recorded = {k: tuple(v) for k, v in run.progress.data.items() if k in ('mean', 'std')}
    source = dataclasses.replace(source, spec=dataclasses.replace(source.spec, **recorded))
    network = models.make_multibranch(run.config.model, source.spec.num_classes, run.method)
    evaluator = Evaluator(run.config, run.method, network, source, mesh)
    variables = parallel.replicate(run.variables, mesh)
    evaluator.compile(variables, memory.device_bytes(jax.local_devices()[0]))
    record = evaluator(variables, 'test')
    return {'step': run.step, 'split': 'test', **record}
