"""Training, from a config to a result: the loop reads from top to bottom."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from one_jax import config as config_lib
from one_jax import data, fields
from one_jax.runtime import environment, files, parallel, processes
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
        return files.read_json(directory / workdir.RESULT)
    source, batches, experiment = _open(config)
    evaluator = Evaluator(config, experiment.method, experiment.network, source, mesh)
    fingerprint = source.fingerprint | experiment.student_digests()
    with Run(experiment, directory, evaluator, source.description(), fingerprint) as run:
        if result := run.stored_result():
            return result
        initial_state, seed = make_initial_state(experiment, mesh), np.uint32(config.seed)
        state, step = run.restore(jax.eval_shape(initial_state, seed))
        state = initial_state(seed) if state is None else state
        if step < experiment.total_steps:
            train_step, calls = _compile(experiment, source, batches, mesh, step)
            run.begin(step)
            _train(run, experiment, evaluator, train_step, calls, state, step)
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
        config_lib.validate(config, mesh.size)
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
            missing = [x for x in map(str.strip, students) if x and not Path(x).exists()]
            if not data.exists(config.data):
                missing.insert(0, config.data.root or config.data.name)
        facts['data on disk'] = {'missing': missing}
    if missing and processes.is_first():
        print(
            f'{directory}: the result of a finished run, not compared with the data of this '
            f'command: there is no {", ".join(map(repr, missing))}'
        )
    return bool(missing)


def _open(config: Any) -> tuple[data.Source, data.Batches, Experiment]:
    """Opens the data set and builds the experiment; all processes must see the same data."""
    # Process 0 goes first: it builds a small data set that is not on disk yet.
    with processes.agreement() as facts:
        with processes.first_alone('data'):
            source = data.open(config.data)
        facts['data set'] = source.facts()
    with processes.agreement() as facts:
        batches = source.train_batches(config.data.batch_size, config.seed)
        experiment = make_experiment(
            config, source.spec, source.label_names, batches.steps_per_epoch
        )
        facts['student'] = experiment.student_digests
    return source, batches, experiment


def _compile(
    experiment: Experiment, source: data.Source, batches: data.Batches, mesh: Mesh, step: int
) -> tuple[CompiledStep, feed.Feed]:
    """Compiles the train step, checks that it fits into memory, and feeds it from `step` on."""
    config = experiment.config
    with processes.agreement() as facts:
        examples = feed.examples_on_device(config, source)
        num_steps = feed.steps_per_call(config, examples is not None, experiment.steps_per_epoch)
        facts['place for its images'] = {'device': examples is not None}
        num_examples = 0 if examples is None else len(examples)
        train_step = CompiledStep(experiment, mesh, num_steps, num_examples)
        if processes.is_first():
            print(train_step.memory)
        train_step.require_memory()
    return train_step, feed.Feed(experiment, batches, mesh, num_steps, step, examples)
