"""A loss that is not finite: the run stops, or skips a few steps.

The cross-entropy of branch 1 is NaN on one device in the steps after those in `BAD`.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_fixtures import Setting, small_config

from one_jax import data, losses, methods, train
from one_jax.runtime import records
from one_jax.training import guard
from one_jax.training.checkpoint import Checkpoints

# Eight steps per epoch, a checkpoint at the end of each. The last two are neighbours on both sides
# of a checkpoint.
STEPS, BAD = 24, (9, 15, 16)
FIELDS = {
    'method.name': 'independent',
    'data.generated_examples': 64,
    'train.steps': STEPS,
    'train.ema_decay': 0.9,
}


def make_config(skip):
    return small_config(**FIELDS, **{'train.skip_nonfinite_steps': skip})


@pytest.fixture(scope='module', autouse=True)
def brittle():
    """Replaces the loss of a method by one that becomes NaN."""
    batches = data.open(small_config(**FIELDS).data).train_batches(8, 0)
    labels = np.stack([next(iter(batches.iterate(step)))['label'] for step in range(STEPS)])
    # Pairs of labels that one of four devices sees in the bad steps and in no others.
    pairs = (100 * labels[:, ::2] + labels[:, 1::2]).tolist()
    bad_pairs = [
        next(pair for pair in pairs[step] if sum(row.count(pair) for row in pairs) == 1)
        for step in BAD
    ]

    def loss(self, outputs, context):
        branch = losses.batch_mean(
            losses.cross_entropy(outputs.logits, context.labels), context.mask
        )
        pair = 100 * context.labels[0] + context.labels[1]
        spoiled = jnp.isin(pair, jnp.asarray(bad_pairs))
        branch = jnp.where(jnp.array([False, True]) & spoiled, jnp.nan, branch)
        return branch.sum(), {'branch_cross_entropy': branch}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods.registered()['independent'], 'loss', loss)
        yield


@pytest.fixture(scope='module')
def setting(brittle):
    return Setting(4, **FIELDS, **{'train.skip_nonfinite_steps': 2})


def checkpoint_steps(directory):
    with Checkpoints(directory / 'checkpoints', read_only=True) as checkpoints:
        state = checkpoints.read().state
        state['metrics'].pop('sums')
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
        return checkpoints.steps()


def test_guard_nonfinite_step_ends_the_run_with_step_term_and_branch(tmp_path):
    """The records and the checkpoints before it are finite."""
    with pytest.raises(guard.NonFiniteError) as error:
        train.train_and_evaluate(make_config(skip=0), tmp_path)
    assert str(error.value).startswith(
        'step 10 (epoch 1.25) is not finite: branch_cross_entropy of branch 1 is nan; loss is nan; '
        'the checkpoint of step 8 is kept'
    )
    found = records.read_records(tmp_path)
    assert [record['step'] for record in found] == [3, 6, 8, 8, 9]
    assert all(value is not None for record in found for value in record.values())
    assert checkpoint_steps(tmp_path) == [8]
    assert not (tmp_path / 'result.json').exists()


def test_guard_skips_in_a_row_count_across_a_resume(tmp_path, capsys):
    """Step 16 is skipped and saved; step 17 is the second in a row."""
    for _ in range(2):
        with pytest.raises(guard.NonFiniteError, match=r'^step 17 .*branch 1 is nan.* 1 steps bef'):
            train.train_and_evaluate(make_config(skip=1), tmp_path)
    assert 'resumes after step 16' in capsys.readouterr().out
    assert checkpoint_steps(tmp_path) == [8, 16]


def test_step_skipped_changes_nothing_but_the_count(setting):
    """Parameters, statistics, momentum and averages stay bit for bit; other steps train."""
    fresh = jax.device_get(setting.initial_state(np.uint32(0)))
    state = setting.call(setting.initial_state(np.uint32(0)), setting.host_batch(BAD[0] - 1))
    before = jax.device_get(state)
    assert optax.tree.norm(optax.tree.sub(before.params, fresh.params)) > 1e-3
    state = setting.call(state, setting.host_batch(BAD[0]))
    after = jax.device_get(state)
    assert (after.step, after.metrics.steps, after.metrics.skipped) == (2, 1, 1)
    chex.assert_trees_all_equal(after.metrics.sums, before.metrics.sums)
    chex.assert_trees_all_equal(after.replace(step=before.step, metrics=before.metrics), before)


def test_records_leave_skipped_steps_out_of_their_means(tmp_path, setting):
    result = train.train_and_evaluate(make_config(skip=2), tmp_path)
    assert result['step'] == STEPS
    found = {
        record['step']: record
        for record in records.read_records(tmp_path)
        if record['split'] == 'train'
    }
    skipped = {step: record['skipped_steps'] for step, record in found.items()}
    assert {step: count for step, count in skipped.items() if count} == {12: 1, 16: 1, 18: 1}
    # The one step since the record of step 15 was skipped.
    assert found[16]['loss'] is None
    _, metrics = setting.run(range(12))
    assert np.isnan(metrics[9]['loss'])
    expected = (metrics[10]['loss'] + metrics[11]['loss']) / 2
    assert found[12]['loss'] == pytest.approx(expected, rel=1e-6)
