"""When calls of the train step end, and what they are fed with."""

import dataclasses

import jax
import numpy as np
import pytest
from training_fixtures import small_config

from one_jax import config as config_lib
from one_jax import data
from one_jax.data import resident
from one_jax.runtime import memory, parallel
from one_jax.training import feed
from one_jax.training.experiment import Experiment


@pytest.fixture(scope='module')
def source():
    return data.open(small_config().data)


def make_experiment(**fields):
    """Five steps per epoch, ten steps, a record after every third."""
    values = dict.fromkeys(field.name for field in dataclasses.fields(Experiment))
    config = config_lib.resolve(small_config(**fields))
    return Experiment(**{**values, 'config': config, 'steps_per_epoch': 5, 'total_steps': 10})


def test_experiment_epochs_and_records_end_at_multiples_and_at_the_end():
    experiment = dataclasses.replace(make_experiment(), total_steps=12)
    steps = range(1, 13)
    assert [step for step in steps if experiment.logs_at(step)] == [3, 5, 6, 9, 10, 12]
    assert [step for step in steps if experiment.ends_epoch(step)] == [5, 10, 12]
    assert [step for step in steps if experiment.ends_epoch(step, 2)] == [10, 12]
    assert experiment.total_epochs == 2.4


@pytest.mark.parametrize(
    ('num_steps', 'first_step', 'ends'),
    [
        (1, 7, [8, 9, 10]),
        (2, 0, [2, 3, 5, 6, 8, 9, 10]),
        (3, 0, [3, 5, 6, 9, 10]),
        (3, 4, [5, 6, 9, 10]),
        (3, 10, []),
    ],
)
@pytest.mark.parametrize('on_device', [False, True])
def test_feed_calls_end_at_records_and_hold_the_batches_in_order(
    source, num_steps, first_step, ends, on_device
):
    batches = source.train_batches(8, 0)
    mesh = parallel.make_mesh(jax.devices()[:1])
    examples = source.examples('train') if on_device else None
    calls = feed.Feed(make_experiment(), batches, mesh, num_steps, first_step, examples)
    completed, labels, images = first_step, [], []
    found = []
    for step, call in calls:
        count = int(call['count']) if num_steps > 1 else 1
        assert count == step - completed
        assert call['mask'].shape == (num_steps, 8)
        np.testing.assert_array_equal(call['mask'][:count], 1)
        if on_device:
            indices = np.asarray(call['index'][:count])
            labels.append(np.asarray(call['examples']['label'])[indices])
            images.append(np.asarray(call['examples']['image'])[indices])
        else:
            labels.append(call['label'][:count])
            images.append(call['image'][:count])
        completed = step
        found.append(step)
    assert found == ends
    if ends:
        order = [batches.indices(step) for step in range(first_step, 10)]
        train = source.examples('train')
        np.testing.assert_array_equal(np.concatenate(labels), train.labels[np.stack(order)])
        np.testing.assert_array_equal(np.concatenate(images), train.images[np.stack(order)])


@pytest.mark.parametrize(
    ('num_steps', 'first_step', 'ends'),
    # Of three steps an epoch, the third has 8 of the 40 images.
    [(1, 1, [2, 3, 4, 5, 6]), (2, 0, [2, 3, 5, 6]), (2, 1, [2, 3, 5, 6]), (2, 5, [6])],
)
@pytest.mark.parametrize('on_device', [False, True])
def test_feed_smaller_last_batch_is_a_call_of_its_own(
    source, num_steps, first_step, ends, on_device
):
    batches = source.train_batches(16, 0, drop_last=False)
    assert (batches.steps_per_epoch, batches.last_size) == (3, 8)
    experiment = dataclasses.replace(make_experiment(), steps_per_epoch=3, total_steps=6)
    mesh = parallel.make_mesh(jax.devices()[:1])
    train = source.examples('train')
    calls = feed.Feed(
        experiment, batches, mesh, num_steps, first_step, train if on_device else None
    )
    before, found = first_step, []
    for step, call in calls:
        is_last = step % 3 == 0
        assert call['mask'].shape == ((1, 8) if is_last else (num_steps, 16))
        assert ('count' in call) == (num_steps > 1 and not is_last)
        if 'count' in call:
            assert int(call['count']) == step - before
        seen = np.asarray(call['index' if on_device else 'label'])[: step - before]
        for number, values in enumerate(seen, start=before):
            order = resident.epoch_permutation(0, number // 3, 40)
            expected = order[16 * (number % 3) :][:16]
            expected = expected if on_device else train.labels[expected]
            np.testing.assert_array_equal(values, expected)
        np.testing.assert_array_equal(call['mask'][: step - before], 1)
        before = step
        found.append(step)
    assert found == ends


def test_batches_processes_share_a_smaller_last_batch(source, monkeypatch):
    whole = source.train_batches(16, 0, drop_last=False)
    expected = [whole.indices(step) for step in range(6)]
    assert sorted(np.concatenate(expected[:3])) == list(range(40))
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    parts = []
    for process in range(2):
        monkeypatch.setattr(jax, 'process_index', lambda process=process: process)
        batches = source.train_batches(16, 0, drop_last=False)
        parts.append([batches.batch(step) for step in range(6)])
        indices = [batches.indices(step) for step in range(6)]
        assert [len(x) for x in indices] == [8, 8, 4] * 2
        for step, part in enumerate(indices):
            np.testing.assert_array_equal(part, np.split(expected[step], 2)[process])
    assert parts[1][2]['mask'].tolist() == [1] * 4


def test_feed_by_default_keeps_images_on_the_host_of_a_cpu(source):
    assert feed.examples_on_device(small_config(), source) is None
    on_device = small_config(**{'data.placement': 'device'})
    assert feed.examples_on_device(on_device, source) is source.examples('train')


def test_feed_on_an_accelerator_puts_images_where_there_is_room(source, monkeypatch):
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    size = source.examples('train').images.nbytes
    for available, fits in ((None, True), (4 * size, True), (4 * size - 4, False)):
        monkeypatch.setattr(memory, 'device_bytes', lambda device, value=available: value)
        assert (feed.examples_on_device(small_config(), source) is not None) == fits
    on_host = small_config(**{'data.placement': 'host'})
    assert feed.examples_on_device(on_host, source) is None


def test_steps_per_call_are_at_most_those_between_records(monkeypatch):
    config, asked = small_config(), small_config(**{'train.steps_per_call': 100})
    assert feed.steps_per_call(config, True, 5) == 1
    assert feed.steps_per_call(asked, False, 5) == 3
    assert feed.steps_per_call(asked, False, 2) == 2
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    config.train.log_every = 50
    assert feed.steps_per_call(config, True, 50) == feed.STEPS_PER_CALL
    assert feed.steps_per_call(config, False, 50) == 1
