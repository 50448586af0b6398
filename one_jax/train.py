"""Training, from a config to a result: the loop reads from top to bottom."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from one_jax import config as config_lib
from one_jax import data, fields
from one_jax.reporting import runs
from one_jax.runtime import environment, parallel, processes
from one_jax.training import feed, workdir
from one_jax.training.compiled_step import CompiledStep
from one_jax.training.evaluation import Evaluator
from one_jax.training.experiment import Experiment, make_experiment
from one_jax.training.run import Run
from one_jax.training.state import TrainState
from one_jax.training.step import make_initial_state


def train_and_evaluate(config: Any, directory: str | Path) -> dict[str, Any]:
    """Trains and evaluates, or resumes where an earlier run in the same directory stopped.

    Args:
      config: the whole configuration.
      directory: the workdir; see the README for its files.

    Returns:
      The content of `result.json`.

    Raises:
      UserError: bad input, or the run began on other data; nothing was compiled or written.
      Interrupted: on SIGTERM or Ctrl-C, with the state saved.
    """
    directory, mesh = Path(directory), parallel.make_mesh()
    config = _check(config, directory, mesh)
    if _outlived_its_data(config, directory):
        return runs.read_result(directory / workdir.RESULT)
    source, batches, experiment = _open(config, mesh)
    evaluator = Evaluator(config, experiment.method, experiment.network, source, mesh)
    fingerprint = source.fingerprint | experiment.student_digests()
    with Run(experiment, directory, evaluator, source.description(), fingerprint) as run:
        if result := run.stored_result():
            return result
        initial_state, seed = make_initial_state(experiment, mesh), np.uint32(config.seed)
        state, step = run.restore(jax.eval_shape(initial_state, seed))
        state = initial_state(seed) if state is None else state
        if step < experiment.total_steps:
            step_and_calls = _compile(
                run, experiment, evaluator, source, batches, mesh, state, step
            )
            run.begin(step)
            _train(run, experiment, evaluator, *step_and_calls, state, step)
        return run.finish(mesh)


def _train(
    run: Run,
    experiment: Experiment,
    evaluator: Evaluator,
    train_step: CompiledStep,
    calls: feed.Feed,
    state: TrainState,
    step: int,
) -> None:
    """Trains from `state`, after `step`, to the last step."""
    train = experiment.config.train
    if step == 0:
        state = evaluator.update_method_state(state)
    for step, batch in calls:
        state = train_step(state, batch)
        run.advance(step, state)
        stop = run.stop_requested(step)
        if experiment.logs_at(step):
            state = run.log(step, state)
        if experiment.ends_epoch(step, train.eval_every_epochs):
            run.evaluate(step, state)
        if experiment.ends_epoch(step):
            state = evaluator.update_method_state(state)
        if experiment.ends_epoch(step, train.checkpoint_every_epochs) or stop:
            run.save(step, state)
        if stop and step < experiment.total_steps:
            run.interrupt(step)


def _check(config: Any, directory: Path, mesh: Mesh) -> Any:
    """Returns the resolved config if it is valid, fits the workdir, and all processes agree."""
    with processes.agreement() as facts:
        # A run of an earlier version may have begun with fields that have no effect.
        begun = (directory / workdir.CONFIG).exists()
        config_lib.validate(config, mesh.size, effects=not begun)
        parallel.use_compilation_cache(config.train.compilation_cache_dir)
        config = config_lib.resolve(config)
        workdir.check(directory, config)
        facts['version of the code'] = environment.versions
        facts['config'] = lambda: {
            name: value
            for name, value in fields.flatten(config).items()
            if name not in fields.LOCAL_FIELDS
        }
    return config


def _outlived_its_data(config: Any, directory: Path) -> bool:
    """Whether the run has finished and its data, or a student that it used, is gone; reports it."""
    with processes.agreement() as facts:
        finished, missing = (directory / workdir.RESULT).exists(), []
        if finished:
            students = [*config.method.get('teachers', '').split(','), config.model.init_from]
            missing = [x for x in map(str.strip, students) if x and not os.path.exists(x)]
            if not data.exists(config.data):
                missing.insert(0, config.data.root or config.data.name)
        facts['data on disk'] = {'missing': missing}
    if missing and processes.is_first():
        print(
            f'{directory}: the result of a finished run, not compared with the data of this '
            f'command: there is no {", ".join(map(repr, missing))}'
        )
    return bool(missing)


def _open(config: Any, mesh: Mesh) -> tuple[data.Source, data.Batches, Experiment]:
    """Opens the data set and builds the experiment; all processes must see the same data."""
    # Process 0 goes first: it builds a small data set that is not on disk yet.
    with processes.agreement() as facts:
        with processes.first_alone('data'):
            source = data.open(config.data)
        facts['data set'] = source.facts()
    if processes.is_first():
        print(source.summary)
    with processes.agreement() as facts:
        batches = source.train_batches(config.data.batch_size, config.seed, config.data.drop_last)
        feed.require_parts(config, batches, mesh)
        experiment = make_experiment(
            config, source.spec, source.label_names, batches.steps_per_epoch
        )
        facts['student'] = experiment.student_digests
    return source, batches, experiment


def _compile(
    run: Run,
    experiment: Experiment,
    evaluator: Evaluator,
    source: data.Source,
    batches: data.Batches,
    mesh: Mesh,
    state: TrainState,
    step: int,
) -> tuple[CompiledStep, feed.Feed]:
    """Compiles train step and evaluation, checks that they fit, and feeds the step from `step`."""
    config = experiment.config
    with processes.agreement() as facts:
        examples = feed.examples_on_device(config, source)
        num_steps = feed.steps_per_call(config, examples is not None, experiment.steps_per_epoch)
        facts['place for its images'] = {'device': examples is not None}
        num_examples = 0 if examples is None else len(examples)
        train_step = CompiledStep(experiment, mesh, num_steps, num_examples, batches.last_size)
        evaluation = evaluator.compile(state.evaluated_variables)
        train_step.memory = dataclasses.replace(train_step.memory, evaluation=evaluation)
        if processes.is_first():
            print(train_step.memory)
        train_step.require_memory()
        # All processes come here before any goes on: none ends while others train.
        run.note_signals()
    return train_step, feed.Feed(experiment, batches, mesh, num_steps, step, examples)
