"""Training: the step, and the loop that reads from top to bottom."""

import contextlib
import itertools
import os
import signal
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from one_jax import (
    checkpoint,
    device_memory,
    evaluate,
    fine_tuning,
    guard,
    lock,
    metrics,
    parallel,
    processes,
    teachers,
    workdir,
)
from one_jax import config as config_lib
from one_jax.analysis import curves
from one_jax.data import datasets, resident, streaming
from one_jax.errors import ConfigError, UserError
from one_jax.interrupt import Interrupted, StopRequest
from one_jax.progress import Progress
from one_jax.recipe import Recipe, make_recipe
from one_jax.result import describe_data, make_result
from one_jax.state import TrainState
from one_jax.train_step import make_train_step

# Compiled calls that may be under way before the host waits: enough to keep the device busy, few
# enough that a signal is soon obeyed.
MAX_CALLS_IN_FLIGHT = 4


def train_and_evaluate(config: Any, directory: str | Path) -> dict[str, Any]:
    """Trains and evaluates, or goes on where an earlier run in the same directory stopped.

    Args:
      config: the whole configuration.
      directory: the workdir; see README for its files.

    Returns:
      The content of `result.json`.

    Raises:
      UserError: bad input; nothing was compiled or written.
      Interrupted: SIGTERM or Ctrl-C came; the state is saved.
    """
    directory = Path(directory)
    mesh = parallel.make_mesh()
    config, dataset = _prepare(config, directory, mesh)
    if (directory / workdir.RESULT).exists():
        return workdir.read_json(directory / workdir.RESULT)
    batches, recipe = _plan(config, dataset)
    evaluator = evaluate.Evaluator(config, recipe.method, recipe.network, dataset, mesh)
    with workdir.reporting_failed_writes(directory), contextlib.ExitStack() as stack:
        _take(directory, stack)
        checkpoints = stack.enter_context(
            checkpoint.Checkpoints(
                directory / workdir.CHECKPOINTS, keep_latest=config.train.keep_checkpoints
            )
        )
        state, progress = _start_or_resume(recipe, mesh, checkpoints, dataset.label_names)
        progress['data'] = describe_data(dataset)
        _check_teachers(recipe, progress)
        train_step = device_memory.CompiledSteps(make_train_step(recipe, mesh), recipe, mesh)
        if count := _steps_to_call(recipe, int(state.step)):
            train_step.require_memory(count)
        if processes.is_first():
            workdir.write_json(directory / workdir.CONFIG, config.to_dict())
        state = _train(
            recipe, mesh, train_step, batches, evaluator, state, progress, checkpoints, directory
        )
        result = make_result(recipe, progress, directory.name, mesh)
        if processes.is_first():
            curves.plot_run(metrics.read_records(directory), directory / workdir.CURVES)
            workdir.write_json(directory / workdir.RESULT, result)
        processes.wait_for_all('result')
    return result


def _take(directory: Path, stack: contextlib.ExitStack) -> None:
    """Makes the workdir this run's alone, until `stack` closes; process 0 does it for all."""
    error = None
    if processes.is_first():
        try:
            stack.enter_context(lock.hold(directory))
        except UserError as raised:
            error = raised
    processes.agree({}, error)


def _prepare(
    config: Any, directory: Path, mesh: Mesh
) -> tuple[Any, datasets.Dataset | datasets.StreamedDataset | None]:
    """Checks all there is to check, and reads the data (not for a run that is finished).

    Several processes either all go on, or all stop.
    """
    error, resolved, dataset = None, None, None
    try:
        config_lib.validate(config, mesh.size)
        parallel.use_compilation_cache(config.train.compilation_cache_dir)
        resolved = config_lib.resolve(config)
        workdir.check(directory, resolved)
    except UserError as raised:
        error = raised
    # Process 0 builds a data set that is not there yet.
    with processes.first_alone('data'):
        try:
            if error is None and not (directory / workdir.RESULT).exists():
                dataset = datasets.load(config.data)
        except UserError as raised:
            error = raised
    facts = {'version of the code': '', 'config': '', 'data set': ''}
    if error is None and jax.process_count() > 1:
        fields = config_lib.flatten(resolved)
        same = {name: fields[name] for name in fields.keys() - set(config_lib.MACHINE_FIELDS)}
        facts['version of the code'] = _lines(workdir.versions())
        facts['config'] = _lines(same)
        facts['data set'] = _lines({} if dataset is None else dataset.facts())
    processes.agree(facts, error)
    return resolved, dataset


def _plan(config: Any, dataset: datasets.Dataset | datasets.StreamedDataset) -> tuple[Any, Recipe]:
    """The batches and the recipe; several processes have the same students to learn from."""
    error, facts = None, {'student': ''}
    try:
        batches = dataset.train_batches(config.data.batch_size, config.seed)
        recipe = make_recipe(config, dataset.spec, batches.steps_per_epoch)
        facts['student'] = _lines(recipe.student_checksums())
    except UserError as raised:
        error = raised
    processes.agree(facts, error)
    return batches, recipe


def _lines(facts: dict[str, Any]) -> str:
    return '\n'.join(f'{name}={value!r}' for name, value in sorted(facts.items()))


def _start_or_resume(
    recipe: Recipe,
    mesh: Mesh,
    checkpoints: checkpoint.Checkpoints,
    label_names: tuple[str, ...],
) -> tuple[TrainState, dict[str, Any]]:
    """The state of the newest good checkpoint or a fresh one, and what is kept beside it.

    The second value is kept beside the state: `seconds` so far, the `window` of metrics not yet in
    a record, and the last of the `evaluations` of each split.
    """

    def initialise() -> TrainState:
        state = recipe.random_state()
        if recipe.initial is None:
            return state
        return fine_tuning.start_from(state, recipe.initial, label_names)

    replicated = NamedSharding(mesh, P())
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
        jax.eval_shape(initialise),
    )
    restored = checkpoints.restore_latest(template)
    if restored is None:
        state = jax.jit(initialise, out_shardings=replicated)()
        return state, {'seconds': 0.0, 'window': [], 'evaluations': {}}
    if processes.is_first():
        print(f'resumes after step {restored.step} of {recipe.total_steps}')
    return restored.state, restored.progress


def _check_teachers(recipe: Recipe, progress: dict[str, Any]) -> None:
    """Notes the frozen teachers in `progress`; those of a resumed run must be the same."""
    described = teachers.describe(recipe.method, recipe.teachers)
    before = [teacher['sha256'] for teacher in progress.get('teachers', described)]
    if before != [teacher['sha256'] for teacher in described]:
        raise ConfigError(
            'method.teachers',
            recipe.config.method.teachers,
            f'the {len(before)} with which the run began, in their order: the weights are others',
        )
    progress['teachers'] = described


def _next_record(recipe: Recipe, step: int) -> int:
    """The step of the first training record after `step`."""
    log_every, steps_per_epoch = recipe.config.train.log_every, recipe.steps_per_epoch
    return min(
        (step // log_every + 1) * log_every,
        (step // steps_per_epoch + 1) * steps_per_epoch,
        recipe.total_steps,
    )


def _steps_to_call(recipe: Recipe, step: int) -> int:
    """How many steps the call after `step` makes: no record is passed over."""
    return min(recipe.config.train.steps_per_call, _next_record(recipe, step) - step)


def _train(
    recipe: Recipe,
    mesh: Mesh,
    train_step: device_memory.CompiledSteps,
    batches: resident.ResidentBatches | streaming.StreamedBatches,
    evaluator: evaluate.Evaluator,
    state: TrainState,
    progress: dict[str, Any],
    checkpoints: checkpoint.Checkpoints,
    directory: Path,
) -> TrainState:
    """Trains from `state` to the last step; `progress` is brought up to date on the way."""
    settings, steps_per_epoch = recipe.config.train, recipe.steps_per_epoch
    teacher_variables = parallel.replicate([t.variables for t in recipe.teachers], mesh)
    window = [
        {name: np.asarray(values) for name, values in entry.items()} for entry in progress['window']
    ]
    fetched = len(window)
    step, stopping = int(state.step), False
    stream = batches.iterate(step)
    started = time.monotonic() - progress['seconds']
    saved_at = step
    watch = guard.Guard(recipe.config, steps_per_epoch, progress.get('skipped_in_a_row', 0))

    def due(every_epochs: int) -> bool:
        epoch, rest = divmod(step, steps_per_epoch)
        return step == recipe.total_steps or (rest == 0 and epoch % every_epochs == 0)

    def fetch() -> None:
        """Reads what is not read yet of the window, and looks at it."""
        nonlocal window, fetched
        new = jax.device_get(window[fetched:])
        first = step - sum(len(entry['loss']) for entry in new)
        for entry in new:
            watch.check(first + 1, entry, saved_at or None)
            first += len(entry['loss'])
        window = [*window[:fetched], *new]
        fetched = len(window)

    def require_good_state() -> None:
        watch.check_variables(step, state.variables, saved_at or None)
        if processes.is_first():
            lock.require(directory)

    def save() -> None:
        fetch()
        require_good_state()
        progress['seconds'] = time.monotonic() - started
        progress['window'] = jax.tree.map(lambda x: x.tolist(), window)
        progress['skipped_in_a_row'] = watch.skipped_in_a_row
        checkpoints.save(step, state, progress, _selection_metrics(progress, step))

    with (
        StopRequest(processes.stop_signals()) as stop,
        _open_records(directory, step) as records,
        contextlib.closing(_progress_bar(recipe, step)) as bar,
    ):
        while step < recipe.total_steps and not stopping:
            record_at = _next_record(recipe, step)
            if recipe.method.needs_validation and step % steps_per_epoch == 0:
                state = evaluator.refresh(state)
            count = _steps_to_call(recipe, step)
            batch = _stack(list(itertools.islice(stream, count)))
            batch = parallel.shard_batch(batch, mesh, parallel.STEPS_AND_BATCH)
            state, scalars = train_step(state, batch, *teacher_variables)
            window.append(scalars)
            if len(window) - fetched > MAX_CALLS_IN_FLIGHT:
                jax.block_until_ready(window[-MAX_CALLS_IN_FLIGHT])
            step += count
            bar.update(step)
            epoch = step / steps_per_epoch
            if step == record_at:
                fetch()
                require_good_state()
                means, window, fetched = _mean(window), [], 0
                timing = {}
                if step % settings.log_every == 0 or step == recipe.total_steps:
                    timing['images_per_second'] = bar.log(step, epoch, means['loss'])
                records.write(step, epoch, 'train', means, timing)
            with bar.paused():
                if due(settings.eval_every_epochs):
                    for split in evaluator.splits(final=step == recipe.total_steps):
                        record = evaluator(state.evaluated_variables, split)
                        records.write(step, epoch, split, record)
                        progress['evaluations'][split] = {'step': step, **record}
                        bar.message(evaluate.one_line(epoch, split, record))
                if due(settings.checkpoint_every_epochs):
                    save()
                    saved_at = step
            stopping = processes.stop_agreed(step, bool(stop))
        if step != saved_at:
            save()
        checkpoints.wait()
    if step < recipe.total_steps:
        raise Interrupted(step, stop.signal_number or signal.SIGTERM)
    return state


def _progress_bar(recipe: Recipe, step: int) -> Progress:
    stream = None if processes.is_first() else open(os.devnull, 'w')  # noqa: SIM115
    return Progress(recipe.total_steps, recipe.config.data.batch_size, step, stream)


def _open_records(directory: Path, step: int) -> contextlib.AbstractContextManager:
    """Where the records go: process 0 writes them for all."""
    if processes.is_first():
        return metrics.RecordWriter(directory, resume_step=step)
    return metrics.NoRecords()


def _stack(batches: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Batches with an axis of steps in front; of one batch, a view."""
    if len(batches) == 1:
        return {name: array[None] for name, array in batches[0].items()}
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


def _mean(window: list[dict[str, Any]]) -> dict[str, Any]:
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


def _selection_metrics(progress: dict[str, Any], step: int) -> dict[str, float] | None:
    """What the best checkpoint is chosen by: the held-out images; never the test set."""
    record = progress['evaluations'].get('validation')
    if record is None or record['step'] != step:
        return None
    return {'deployed_top1': record['deployed_top1']}
