"""The train step: one compiled program for every method, data-parallel over the mesh."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from one_jax import guard, losses, methods, parallel, teachers
from one_jax.inputs import Inputs, training_inputs
from one_jax.recipe import Recipe
from one_jax.state import TrainState

# Images with their labels and targets, and the mask.
Part = tuple[Inputs, jax.Array]


def make_train_step(
    recipe: Recipe, mesh: Mesh
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The compiled train step of any method, data-parallel over `mesh`.

    With a `parallel.seeds_mesh`, each array of the state has an axis of seeds S in front, batches
    and metrics have it behind n, and each seed is trained as if it were alone.

    Returns:
      A function of the state (whose buffers it takes over), n batches and the variables of each
      frozen teacher. It does n steps and returns the new state and the metrics of each, with n in
      front. The batches are a dictionary of 'mask' [n, B] and 'image' uint8 [n, B, H, W, 3] with
      'label' [n, B]; or, in place of these two, of 'index' [n, B] into 'examples', the 'image'
      [N, H, W, 3] and 'label' [N] of a data set that is whole on every device. With 'count', a
      scalar of 1 to n, only so many steps are done, and the other metrics are 0.
    """

    accumulation_steps = recipe.config.train.accumulation_steps
    has_seeds = parallel.has_seeds(mesh)

    def forward_backward(teacher_variables, state: TrainState, batch_stats: Any, part: Part):
        """Gradients, new running statistics and scalars of (a part of) this device's batch."""
        inputs, mask = part
        context = methods.Context(
            labels=inputs.targets,
            mask=mask,
            progress=(state.step // recipe.steps_per_epoch) / recipe.total_epochs,
            teacher_logits=teachers.logits(recipe.teachers, teacher_variables, inputs.images),
            method_state=state.method,
        )

        def loss_function(params):
            outputs, updated = recipe.network.apply(
                {'params': params, 'batch_stats': batch_stats},
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
        return gradients, batch_stats, scalars

    def step(teacher_variables: tuple[Any, ...], state: TrainState, batch: dict[str, jax.Array]):
        key = jax.random.fold_in(state.rng, state.step)
        inputs = training_inputs(recipe, mesh, key, batch['image'], batch['label'])
        run = functools.partial(forward_backward, teacher_variables, state)
        batch_stats = parallel.varying(state.batch_stats)
        if accumulation_steps == 1:
            gradients, batch_stats, scalars = run(batch_stats, (inputs, batch['mask']))
        else:
            parts = _split((inputs, batch['mask']), accumulation_steps)
            gradients, batch_stats, scalars = _accumulate(run, batch_stats, parts)
        gradients, batch_stats, scalars = lax.pmean(
            (gradients, batch_stats, scalars), parallel.DATA_AXIS
        )
        updates, opt_state = recipe.optimizer.update(gradients, state.opt_state, state.params)
        scalars['gradient_norm'] = optax.tree.norm(gradients)
        scalars['learning_rate'] = jnp.asarray(recipe.schedule(state.step))
        stepped = state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        stepped = stepped.with_averages(recipe.config.train.ema_decay)
        if recipe.config.train.skip_nonfinite_steps:
            finite = guard.all_finite((scalars, stepped.params, stepped.batch_stats))
            chosen = jax.tree.map(lambda new, old: jnp.where(finite, new, old), stepped, state)
            stepped = chosen.replace(step=stepped.step)
            scalars[guard.SKIPPED] = 1 - finite.astype(jnp.int32)
        return stepped, scalars

    def steps(state: TrainState, batches: dict[str, Any], *teacher_variables: Any):
        one_step = functools.partial(step, parallel.varying(teacher_variables))
        examples, count = batches.pop('examples', None), batches.pop('count', None)

        def step_of_all_seeds(state: TrainState, batch: dict[str, jax.Array]):
            if examples is not None:
                index = batch.pop('index')
                batch |= {name: values[index] for name, values in examples.items()}
            return jax.vmap(one_step)(state, batch) if has_seeds else one_step(state, batch)

        n = len(batches['mask'])
        # A loop over convolutions loses XLA's threads on CPU and is far slower: one step is none.
        if n == 1:
            state, scalars = step_of_all_seeds(state, jax.tree.map(lambda x: x[0], batches))
            return state, jax.tree.map(lambda x: x[None], scalars)
        count = n if count is None else count
        return _repeat(step_of_all_seeds, count, state, batches, has_seeds)

    return parallel.data_parallel(
        steps,
        mesh,
        functools.partial(_batch_specs, has_seeds),
        parallel.SEEDS if has_seeds else parallel.REPLICATED,
        (parallel.SEEDS, parallel.STEPS_AND_SEEDS) if has_seeds else parallel.REPLICATED,
        donate_state=True,
    )


def _batch_specs(has_seeds: bool, batches: dict[str, Any]) -> dict[str, P]:
    """How the batches are cut over the devices; what is not said of each step is whole."""
    cut = parallel.STEPS_SEEDS_AND_BATCH if has_seeds else parallel.STEPS_AND_BATCH
    whole = ('examples', 'count')
    return {name: parallel.REPLICATED if name in whole else cut for name in batches}


def _repeat(
    step: Callable[..., Any],
    count: int | jax.Array,
    state: TrainState,
    batches: dict[str, Any],
    has_seeds: bool,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """`count` steps in a loop; a program for all counts, for each would have to be compiled."""
    first = jax.tree.map(lambda x: x[0], batches)
    _, shapes = jax.eval_shape(step, state, first)

    def buffer(scalar: jax.ShapeDtypeStruct) -> jax.Array:
        zeros = jnp.zeros((len(batches['mask']), *scalar.shape), scalar.dtype)
        # In a loop what goes in and what comes out vary over the same axes.
        return lax.pcast(zeros, parallel.SEED_AXIS, to='varying') if has_seeds else zeros

    def body(index: jax.Array, carry: Any) -> Any:
        state, buffers = carry
        state, scalars = step(state, jax.tree.map(lambda x: x[index], batches))
        write = functools.partial(lax.dynamic_update_index_in_dim, index=index, axis=0)
        return state, jax.tree.map(lambda all_, new: write(all_, new), buffers, scalars)

    return lax.fori_loop(0, count, body, (state, jax.tree.map(buffer, shapes)))


def _split(part: Part, count: int) -> Part:
    """Cuts this device's batch into `count` equal parts, along a new first axis."""
    inputs, mask = part
    # Members that see images of their own have their axis before the batch's.
    members = inputs.images.ndim - 4

    def cut(values: jax.Array, axis: int = 0) -> jax.Array:
        size = values.shape[axis] // count
        shape = (*values.shape[:axis], count, size, *values.shape[axis + 1 :])
        return jnp.moveaxis(values.reshape(shape), axis, 0)

    images = cut(inputs.images, members)
    return Inputs(images, cut(inputs.labels), cut(inputs.targets)), cut(mask)


def _accumulate(run: Callable[..., Any], batch_stats: Any, parts: Part) -> tuple[Any, Any, Any]:
    """The mean of gradients and scalars over the parts; the running statistics see each of them."""

    def one_part(batch_stats: Any, part: Part):
        gradients, batch_stats, scalars = run(batch_stats, part)
        return batch_stats, (gradients, scalars)

    count = len(parts[1])
    first = jax.tree.map(lambda x: x[0], parts)
    batch_stats, total = one_part(batch_stats, first)

    def add_part(carry: Any, part: Part):
        batch_stats, total = carry
        batch_stats, new = one_part(batch_stats, part)
        return (batch_stats, jax.tree.map(jnp.add, total, new)), None

    # On CPU a loop over convolutions is far slower than its body written out.
    unroll = count if jax.default_backend() == 'cpu' else 1
    rest = jax.tree.map(lambda x: x[1:], parts)
    (batch_stats, total), _ = lax.scan(add_part, (batch_stats, total), rest, unroll=unroll)
    gradients, scalars = jax.tree.map(lambda x: x / count, total)
    return gradients, batch_stats, scalars


def _accuracies(outputs: Any, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Top-1 accuracy in percent on the training batch, of each branch and of the teacher."""

    def top1(logits):
        correct = logits.argmax(axis=-1) == jnp.broadcast_to(labels, logits.shape[:-1])
        return 100 * losses.batch_mean(correct.astype(jnp.float32), mask)

    accuracies = {'branch_top1': top1(outputs.logits)}
    if outputs.teacher_logits is not None:
        accuracies['teacher_top1'] = top1(outputs.teacher_logits)
    return accuracies
