"""Training: from a config to a result, and the loop that reads from top to bottom."""

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from one_jax import config as config_lib
from one_jax import (
    device_memory,
    evaluate,
    feed,
    fine_tuning,
    lock,
    parallel,
    processes,
    profiling,
    seeds,
    workdir,
)
from one_jax.data import datasets
from one_jax.errors import ConfigError, UserError
from one_jax.interrupt import Interrupted, StopRequest
from one_jax.progress import Progress
from one_jax.readback import Readback
from one_jax.recipe import Recipe, make_recipe
from one_jax.result import describe_data
from one_jax.run import Run
from one_jax.state import TrainState
from one_jax.train_step import make_train_step


def train_and_evaluate(config: Any, directory: str | Path) -> dict[str, Any]:
    """Trains and evaluates, or goes on where an earlier run in the same directory stopped.

    Args:
      config: the whole configuration, of one seed.
      directory: the workdir; see README for its files.

    Returns:
      The content of `result.json`.

    Raises:
      UserError: bad input; nothing was compiled or written.
      Interrupted: SIGTERM or Ctrl-C came; the state is saved.
    """
    if config.seeds:
        raise ConfigError('seeds', config.seeds, '() for one run: train_seeds takes several')
    return _train_all([config], [Path(directory)])[0]


def train_seeds(config: Any, directory: str | Path) -> list[dict[str, Any]]:
    """Trains the seeds `config.seeds` at once, in one program; or goes on.

    Args:
      config: the whole configuration.
      directory: in which each seed has a workdir of its own, `seed-N`, as if it were alone.

    Returns:
      The content of each `result.json`. Seeds that are finished already are not trained again.

    Raises:
      UserError, Interrupted: as `train_and_evaluate`.
    """
    directory = Path(directory)
    config_lib.validate_seeds(config)
    if (directory / workdir.CONFIG).exists():
        raise UserError(
            f'workdir={str(directory)!r} holds a run of one seed: give another --workdir for '
            f'seeds={config.seeds}'
        )
    directories = {seed: directory / seeds.folder(seed) for seed in config.seeds}
    for seed, path in directories.items():
        workdir.check(path, config_lib.resolve(seeds.config_of(config, seed)))
    results = {
        seed: workdir.read_json(path / workdir.RESULT)
        for seed, path in directories.items()
        if (path / workdir.RESULT).exists()
    }
    left = [seed for seed in config.seeds if seed not in results]
    if left:
        configs = [seeds.config_of(config, seed) for seed in left]
        trained = _train_all(configs, [directories[seed] for seed in left])
        results |= dict(zip(left, trained, strict=True))
    return [results[seed] for seed in config.seeds]


def _train_all(configs: list[Any], directories: list[Path]) -> list[dict[str, Any]]:
    """The runs of configs that differ in their seeds only, each in its directory."""
    mesh = parallel.make_mesh()
    # Those that train at once have an axis of seeds; one alone is a run as any other.
    train_mesh = parallel.seeds_mesh(mesh, len(configs)) if len(configs) > 1 else mesh
    configs, dataset = _prepare(configs, directories, mesh, train_mesh)
    if len(configs) == 1 and (directories[0] / workdir.RESULT).exists():
        return [workdir.read_json(directories[0] / workdir.RESULT)]
    plan = _plan(configs, dataset)
    recipe = plan.recipes[0]
    evaluator = evaluate.Evaluator(recipe.config, recipe.method, recipe.network, dataset, mesh)
    with contextlib.ExitStack() as stack:
        stack.enter_context(workdir.reporting_failed_writes(directories[0]))
        _take(directories, stack)
        runs = [
            Run(recipe, directory, len(configs))
            for recipe, directory in zip(plan.recipes, directories, strict=True)
        ]
        for run in runs:
            stack.enter_context(run.checkpoints)
        state, step = _start_or_resume(runs, mesh, train_mesh, dataset)
        examples = dataset.splits['train'] if plan.images_on_device else None
        train_step = device_memory.CompiledSteps(
            make_train_step(recipe, train_mesh),
            recipe,
            train_mesh,
            len(runs),
            0 if examples is None else len(examples),
        )
        if step < recipe.total_steps:
            train_step.require_memory(plan.steps_per_call)
        if processes.is_first():
            for run in runs:
                workdir.write_json(run.directory / workdir.CONFIG, run.recipe.config.to_dict())
        batches = feed.Feed(plan.batches, train_mesh, plan.steps_per_call, step, examples)
        _train(runs, mesh, train_mesh, train_step, batches, evaluator, state, step)
        results = [run.finish(train_mesh) for run in runs]
        processes.wait_for_all('result')
    return results


def _take(directories: Sequence[Path], stack: contextlib.ExitStack) -> None:
    """Makes the workdirs this run's alone, until `stack` closes; process 0 does it for all."""
    error = None
    if processes.is_first():
        try:
            for directory in directories:
                stack.enter_context(lock.hold(directory))
        except UserError as raised:
            error = raised
    processes.agree({}, error)


def _prepare(
    configs: Sequence[Any], directories: Sequence[Path], mesh: Mesh, train_mesh: Mesh
) -> tuple[list[Any], datasets.Dataset | datasets.StreamedDataset | None]:
    """Checks all there is to check, and reads the data (not for a run that is finished).

    Several processes either all go on, or all stop.
    """
    error, resolved, dataset = None, [], None
    try:
        config_lib.validate(configs[0], parallel.data_devices(train_mesh), mesh.size)
        parallel.use_compilation_cache(configs[0].train.compilation_cache_dir)
        resolved = [config_lib.resolve(config) for config in configs]
        for directory, config in zip(directories, resolved, strict=True):
            workdir.check(directory, config)
    except UserError as raised:
        error = raised
    # Process 0 builds a data set that is not there yet.
    with processes.first_alone('data'):
        try:
            if error is None and not (directories[0] / workdir.RESULT).exists():
                dataset = datasets.load(configs[0].data)
        except UserError as raised:
            error = raised
    facts = {'version of the code': '', 'config': '', 'data set': ''}
    if error is None and jax.process_count() > 1:
        fields = config_lib.flatten(resolved[0])
        same = {name: fields[name] for name in fields.keys() - set(config_lib.LOCAL_FIELDS)}
        same['seeds'] = [config.seed for config in resolved]
        facts['version of the code'] = _lines(workdir.versions())
        facts['config'] = _lines(same)
        facts['data set'] = _lines({} if dataset is None else dataset.facts())
    processes.agree(facts, error)
    return resolved, dataset


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is decided before anything is compiled: of each seed its batches and its recipe."""

    batches: list[Any]
    recipes: list[Recipe]
    images_on_device: bool
    steps_per_call: int


def _plan(configs: Sequence[Any], dataset: datasets.Dataset | datasets.StreamedDataset) -> _Plan:
    """Several processes decide alike, and have the same students to learn from."""
    error, plan, facts = None, None, {'student': '', 'place for its images': ''}
    try:
        config = configs[0]
        images_on_device = feed.on_device(config, dataset)
        batches = [dataset.train_batches(c.data.batch_size, c.seed) for c in configs]
        recipe = make_recipe(config, dataset.spec, batches[0].steps_per_epoch)
        plan = _Plan(
            batches,
            [dataclasses.replace(recipe, config=config) for config in configs],
            images_on_device,
            feed.steps_per_call(config, images_on_device, batches[0].steps_per_epoch),
        )
        facts['student'] = _lines(recipe.student_checksums())
        facts['place for its images'] = 'device' if images_on_device else 'host'
    except UserError as raised:
        error = raised
    processes.agree(facts, error)
    return plan


def _lines(facts: dict[str, Any]) -> str:
    return '\n'.join(f'{name}={value!r}' for name, value in sorted(facts.items()))


def _start_or_resume(
    runs: Sequence[Run],
    mesh: Mesh,
    train_mesh: Mesh,
    dataset: datasets.Dataset | datasets.StreamedDataset,
) -> tuple[TrainState, int]:
    """The state after the newest good checkpoint or a fresh one, and how many steps it has done."""
    recipe = runs[0].recipe

    def initialise(seed: jax.Array) -> TrainState:
        state = recipe.random_state(seed)
        if recipe.initial is None:
            return state
        return fine_tuning.start_from(state, recipe.initial, dataset.label_names)

    replicated = NamedSharding(mesh, parallel.REPLICATED)
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
        jax.eval_shape(initialise, jax.ShapeDtypeStruct((), np.uint32)),
    )
    fresh = jax.jit(initialise, out_shardings=replicated)
    states, step = [], 0
    for run, restored in zip(runs, seeds.restore(runs, template), strict=True):
        run.begin(restored, describe_data(dataset))
        step = 0 if restored is None else restored.step
        states.append(fresh(np.uint32(run.recipe.config.seed)) if not step else restored.state)
    return states[0] if len(runs) == 1 else seeds.stack(states, train_mesh), step


def _next_record(recipe: Recipe, step: int) -> int:
    """The step of the first training record after `step`."""
    log_every, steps_per_epoch = recipe.config.train.log_every, recipe.steps_per_epoch
    return min(
        (step // log_every + 1) * log_every,
        (step // steps_per_epoch + 1) * steps_per_epoch,
        recipe.total_steps,
    )


class _Records:
    """Takes the scalars of all seeds from the device to the records of each run."""

    def __init__(self, runs: Sequence[Run], bar: Progress):
        self._runs, self._bar = runs, bar

    def take(self, step: int, scalars: dict[str, np.ndarray]) -> None:
        """The scalars [n, ...], or [n, S, ...] of several seeds, of the steps after `step`."""
        for index, run in enumerate(self._runs):
            own = scalars
            if len(self._runs) > 1:
                own = {name: values[:, index] for name, values in scalars.items()}
            run.take(step, own)

    def write(self, step: int) -> None:
        """The records of the steps up to this one."""
        recipe, timing = self._runs[0].recipe, {}
        if step % recipe.config.train.log_every == 0 or step == recipe.total_steps:
            loss = np.mean([run.last_loss() for run in self._runs])
            epoch = step / recipe.steps_per_epoch
            timing['images_per_second'] = self._bar.log(step, epoch, loss)
        for run in self._runs:
            run.write_window(step, timing)


def _train(
    runs: Sequence[Run],
    mesh: Mesh,
    train_mesh: Mesh,
    train_step: device_memory.CompiledSteps,
    batches: feed.Feed,
    evaluator: evaluate.Evaluator,
    state: TrainState,
    step: int,
) -> None:
    """Trains from `state`, after `step`, to the last step; leaves checkpoints and records."""
    recipe = runs[0].recipe
    steps_per_epoch, settings = recipe.steps_per_epoch, recipe.config.train
    teacher_variables = parallel.replicate(
        [teacher.variables for teacher in recipe.teachers], train_mesh
    )
    unstacked = seeds.Unstacker(mesh, len(runs))
    started = time.monotonic() - runs[0].progress['seconds']
    stopping = False

    def due(every_epochs: int) -> bool:
        epoch, rest = divmod(step, steps_per_epoch)
        return step == recipe.total_steps or (rest == 0 and epoch % every_epochs == 0)

    def refreshed() -> TrainState:
        states = [evaluator.refresh(each) for each in unstacked(state)]
        return states[0] if len(states) == 1 else seeds.stack(states, train_mesh)

    def save() -> None:
        readback.read()
        seconds = time.monotonic() - started
        for run, own in zip(runs, unstacked(state), strict=True):
            run.save(step, own, seconds)

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest(processes.stop_signals()))
        for run in runs:
            stack.enter_context(run.open_records())
        bar = stack.enter_context(contextlib.closing(_progress_bar(recipe, step, len(runs))))
        traced_steps = recipe.config.profile_steps if processes.is_first() else 0
        profiler = profiling.Profiler(runs[0].directory, traced_steps)
        records = _Records(runs, bar)
        readback = Readback(records.take, records.write)
        while step < recipe.total_steps and not stopping:
            if recipe.method.needs_validation and step % steps_per_epoch == 0:
                state = refreshed()
            record_at = _next_record(recipe, step)
            count = min(batches.num_steps, record_at - step)
            profiler.before(step, state)
            state, scalars = train_step(state, batches(step, count), *teacher_variables)
            readback.add(step, count, scalars)
            step += count
            profiler.after(step, state)
            bar.update(step)
            if step == record_at:
                readback.mark_record(step)
            if jax.process_count() == 1:
                readback.read_ready()
            if due(settings.eval_every_epochs):
                readback.read()
                with bar.paused():
                    for run, own in zip(runs, unstacked(state), strict=True):
                        for line in run.evaluate(evaluator, own, step):
                            bar.message(line)
            if due(settings.checkpoint_every_epochs):
                with bar.paused():
                    save()
            stopping = processes.stop_agreed(step, bool(stop))
        profiler.close(state)
        if any(run.saved_at != step for run in runs):
            save()
        readback.read()
        for run in runs:
            run.checkpoints.wait()
    if step < recipe.total_steps:
        raise Interrupted(step, stop.signal_number or signal.SIGTERM)


def _progress_bar(recipe: Recipe, step: int, num_seeds: int) -> Progress:
    stream = None if processes.is_first() else open(os.devnull, 'w')  # noqa: SIM115
    images_a_step = recipe.config.data.batch_size * num_seeds
    return Progress(recipe.total_steps, images_a_step, step, stream)
