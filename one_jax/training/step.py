"""The train step: one compiled program for every method, data-parallel over the mesh."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from one_jax import losses, methods
from one_jax.runtime import parallel
from one_jax.training import teachers
from one_jax.training.experiment import Experiment
from one_jax.training.inputs import Inputs, training_inputs
from one_jax.training.state import MetricSums, TrainState

Metrics = dict[str, jax.Array]
# Images with their labels and targets, and the mask.
Part = tuple[Inputs, jax.Array]


def make_train_step(
    experiment: Experiment, mesh: Mesh | AbstractMesh
) -> Callable[..., tuple[TrainState, jax.Array]]:
    """Builds the compiled train step, data-parallel over `mesh`.

    Returns:
      A function of the state (whose buffers it takes over), n batches, and the variables of each
      frozen teacher. It makes n steps and returns the new state, and the number of completed steps
      as a separate array, which is ready when the device is done.

      The batches are a dictionary of 'mask' [n, B] and 'image' uint8 [n, B, H, W, 3] with 'label'
      [n, B]; or, in place of the two, of 'index' [n, B] into 'examples', the 'image' [N, H, W, 3]
      and 'label' [N] of a data set that every device holds. With 'count', a scalar from 1 to n,
      only that many steps are made.
    """

    def steps(state: TrainState, batches: dict[str, Any], *teacher_variables: Any):
        one_step = functools.partial(_step, experiment, mesh, parallel.varying(teacher_variables))
        examples, count = batches.pop('examples', None), batches.pop('count', None)

        def numbered_step(index: int | jax.Array, state: TrainState) -> TrainState:
            batch = jax.tree.map(lambda x: x[index], batches)
            if examples is not None:
                chosen = batch.pop('index')
                batch |= {name: values[chosen] for name, values in examples.items()}
            return one_step(state, batch)

        n = len(batches['mask'])
        # XLA's CPU compiler runs convolutions in a loop on one thread: a single step is no loop.
        if n == 1:
            state = numbered_step(0, state)
        else:
            # One program for every count, where each count would compile its own.
            state = lax.fori_loop(0, n if count is None else count, numbered_step, state)
        return state, state.step

    return parallel.data_parallel(steps, mesh, _batch_specs, donate_state=True)


def make_initial_state(
    experiment: Experiment, mesh: Mesh | AbstractMesh
) -> Callable[[jax.typing.ArrayLike], TrainState]:
    """Returns the compiled function from a uint32 seed to the replicated state before step 1."""

    def measure(state: TrainState, batch: dict[str, jax.Array], *teacher_variables: Any) -> Metrics:
        part = _inputs(experiment, mesh, state, batch), batch['mask']
        _, (_, metrics) = _forward(
            experiment,
            parallel.varying(teacher_variables),
            state,
            parallel.varying(state.batch_stats),
            part,
            parallel.varying(state.params),
        )
        metrics = lax.pmean(metrics, parallel.DATA_AXIS)
        metrics['learning_rate'] = jnp.asarray(experiment.schedule(state.step))
        metrics['gradient_norm'] = optax.tree.norm(state.params)
        return metrics

    state = jax.eval_shape(experiment.initial_state, jax.ShapeDtypeStruct((), jnp.uint32))
    _, batches, *variables = abstract_arguments(experiment, mesh, state)
    batch = {
        name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=NamedSharding(mesh, P()))
        for name, x in batches.items()
    }
    shapes = jax.eval_shape(parallel.data_parallel(measure, mesh), state, batch, *variables)

    def initial_state(seed: jax.typing.ArrayLike) -> TrainState:
        return experiment.initial_state(seed).replace(metrics=MetricSums.zeros(shapes))

    return jax.jit(initial_state, out_shardings=NamedSharding(mesh, parallel.REPLICATED))


def abstract_arguments(
    experiment: Experiment,
    mesh: Mesh | AbstractMesh,
    state: Any,
    num_steps: int = 1,
    num_examples: int = 0,
    batch_size: int = 0,
) -> tuple:
    """The arguments of the train step as `jax.ShapeDtypeStruct`s with shardings.

    Args:
      experiment: see `make_train_step`.
      mesh: of the run, or an abstract one.
      state: the train state, of any shapes with dtypes.
      num_steps: n, steps per call.
      num_examples: of the data set in device memory; 0 if batches bring their images.
      batch_size: B; 0 is `data.batch_size`.
    """

    def placed(tree: Any, spec: P) -> Any:
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    size = num_steps, batch_size or experiment.config.data.batch_size
    image_shape = experiment.spec.image_shape
    batch = {'mask': jax.ShapeDtypeStruct(size, jnp.float32)}
    if num_examples:
        batch['index'] = jax.ShapeDtypeStruct(size, jnp.int32)
    else:
        batch['label'] = jax.ShapeDtypeStruct(size, jnp.int32)
        batch['image'] = jax.ShapeDtypeStruct((*size, *image_shape), jnp.uint8)
    batch = placed(batch, parallel.STEPS_AND_BATCH)
    if num_examples:
        examples = {
            'image': jax.ShapeDtypeStruct((num_examples, *image_shape), jnp.uint8),
            'label': jax.ShapeDtypeStruct((num_examples,), jnp.int32),
        }
        batch['examples'] = placed(examples, parallel.REPLICATED)
    if num_steps > 1:
        batch['count'] = placed(jax.ShapeDtypeStruct((), jnp.int32), parallel.REPLICATED)
    variables = [teacher.variables for teacher in experiment.teachers]
    return placed(state, parallel.REPLICATED), batch, *placed(variables, parallel.REPLICATED)


def all_finite(tree: Any) -> jax.Array:
    """Whether every number in a tree of arrays is finite; a scalar."""
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


def _batch_specs(batches: dict[str, Any]) -> dict[str, P]:
    """What does not differ between steps is replicated."""
    constants = ('examples', 'count')
    return {
        name: parallel.REPLICATED if name in constants else parallel.STEPS_AND_BATCH
        for name in batches
    }


def _step(
    experiment: Experiment,
    mesh: Mesh | AbstractMesh,
    teacher_variables: Any,
    state: TrainState,
    batch: dict[str, jax.Array],
) -> TrainState:
    """Makes one step on this device's share of a batch, inside `shard_map`."""
    train = experiment.config.train
    inputs = _inputs(experiment, mesh, state, batch)
    run = functools.partial(_gradients, experiment, teacher_variables, state)
    batch_stats = parallel.varying(state.batch_stats)
    if train.accumulation_steps == 1:
        gradients, batch_stats, metrics = run(batch_stats, (inputs, batch['mask']))
    else:
        parts = _split((inputs, batch['mask']), train.accumulation_steps)
        gradients, batch_stats, metrics = _accumulate(run, batch_stats, parts, mesh)
    gradients, batch_stats, metrics = lax.pmean(
        (gradients, batch_stats, metrics), parallel.DATA_AXIS
    )
    with jax.named_scope('optimizer'):
        updates, opt_state = experiment.optimizer.update(gradients, state.opt_state, state.params)
        metrics['gradient_norm'] = optax.tree.norm(gradients)
        metrics['learning_rate'] = jnp.asarray(experiment.schedule(state.step))
        stepped = state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        stepped = stepped.with_updated_averages(train.ema_decay)
    finite, max_skipped = all_finite(metrics), train.skip_nonfinite_steps
    if max_skipped:
        finite &= all_finite((stepped.params, stepped.batch_stats))
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), stepped, state)
        stepped = kept.replace(step=stepped.step)
    sums = state.metrics.add(stepped.step, metrics, finite, max_skipped)
    return stepped.replace(metrics=sums)


def _inputs(
    experiment: Experiment, mesh: Mesh | AbstractMesh, state: TrainState, batch: dict[str, Any]
) -> Inputs:
    with jax.named_scope('input'):
        key = jax.random.fold_in(state.rng, state.step)
        return training_inputs(experiment, mesh, key, batch['image'], batch['label'])


def _forward(
    experiment: Experiment,
    teacher_variables: Any,
    state: TrainState,
    batch_stats: Any,
    part: Part,
    params: Any,
) -> tuple[jax.Array, tuple[Any, Metrics]]:
    """Loss, new running statistics and metrics of (a part of) this device's batch."""
    inputs, mask = part
    context = methods.Context(
        labels=inputs.targets,
        mask=mask,
        progress=(state.step // experiment.steps_per_epoch) / experiment.total_epochs,
        teacher_logits=teachers.logits(experiment.teachers, teacher_variables, inputs.images),
        method_state=state.method,
        params=params,
    )
    outputs, updated = experiment.network.apply(
        {'params': params, 'batch_stats': batch_stats},
        inputs.images,
        train=True,
        mutable=['batch_stats'],
    )
    loss, terms = experiment.method.loss(outputs, context)
    metrics = {'loss': loss, **terms, **_accuracies(outputs, inputs.labels, mask)}
    return loss, (updated['batch_stats'], metrics)


def _gradients(
    experiment: Experiment, teacher_variables: Any, state: TrainState, batch_stats: Any, part: Part
) -> tuple[Any, Any, Metrics]:
    """Gradients, new running statistics and metrics of (a part of) this device's batch."""
    forward = functools.partial(_forward, experiment, teacher_variables, state, batch_stats, part)
    (_, (batch_stats, metrics)), gradients = jax.value_and_grad(forward, has_aux=True)(
        parallel.varying(state.params)
    )
    return gradients, batch_stats, metrics


def _split(part: Part, count: int) -> Part:
    """Splits this device's batch into `count` equal parts, along a new first axis."""
    inputs, mask = part
    # Crops of every branch's own have the branch axis before the batch axis.
    batch_axis = inputs.images.ndim - 4

    def split(values: jax.Array, axis: int = 0) -> jax.Array:
        size = values.shape[axis] // count
        shape = (*values.shape[:axis], count, size, *values.shape[axis + 1 :])
        return jnp.moveaxis(values.reshape(shape), axis, 0)

    images = split(inputs.images, batch_axis)
    return Inputs(images, split(inputs.labels), split(inputs.targets)), split(mask)


def _accumulate(
    run: Callable[..., Any], batch_stats: Any, parts: Part, mesh: Mesh | AbstractMesh
) -> tuple[Any, Any, Any]:
    """Averages gradients and metrics over the parts; each part updates the running statistics."""

    def one_part(batch_stats: Any, part: Part):
        gradients, batch_stats, metrics = run(batch_stats, part)
        return batch_stats, (gradients, metrics)

    count = len(parts[1])
    first = jax.tree.map(lambda x: x[0], parts)
    batch_stats, total = one_part(batch_stats, first)

    def add_part(carry: Any, part: Part):
        batch_stats, total = carry
        batch_stats, new = one_part(batch_stats, part)
        return (batch_stats, jax.tree.map(jnp.add, total, new)), None

    # XLA's CPU compiler runs convolutions in a loop on one thread.
    unroll = count if parallel.platform(mesh) == 'cpu' else 1
    rest = jax.tree.map(lambda x: x[1:], parts)
    (batch_stats, total), _ = lax.scan(add_part, (batch_stats, total), rest, unroll=unroll)
    gradients, metrics = jax.tree.map(lambda x: x / count, total)
    return gradients, batch_stats, metrics


def _accuracies(outputs: Any, labels: jax.Array, mask: jax.Array) -> Metrics:
    """Top-1 accuracy on the training batch, in percent, of each branch and of the teacher."""

    def top1(logits: jax.Array) -> jax.Array:
        correct = logits.argmax(axis=-1) == jnp.broadcast_to(labels, logits.shape[:-1])
        return 100 * losses.batch_mean(correct.astype(jnp.float32), mask)

    accuracies = {'branch_top1': top1(outputs.logits)}
    if outputs.teacher_logits is not None:
        accuracies['teacher_top1'] = top1(outputs.teacher_logits)
    return accuracies
