"""A run: what training writes to its workdir, and when it stops."""

import contextlib
import functools
import os
import signal
import time
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh

from one_jax import models
from one_jax.models import cost
from one_jax.reporting import curves, runs
from one_jax.runtime import environment, files, processes, records
from one_jax.runtime.interrupt import Interrupted, StopRequest
from one_jax.runtime.profiling import Profiler
from one_jax.training import checkpoint, guard, teachers, workdir
from one_jax.training.evaluation import Evaluator, one_line
from one_jax.training.experiment import Experiment
from one_jax.training.progress_bar import ProgressBar
from one_jax.training.state import Progress, TrainState


class Run:
    """A run's workdir, held by this process; a context manager.

    Entering locks the workdir; `restore` reads the newest checkpoint; `begin` starts writing.
    `data` is the data set's `Source.description()`; `fingerprint` covers the data set and the
    exported students.
    """

    def __init__(
        self,
        experiment: Experiment,
        directory: Path,
        evaluator: Evaluator,
        data: dict[str, Any],
        fingerprint: dict[str, Any],
    ):
        self._experiment, self._directory, self._evaluator = experiment, directory, evaluator
        config = experiment.config.to_dict()
        self._progress = Progress(data=data, config=config, fingerprint=fingerprint)
        self._saved_at: int | None = None
        self._stop: StopRequest | None = None
        self._stack = contextlib.ExitStack()
        self._checkpoints = checkpoint.Checkpoints(
            directory / workdir.CHECKPOINTS,
            experiment.config.train.keep_checkpoints,
            check=functools.partial(
                workdir.check_checkpoint, directory, experiment.config, fingerprint=fingerprint
            ),
        )

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            message = (
                f'workdir={str(self._directory)!r} cannot be written any more ({{reason}}); its '
                'checkpoints are untouched: free some space, and the same command resumes'
            )
            stack.enter_context(files.reporting_failed_writes(message))
            with processes.agreement():
                if processes.is_first():
                    stack.enter_context(workdir.hold(self._directory))
                # Another process may have written here since the first check.
                config, fingerprint = self._experiment.config, self._progress.fingerprint
                workdir.check(self._directory, config, fingerprint)
            stack.enter_context(self._checkpoints)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> bool | None:
        return self._stack.__exit__(*exception)

    def stored_result(self) -> dict[str, Any] | None:
        """Returns the content of result.json, or None if the run has not finished."""
        path = self._directory / workdir.RESULT
        return runs.read_result(path) if path.exists() else None

    def restore(self, template: Any) -> tuple[TrainState | None, int]:
        """Restores the state of the newest checkpoint, in the form of `template`, and its step.

        Returns:
          (None, 0) if there is no checkpoint.

        Raises:
          UserError: see `Checkpoints.restore_latest` and `workdir.check_checkpoint`.
        """
        restored = self._checkpoints.restore_latest(template)
        described = teachers.describe(self._experiment.method, self._experiment.teachers)
        self._progress.teachers = described
        if restored is None:
            return None, 0
        before = Progress.from_dict(restored.progress)
        self._progress.seconds, self._progress.evaluations = before.seconds, before.evaluations
        self._saved_at = restored.step
        if processes.is_first():
            print(f'resumes after step {restored.step} of {self._experiment.total_steps}')
        return restored.state, restored.step

    def note_signals(self) -> None:
        """From now on a signal stops the run when its state is saved; see `interrupt`."""
        self._stop = self._stack.enter_context(StopRequest(processes.request_stop))

    def begin(self, step: int) -> None:
        """Writes data.json and config.json, and opens records and progress bar after `step`."""
        config, enter = self._experiment.config, self._stack.enter_context
        first = processes.is_first()
        if first:
            # In this order: a run with a config.json has its data.json.
            files.write_json(self._directory / workdir.DATA, self._progress.fingerprint)
            files.write_json(self._directory / workdir.CONFIG, config.to_dict())
        self._records = enter(records.RecordWriter(self._directory, step)) if first else None
        stream = None if first else enter(open(os.devnull, 'w'))  # noqa: SIM115
        bar = ProgressBar(self._experiment.total_steps, config.data.batch_size, step, stream)
        self._bar = enter(contextlib.closing(bar))
        self._profiler = enter(
            Profiler(self._directory, config.profile_steps if first else 0, step)
        )
        self._started = time.monotonic() - self._progress.seconds

    def advance(self, step: int, state: TrainState) -> None:
        """Notes that the step was dispatched; does not wait for the device."""
        self._bar.update(step)
        self._profiler.advance(step, state)

    def log(self, step: int, state: TrainState) -> TrainState:
        """Writes the training record of the steps since the last one, and starts new sums.

        Raises:
          NonFiniteError: one of the steps ends the run.
        """
        metrics = jax.device_get(state.metrics)
        if metrics.first_nonfinite_step:
            guard.require_finite(self._experiment, step, state, self._saved_at)
        means, train = metrics.means(), self._experiment.config.train
        if train.skip_nonfinite_steps:
            means['skipped_steps'] = int(metrics.skipped)
        timing = {}
        if step % train.log_every == 0 or step == self._experiment.total_steps:
            rate = self._bar.log(step, self._epoch(step), means['loss'])
            timing['images_per_second'] = rate
        self._write(step, 'train', means, timing)
        return state.replace(metrics=_start_anew(state.metrics))

    def evaluate(self, step: int, state: TrainState) -> None:
        """Evaluates, on all splits after the last step, and writes their records."""
        guard.require_finite(self._experiment, step, state, self._saved_at)
        with self._bar.paused():
            for split in self._evaluator.splits(final=step == self._experiment.total_steps):
                evaluation = self._evaluator(state.evaluated_variables, split)
                self._write(step, split, evaluation)
                self._progress.evaluations[split] = {'step': step, **evaluation}
                self._bar.message(one_line(self._epoch(step), split, evaluation))

    def save(self, step: int, state: TrainState) -> None:
        """Starts saving a checkpoint."""
        guard.require_finite(self._experiment, step, state, self._saved_at)
        self._require_workdir()
        with self._bar.paused():
            self._progress.seconds = time.monotonic() - self._started
            self._checkpoints.save(step, state, vars(self._progress))
        self._saved_at = step

    def stop_requested(self, step: int) -> bool:
        """Whether all processes are to stop after this step."""
        return processes.stop_agreed(step, bool(self._stop))

    def interrupt(self, step: int) -> None:
        """Waits for the checkpoint and raises `Interrupted`."""
        self._checkpoints.wait()
        raise Interrupted(step, self._stop.signal_number or signal.SIGTERM)

    def finish(self, mesh: Mesh) -> dict[str, Any]:
        """Writes the curves and result.json, and returns its content.

        Raises:
          Interrupted: a signal came in after the last step.
        """
        self._checkpoints.wait()
        result = make_result(self._experiment, self._progress, self._directory.name, mesh)
        if processes.is_first():
            path = self._directory / records.FILE_NAME
            found = records.read_records(path) if path.exists() else []
            if found:
                curves.plot_run(found, self._directory / workdir.CURVES)
            else:
                print(f'{str(path)!r} holds no records: {workdir.CURVES} is not drawn')
            files.write_json(self._directory / workdir.RESULT, result)
        processes.wait_for_all('result')
        if self._stop:
            self.interrupt(self._experiment.total_steps)
        return result

    def _epoch(self, step: int) -> float:
        return step / self._experiment.steps_per_epoch

    def _write(self, step: int, split: str, *measures: Any) -> None:
        self._require_workdir()
        if self._records is not None:
            self._records.write(step, self._epoch(step), split, *measures)

    def _require_workdir(self) -> None:
        if processes.is_first():
            workdir.require(self._directory)


@jax.jit
def _start_anew(metrics: Any) -> Any:
    return metrics.start_anew()


def make_result(
    experiment: Experiment, progress: Progress, name: str, mesh: Mesh
) -> dict[str, Any]:
    """The content of result.json: the test split after the last step, never a chosen epoch."""
    config, spec, method = experiment.config, experiment.spec, experiment.method
    parameters, flops = cost.forward_cost(experiment.network, spec.image_shape)
    costs = {
        network: cost.forward_cost(
            models.make_backbone(network, spec.num_classes)(), spec.image_shape
        )
        for network in set(method.branch_networks)
    }
    if method.deployed == 'ensemble':
        ensemble = experiment.network.clone(make_aggregator=None)
        deployed_cost = cost.forward_cost(ensemble, spec.image_shape)
    else:
        branch = int(method.deployed.removeprefix('branch '))
        deployed_cost = costs[method.branch_networks[branch]]
    heterogeneous = {}
    if len(costs) > 1:
        branch_costs = np.array([costs[network] for network in method.branch_networks])
        heterogeneous = {
            'branch_network': list(method.branch_networks),
            'branch_parameters': branch_costs[:, 0].tolist(),
            'branch_flops': branch_costs[:, 1].tolist(),
        }
    evaluations = progress.evaluations
    validation = evaluations.get('validation', {})
    return {
        'name': name,
        'method': config.method.name,
        'network': config.model.name,
        'dataset': config.data.name,
        **{name: n for name, n in progress.data.items() if name == 'unreadable_images'},
        'seed': config.seed,
        'epochs': experiment.total_epochs,
        'split': 'test',
        **evaluations['test'],
        **{f'validation_{measure}': value for measure, value in validation.items()},
        'deployed': method.deployed,
        **heterogeneous,
        'teachers': progress.teachers,
        'parameters': parameters,
        'deployed_parameters': deployed_cost[0],
        'flops': flops,
        'deployed_flops': deployed_cost[1],
        'seconds': round(progress.seconds, 1),
        'versions': environment.versions(),
        'device': environment.device_name(),
        'num_devices': mesh.size,
    }
