"""Training: the step, and the loop that reads from top to bottom."""

import contextlib
import functools
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from one_jax import (
    checkpoint,
    evaluate,
    losses,
    methods,
    metrics,
    models,
    parallel,
    teachers,
    workdir,
)
from one_jax import config as config_lib
from one_jax.analysis import curves
from one_jax.data import datasets, resident, streaming
from one_jax.errors import ConfigError
from one_jax.inputs import training_inputs
from one_jax.interrupt import Interrupted, StopRequest
from one_jax.models import cost
from one_jax.progress import Progress
from one_jax.recipe import Recipe, make_recipe
from one_jax.state import TrainState, init_state

# Compiled calls that may be under way before the host waits: enough to keep the device busy, few
# enough that a signal is soon obeyed.
MAX_CALLS_IN_FLIGHT = 4


def make_train_step(
    recipe: Recipe, mesh: Mesh
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The compiled train step of any method, data-parallel over `mesh`.

    Returns:
      A function of the state (whose buffers it takes over), n batches ('image' uint8
      [n, B, H, W, 3], 'label' [n, B], 'mask' [n, B]) and the variables of each frozen teacher. It
      does n steps and returns the new state and the metrics of each, with n in front.
    """

    def step(teacher_variables: tuple[Any, ...], state: TrainState, batch: dict[str, jax.Array]):
        key = jax.random.fold_in(state.rng, state.step)
        inputs = training_inputs(recipe, mesh, key, batch['image'], batch['label'])
        mask = batch['mask']
        context = methods.Context(
            labels=inputs.targets,
            mask=mask,
            progress=(state.step // recipe.steps_per_epoch) / recipe.total_epochs,
            teacher_logits=teachers.logits(recipe.teachers, teacher_variables, inputs.images),
            method_state=state.method,
        )

        def loss_function(params):
            outputs, updated = recipe.network.apply(
                {'params': params, 'batch_stats': parallel.varying(state.batch_stats)},
                inputs.images,
                train=True,
                mutable=['batch_stats'],
            )
            loss, terms = recipe.method.loss(outputs, context.replace(params=params))
            return loss, (outputs, terms, updated['batch_stats'])

        (loss, (outputs, terms, batch_stats)), gradients = jax.value_and_grad(
            loss_function, has_aux=True
        )(parallel.varying(state.params))
        scalars = {'loss': loss, **terms, **_accuracies(outputs, inputs.labels, mask)}
        gradients, batch_stats, scalars = lax.pmean(
            (gradients, batch_stats, scalars), parallel.DATA_AXIS
        )
        updates, opt_state = recipe.optimizer.update(gradients, state.opt_state, state.params)
        scalars['gradient_norm'] = optax.tree.norm(gradients)
        scalars['learning_rate'] = jnp.asarray(recipe.schedule(state.step))
        state = state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        return state.with_averages(recipe.config.train.ema_decay), scalars

    def steps(state: TrainState, batches: dict[str, jax.Array], *teacher_variables: Any):
        one_step = functools.partial(step, parallel.varying(teacher_variables))
        # A scan over convolutions loses XLA's threads on CPU and is far slower: one step is none.
        if batches['label'].shape[0] > 1:
            return lax.scan(one_step, state, batches)
        state, scalars = one_step(state, jax.tree.map(lambda x: x[0], batches))
        return state, jax.tree.map(lambda x: x[None], scalars)

    return parallel.data_parallel(steps, mesh, parallel.STEPS_AND_BATCH, donate_state=True)


def _accuracies(outputs: Any, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Top-1 accuracy in percent on the training batch, of each branch and of the teacher."""

    def top1(logits):
        correct = logits.argmax(axis=-1) == jnp.broadcast_to(labels, logits.shape[:-1])
        return 100 * losses.batch_mean(correct.astype(jnp.float32), mask)

    accuracies = {'branch_top1': top1(outputs.logits)}
    if outputs.teacher_logits is not None:
        accuracies['teacher_top1'] = top1(outputs.teacher_logits)
    return accuracies


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
    config_lib.validate(config, mesh.size)
    parallel.use_compilation_cache(config.train.compilation_cache_dir)
    config = config_lib.resolve(config)
    workdir.check(directory, config)
    if (directory / workdir.RESULT).exists():
        return workdir.read_json(directory / workdir.RESULT)

    dataset = datasets.load(config.data)
    batches = dataset.train_batches(config.data.batch_size, config.seed)
    recipe = make_recipe(config, dataset.spec, batches.steps_per_epoch)
    evaluator = evaluate.Evaluator(config, recipe.method, recipe.network, dataset, mesh)
    workdir.write_json(directory / workdir.CONFIG, config.to_dict())
    with checkpoint.Checkpoints(
        directory / workdir.CHECKPOINTS, keep_latest=config.train.keep_checkpoints
    ) as checkpoints:
        state, progress = _start_or_resume(recipe, mesh, checkpoints)
        progress['data'] = _describe(dataset)
        _check_teachers(recipe, progress)
        state = _train(recipe, mesh, batches, evaluator, state, progress, checkpoints, directory)
    result = _result(recipe, progress, directory.name, mesh)
    curves.plot_run(metrics.read_records(directory), directory / workdir.CURVES)
    workdir.write_json(directory / workdir.RESULT, result)
    return result


def _start_or_resume(
    recipe: Recipe, mesh: Mesh, checkpoints: checkpoint.Checkpoints
) -> tuple[TrainState, dict[str, Any]]:
    """The state of the newest good checkpoint or a fresh one, and what is kept beside it.

    The second value is kept beside the state: `seconds` so far, the `window` of metrics not yet in
    a record, and the last of the `evaluations` of each split.
    """
    initialise = functools.partial(
        init_state,
        recipe.network,
        recipe.optimizer,
        recipe.spec.image_shape,
        recipe.config.seed,
        with_averages=recipe.config.train.ema_decay > 0,
        method_state=recipe.method.initial_state(),
    )
    replicated = NamedSharding(mesh, P())
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
        jax.eval_shape(initialise),
    )
    restored = checkpoints.restore_latest(template)
    if restored is None:
        state = jax.jit(initialise, out_shardings=replicated)()
        return state, {'seconds': 0.0, 'window': [], 'evaluations': {}}
    print(f'resumes after step {restored.step} of {recipe.total_steps}')
    return restored.state, restored.progress


def _check_teachers(recipe: Recipe, progress: dict[str, Any]) -> None:
    """Notes the frozen teachers in `progress`; those of a resumed run must be the same."""
    described = teachers.describe(recipe.method, recipe.teachers)
    for before, now in zip(progress.get('teachers', described), described, strict=True):
        if before['sha256'] != now['sha256']:
            raise ConfigError(
                'method.teachers',
                recipe.config.method.teachers,
                'the teachers with which the run began: the weights of one are others now',
            )
    progress['teachers'] = described


def _describe(dataset: datasets.Dataset | datasets.StreamedDataset) -> dict[str, Any]:
    """What a student needs to know of the data it was trained on."""
    fields = ('num_classes', 'image_shape', 'mean', 'std')
    description = {field: getattr(dataset.spec, field) for field in fields}
    return {**description, 'label_names': list(dataset.label_names)}


def _train(
    recipe: Recipe,
    mesh: Mesh,
    batches: resident.ResidentBatches | streaming.StreamedBatches,
    evaluator: evaluate.Evaluator,
    state: TrainState,
    progress: dict[str, Any],
    checkpoints: checkpoint.Checkpoints,
    directory: Path,
) -> TrainState:
    """Trains from `state` to the last step; `progress` is brought up to date on the way."""
    settings, steps_per_epoch = recipe.config.train, recipe.steps_per_epoch
    train_step = make_train_step(recipe, mesh)
    teacher_variables = parallel.replicate([t.variables for t in recipe.teachers], mesh)
    window = [
        {name: np.asarray(values) for name, values in entry.items()} for entry in progress['window']
    ]
    step = int(state.step)
    stream = batches.iterate(step)
    started = time.monotonic() - progress['seconds']

    def due(every_epochs: int) -> bool:
        epoch, rest = divmod(step, steps_per_epoch)
        return step == recipe.total_steps or (rest == 0 and epoch % every_epochs == 0)

    def save() -> None:
        progress['seconds'] = time.monotonic() - started
        progress['window'] = jax.tree.map(lambda x: x.tolist(), jax.device_get(window))
        checkpoints.save(step, state, progress, _selection_metrics(progress, step))

    with (
        StopRequest() as stop,
        metrics.RecordWriter(directory, resume_step=step) as records,
        contextlib.closing(Progress(recipe.total_steps, batches.batch_size, step)) as bar,
    ):
        saved_at = step
        while step < recipe.total_steps and not stop:
            record_at = min(
                (step // settings.log_every + 1) * settings.log_every,
                (step // steps_per_epoch + 1) * steps_per_epoch,
                recipe.total_steps,
            )
            if recipe.method.needs_validation and step % steps_per_epoch == 0:
                state = evaluator.refresh(state)
            count = min(settings.steps_per_call, record_at - step)
            batch = _stack(list(itertools.islice(stream, count)))
            batch = parallel.shard_batch(batch, mesh, parallel.STEPS_AND_BATCH)
            state, scalars = train_step(state, batch, *teacher_variables)
            window.append(scalars)
            if len(window) > MAX_CALLS_IN_FLIGHT:
                jax.block_until_ready(window[-MAX_CALLS_IN_FLIGHT])
            step += count
            bar.update(step)
            epoch = step / steps_per_epoch
            if step == record_at:
                means, window = _mean(window), []
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
        if step != saved_at:
            save()
        checkpoints.wait()
    if step < recipe.total_steps:
        raise Interrupted(step, stop.signal_number)
    return state


def _stack(batches: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Batches with an axis of steps in front; of one batch, a view."""
    if len(batches) == 1:
        return {name: array[None] for name, array in batches[0].items()}
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


def _mean(window: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean over the steps of a window, in float64; reads the device once."""
    fetched = jax.device_get(window)
    return {
        name: np.concatenate([np.asarray(entry[name], np.float64) for entry in fetched])
        .mean(axis=0)
        .tolist()
        for name in fetched[0]
    }


def _selection_metrics(progress: dict[str, Any], step: int) -> dict[str, float] | None:
    """What the best checkpoint is chosen by: the held-out images; never the test set."""
    record = progress['evaluations'].get('validation')
    if record is None or record['step'] != step:
        return None
    return {'deployed_top1': record['deployed_top1']}


def _result(recipe: Recipe, progress: dict[str, Any], name: str, mesh: Mesh) -> dict[str, Any]:
    """The content of `result.json`: the test split after the last step, never a chosen epoch."""
    config, spec = recipe.config, recipe.spec
    method = recipe.method
    parameters, flops = cost.forward_cost(recipe.network, spec.image_shape)
    costs = {
        name: cost.forward_cost(models.make_backbone(name, spec.num_classes)(), spec.image_shape)
        for name in set(method.members)
    }
    if method.deployed == 'ensemble':
        ensemble = recipe.network.clone(make_aggregator=None)
        deployed_parameters, deployed_flops = cost.forward_cost(ensemble, spec.image_shape)
    else:
        deployed = method.members[int(method.deployed.removeprefix('branch '))]
        deployed_parameters, deployed_flops = costs[deployed]
    unlike = {}
    if len(costs) > 1:
        unlike['branch_network'] = list(method.members)
        unlike['branch_parameters'] = [costs[name][0] for name in method.members]
        unlike['branch_flops'] = [costs[name][1] for name in method.members]
    return {
        'name': name,
        'method': config.method.name,
        'network': config.model.name,
        'dataset': config.data.name,
        'seed': config.seed,
        'epochs': recipe.total_epochs,
        'split': 'test',
        **progress['evaluations']['test'],
        **{f'validation_{k}': v for k, v in progress['evaluations'].get('validation', {}).items()},
        'deployed': method.deployed,
        **unlike,
        'teachers': progress['teachers'],
        'parameters': parameters,
        'deployed_parameters': deployed_parameters,
        'flops': flops,
        'deployed_flops': deployed_flops,
        'seconds': round(progress['seconds'], 1),
        'versions': workdir.versions(),
        'device': workdir.device_name(),
        'num_devices': mesh.size,
    }
