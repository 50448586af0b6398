"""One seed's run: its workdir, and all that is kept there."""

import contextlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from one_jax import checkpoint, evaluate, guard, lock, metrics, processes, teachers, workdir
from one_jax.analysis import curves
from one_jax.errors import ConfigError
from one_jax.recipe import Recipe
from one_jax.result import make_result
from one_jax.state import TrainState


class Run:
    """What one seed writes while it trains, alone or beside others.

    Args:
      recipe: with the seed in its config.
      directory: the workdir.
      num_seeds: how many train at once.

    Attributes:
      recipe: as given.
      directory: as given.
      checkpoints: of the run.
      progress: what is kept beside the state: `seconds` so far, the `window` of metrics that are in
        no record yet, the last of the `evaluations` of each split, the `data` and the `teachers`.
      saved_at: the step of the newest checkpoint; 0 for none.
      label: 'seed 3: ' where others train at once.
    """

    def __init__(self, recipe: Recipe, directory: Path, num_seeds: int = 1):
        self.recipe, self.directory, self._num_seeds = recipe, directory, num_seeds
        self.checkpoints = checkpoint.Checkpoints(
            directory / workdir.CHECKPOINTS, keep_latest=recipe.config.train.keep_checkpoints
        )
        self.progress: dict[str, Any] = {'seconds': 0.0, 'window': [], 'evaluations': {}}
        self.saved_at = 0
        self.label = f'seed {recipe.config.seed}: ' if num_seeds > 1 else ''

    def begin(self, restored: checkpoint.Restored | None, data: dict[str, Any]) -> None:
        """Goes on from a checkpoint, or begins, with `data` of `result.describe_data`.

        Raises:
          ConfigError: the frozen teachers are others than those it began with.
        """
        step = 0
        if restored is not None:
            self.progress, step = restored.progress, restored.step
            if processes.is_first():
                print(f'{self.label}resumes after step {step} of {self.recipe.total_steps}')
        self.progress['data'] = data
        self._check_teachers()
        self.saved_at = step
        self._window = [
            {name: np.asarray(values) for name, values in entry.items()}
            for entry in self.progress['window']
        ]
        self._guard = guard.Guard(
            self.recipe.config,
            self.recipe.steps_per_epoch,
            self.progress.get('skipped_in_a_row', 0),
            self.label,
        )
        self._step = step

    def _check_teachers(self) -> None:
        described = teachers.describe(self.recipe.method, self.recipe.teachers)
        before = [teacher['sha256'] for teacher in self.progress.get('teachers', described)]
        if before != [teacher['sha256'] for teacher in described]:
            raise ConfigError(
                'method.teachers',
                self.recipe.config.method.teachers,
                f'the {len(before)} with which the run began, in their order: '
                'the weights are others',
            )
        self.progress['teachers'] = described

    def open_records(self) -> contextlib.AbstractContextManager:
        """Where the records go until it is closed; process 0 writes them for all."""
        first = processes.is_first()
        self._records = (
            metrics.RecordWriter(self.directory, resume_step=self._step)
            if first
            else metrics.NoRecords()
        )
        return self._records

    def take(self, step: int, scalars: dict[str, np.ndarray]) -> None:
        """Looks at the scalars [n, ...] of the steps after `step`, and keeps them for the record.

        Raises:
          NonFiniteError: see `guard`.
        """
        self._guard.check(step + 1, scalars, self.saved_at or None)
        self._window.append(scalars)

    def write_window(self, step: int, timing: dict[str, float]) -> None:
        """The record of what was taken since the last one."""
        self._require_workdir()
        means, self._window = mean_of_steps(self._window), []
        self._records.write(step, self._epoch(step), 'train', means, timing)

    def last_loss(self) -> float:
        """Of the window, the mean."""
        return mean_of_steps(self._window)['loss']

    def evaluate(self, evaluator: evaluate.Evaluator, state: TrainState, step: int) -> list[str]:
        """Evaluates and writes the records; returns a line about each split."""
        self._guard.check_variables(step, state.variables, self.saved_at or None)
        lines = []
        for split in evaluator.splits(final=step == self.recipe.total_steps):
            record = evaluator(state.evaluated_variables, split)
            self._records.write(step, self._epoch(step), split, record)
            self.progress['evaluations'][split] = {'step': step, **record}
            lines.append(self.label + evaluate.one_line(self._epoch(step), split, record))
        return lines

    def save(self, step: int, state: TrainState, seconds: float) -> None:
        """Starts to save the state; all scalars before it were taken."""
        self._guard.check_variables(step, state.variables, self.saved_at or None)
        self._require_workdir()
        self.progress['seconds'] = seconds
        self.progress['window'] = jax.tree.map(lambda x: x.tolist(), self._window)
        self.progress['skipped_in_a_row'] = self._guard.skipped_in_a_row
        self.checkpoints.save(step, state, self.progress, self._selection_metrics(step))
        self.saved_at = step

    def finish(self, mesh: Mesh) -> dict[str, Any]:
        """Writes the curves and the result, and returns the latter."""
        result = make_result(self.recipe, self.progress, self.directory.name, mesh)
        result['seeds_at_once'] = self._num_seeds
        if processes.is_first():
            curves.plot_run(metrics.read_records(self.directory), self.directory / workdir.CURVES)
            workdir.write_json(self.directory / workdir.RESULT, result)
        return result

    def _epoch(self, step: int) -> float:
        return step / self.recipe.steps_per_epoch

    def _require_workdir(self) -> None:
        if processes.is_first():
            lock.require(self.directory)

    def _selection_metrics(self, step: int) -> dict[str, float] | None:
        """What the best checkpoint is chosen by: the held-out images; never the test set."""
        record = self.progress['evaluations'].get('validation')
        if record is None or record['step'] != step:
            return None
        return {'deployed_top1': record['deployed_top1']}


def mean_of_steps(window: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean over the steps of a window, in float64; steps that were skipped only count."""
    steps = {
        name: np.concatenate([np.asarray(entry[name], np.float64) for entry in window])
        for name in window[0]
    }
    skipped = steps.pop(guard.SKIPPED, None)
    if skipped is None:
        return {name: values.mean(axis=0).tolist() for name, values in steps.items()}
    # All skipped: NaN, which the record shows as null.
    done = skipped == 0
    with np.errstate(invalid='ignore'):
        means = {
            name: (values[done].sum(axis=0) / done.sum()).tolist() for name, values in steps.items()
        }
    return {**means, guard.SKIPPED: int(skipped.sum())}
