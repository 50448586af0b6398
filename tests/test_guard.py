"""A loss that is not finite: the run stops and says where, or passes over a few steps.

The method `brittle` is made for this: the cross-entropy of branch 1 is NaN on one device for the
batches of the steps in `BAD`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jax_core

from one_jax import checkpoint, guard, losses, methods, metrics, parallel, train
from one_jax import config as config_lib
from one_jax.data import datasets
from one_jax.methods import base
from one_jax.state import init_state

# Eight steps an epoch, a checkpoint at the end of each. The last two are neighbours on both sides
# of a checkpoint.
STEPS, BAD = 24, (9, 15, 16)


class Brittle(base.Method):
    """Branches that learn from the labels, and one term that becomes NaN."""

    name = 'brittle'
    default_branches = 2
    # Pairs of labels that one device gets in the bad steps and in no others.
    bad_pairs = ()

    def loss(self, outputs, context):
        branch = losses.batch_mean(
            losses.cross_entropy(outputs.logits, context.labels), context.mask
        )
        pair = 100 * context.labels[0] + context.labels[1]
        spoiled = jnp.isin(pair, jnp.asarray(self.bad_pairs))
        branch = jnp.where(jnp.array([False, True]) & spoiled, jnp.nan, branch)
        return branch.sum(), {'branch_cross_entropy': branch}


def make_config(skip=0, **fields):
    config = config_lib.default_config()
    config.update_from_flattened_dict(
        {
            'method.name': 'brittle',
            'model.name': 'resnet8',
            'data.name': 'image_folder',
            'data.image_size': 8,
            'data.generated_examples': 64,
            'data.batch_size': 8,
            'data.eval_batch_size': 16,
            'optimizer.schedule': 'constant',
            'train.steps': STEPS,
            'train.log_every': 3,
            'train.ema_decay': 0.9,
            'train.skip_nonfinite_steps': skip,
            'train.compilation_cache_dir': '',
            **fields,
        }
    )
    return config


@pytest.fixture(scope='module', autouse=True)
def brittle():
    """Registers the method, and finds what marks its bad steps."""
    methods.registered()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, '_REGISTRY', {**base._REGISTRY, 'brittle': Brittle})
        batches = datasets.load(make_config().data).train_batches(8, 0)
        labels = np.stack([batches.batch(step)['label'] for step in range(STEPS)])
        pairs = (100 * labels[:, ::2] + labels[:, 1::2]).tolist()
        unique = [
            next(pair for pair in pairs[step] if sum(row.count(pair) for row in pairs) == 1)
            for step in BAD
        ]
        patch.setattr(Brittle, 'bad_pairs', tuple(unique))
        yield


def finite(directory):
    """The records so far, all numbers of which are finite, and the steps of the checkpoints."""
    records = metrics.read_records(directory)
    assert all(value is not None for record in records for value in record.values())
    with checkpoint.Checkpoints(directory / 'checkpoints', read_only=True) as checkpoints:
        state = checkpoints.read().state
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
        return records, checkpoints.steps()


def test_the_run_stops_and_names_step_term_and_member(tmp_path):
    config = make_config()
    with pytest.raises(guard.NonFiniteError) as error:
        train.train_and_evaluate(config, tmp_path)
    message = str(error.value)
    assert message.startswith(
        'step 10 (epoch 1.25) is not finite: branch_cross_entropy of branch 1 is nan; loss is nan'
    )
    assert 'the checkpoint of step 8 is kept' in message
    assert 'optimizer.learning_rate=0.1' in message
    assert '--config.train.skip_nonfinite_steps=' in message
    assert '\n' not in message
    records, steps = finite(tmp_path)
    assert [record['step'] for record in records] == [3, 6, 8, 8, 9]
    assert steps == [8]
    assert not (tmp_path / 'result.json').exists()


def test_more_in_a_row_than_allowed_stop_the_run_also_after_a_resume(tmp_path, capsys):
    """One may be skipped: step 10 is; 16 is, and saved; 17 is the second in a row."""
    for _ in range(2):
        with pytest.raises(
            guard.NonFiniteError, match=r'^step 17 .* branch 1 is nan.* 1 steps befo'
        ):
            train.train_and_evaluate(make_config(skip=1), tmp_path)
    assert 'resumes after step 16' in capsys.readouterr().out
    with checkpoint.Checkpoints(tmp_path / 'checkpoints', read_only=True) as checkpoints:
        assert checkpoints.steps() == [8, 16]
        state, progress, _ = checkpoints.read()
    assert progress['skipped_in_a_row'] == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.fixture(scope='module')
def stepper():
    """A fresh state, the train step with skipping, and the batches on the devices."""
    config = make_config(skip=2)
    mesh = parallel.make_mesh()
    spec = config_lib.validate(config, mesh.size)
    dataset = datasets.load(config.data)
    batches = dataset.train_batches(8, 0)
    recipe = train.make_recipe(config_lib.resolve(config), dataset.spec, 8)
    assert recipe.spec.image_shape == spec.image_shape == (8, 8, 3)
    initialise = jax.jit(
        lambda: init_state(recipe.network, recipe.optimizer, (8, 8, 3), 0, with_averages=True)
    )
    step = train.make_train_step(recipe, mesh)

    def run(state, number):
        batch = jax.tree.map(lambda x: x[None], batches.batch(number))
        batch = parallel.shard_batch(batch, mesh, parallel.STEPS_AND_BATCH)
        return step(state, batch)

    return parallel.replicate(initialise(), mesh), run


def test_a_skipped_step_changes_nothing_but_the_count(stepper):
    """Bit for bit: parameters, statistics, optimiser, averages; the step before it does change."""
    fresh, run = stepper
    state, scalars = run(jax.tree.map(jnp.copy, fresh), BAD[0] - 1)
    assert scalars['skipped_steps'].tolist() == [0]
    before = jax.device_get(state)
    assert not np.array_equal(
        before.params['trunk']['conv1']['kernel'],
        jax.device_get(fresh.params['trunk']['conv1']['kernel']),
    )
    state, scalars = run(state, BAD[0])
    after = jax.device_get(state)
    assert scalars['skipped_steps'].tolist() == [1]
    assert np.isnan(scalars['branch_cross_entropy'][0]).tolist() == [False, True]
    assert after.step == before.step + 1
    same = jax.tree.map(
        lambda x, y: x.tobytes() == y.tobytes(), before, after.replace(step=before.step)
    )
    assert all(jax.tree.leaves(same))


def test_skipped_steps_are_counted_and_left_out_of_the_means(tmp_path, stepper):
    result = train.train_and_evaluate(make_config(skip=2), tmp_path)
    assert result['step'] == STEPS
    records = {
        record['step']: record
        for record in metrics.read_records(tmp_path)
        if record['split'] == 'train'
    }
    skipped = {step: record['skipped_steps'] for step, record in records.items()}
    assert {step: count for step, count in skipped.items() if count} == {12: 1, 16: 1, 18: 1}
    # Nothing was done between the records of steps 15 and 16.
    assert records[16]['loss'] is None

    state, run = stepper
    state = jax.tree.map(jnp.copy, state)
    seen = []
    for number in range(12):
        state, scalars = run(state, number)
        seen.append(float(scalars['loss'][0]))
    assert np.isnan(seen[9])
    assert records[12]['loss'] == pytest.approx((seen[10] + seen[11]) / 2, rel=1e-6)


def primitives(jaxpr):
    """The names of all operations of a program, those of the programs inside it too."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jax_core.jaxprs_in_params(equation.params):
            yield from primitives(inner)


def test_without_the_option_the_step_has_no_extra_work():
    counts = {}
    for skip in (0, 1):
        config = make_config(skip=skip, **{'train.ema_decay': 0.0})
        mesh = parallel.make_mesh()
        dataset = datasets.load(config.data)
        recipe = train.make_recipe(config_lib.resolve(config), dataset.spec, 8)
        state = jax.eval_shape(
            lambda recipe=recipe: init_state(recipe.network, recipe.optimizer, (8, 8, 3), 0)
        )
        batch = jax.tree.map(lambda x: x[None], dataset.train_batches(8, 0).batch(0))
        traced = train.make_train_step(recipe, mesh).trace(state, batch)
        names = list(primitives(traced.jaxpr.jaxpr))
        counts[skip] = names.count('is_finite'), names.count('select_n')
    # The cross-entropy has one of its own.
    assert counts[0][0] < 3
    assert counts[1][0] - counts[0][0] > len(jax.tree.leaves(state.params))
    assert counts[1][1] - counts[0][1] == len(jax.tree.leaves(state))


def scalars_of(*finite_steps, **arrays):
    values = {'loss': np.where(finite_steps, 1.0, np.nan)}
    return {**values, 'skipped_steps': 1 - np.array(finite_steps, int), **arrays}


def test_steps_in_a_row_are_counted_over_calls_and_from_a_resume():
    config = make_config(skip=2)
    watch = guard.Guard(config, 8)
    watch.check(1, scalars_of(1, 0, 0), None)
    watch.check(4, scalars_of(1, 0), None)
    assert watch.skipped_in_a_row == 1
    resumed = guard.Guard(config, 8, watch.skipped_in_a_row)
    with pytest.raises(
        guard.NonFiniteError, match=r'^step 7 .* loss is nan.*there is no checkpoint'
    ):
        resumed.check(6, scalars_of(0, 0), None)


def test_steps_that_made_bad_parameters_of_a_finite_loss_count_too():
    """The compiled step skips them without a trace in the loss: not for ever."""
    watch = guard.Guard(make_config(skip=1), 8)
    scalars = {'loss': np.ones(2), 'skipped_steps': np.ones(2, int)}
    with pytest.raises(guard.NonFiniteError, match=r'^step 2 .* parameters or statistics that it'):
        watch.check(1, scalars, None)


@pytest.mark.parametrize('place', ['params', 'batch_stats'])
def test_variables_that_are_not_finite_are_neither_evaluated_nor_saved(place):
    watch = guard.Guard(make_config(), 8)
    variables = {'params': {'kernel': jnp.ones(3)}, 'batch_stats': {'var': jnp.ones(3)}}
    watch.check_variables(8, variables, 4)
    variables[place] = jax.tree.map(lambda x: x.at[1].set(jnp.inf), variables[place])
    with pytest.raises(guard.NonFiniteError, match=r'^step 8 .*; the checkpoint of step 4 is kept'):
        watch.check_variables(8, variables, 4)


@pytest.mark.parametrize('value', [-1, float('nan')])
def test_a_bad_number_of_skipped_steps_is_refused(value):
    config = make_config()
    with config.ignore_type():
        config.train.skip_nonfinite_steps = value
    with pytest.raises(ValueError, match=r'train\.skip_nonfinite_steps=.*at least 0'):
        config_lib.validate(config)
