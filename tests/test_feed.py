"""Where batches come from, and when scalars are read: neither changes what is computed."""

import jax
import numpy as np
import pytest

from one_jax import checkpoint, feed, parallel, train
from one_jax import config as config_lib
from one_jax.data import datasets
from one_jax.readback import MAX_CALLS_IN_FLIGHT, Readback


def make_config(**fields):
    config = config_lib.default_config()
    config.update_from_flattened_dict(
        {
            'method.name': 'plain',
            'model.name': 'resnet8',
            'data.name': 'image_folder',
            'data.image_size': 8,
            'data.generated_examples': 40,
            'data.batch_size': 8,
            'data.eval_batch_size': 16,
            'optimizer.schedule': 'constant',
            'train.steps': 10,
            'train.log_every': 3,
            'train.compilation_cache_dir': '',
            **fields,
        }
    )
    return config


def final(directory):
    with checkpoint.Checkpoints(directory / 'checkpoints', read_only=True) as checkpoints:
        return checkpoints.read().state, (directory / 'metrics.jsonl').read_text()


@pytest.fixture(scope='module')
def from_host(tmp_path_factory):
    directory = tmp_path_factory.mktemp('host')
    train.train_and_evaluate(make_config(), directory)
    return directory


def test_images_out_of_device_memory_are_the_same(tmp_path, from_host):
    """Bit for bit, and a run may go on from the other place."""
    train.train_and_evaluate(make_config(**{'data.placement': 'device'}), tmp_path / 'device')
    expected, records = final(from_host)
    state, found = final(tmp_path / 'device')
    assert found == records
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    config = make_config(**{'data.placement': 'device', 'train.steps_per_call': 2})
    assert train.train_and_evaluate(config, from_host)['step'] == 10


def test_several_steps_a_call_are_the_same_steps(tmp_path):
    """Records and epochs do not end at multiples of a call; in float64, so that only steps count.

    Ten steps, five an epoch, records after three: calls of 2, 1, 2, 1 and so on, of one program.
    """
    with jax.enable_x64(True):
        fields = {'model.dtype': 'float64'}
        train.train_and_evaluate(make_config(**fields), tmp_path / 'one')
        fields |= {'train.steps_per_call': 2, 'data.placement': 'device'}
        train.train_and_evaluate(make_config(**fields), tmp_path / 'several')
    (state, records), (expected, expected_records) = (
        final(tmp_path / name) for name in ('several', 'one')
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-10), state, expected)
    assert len(records.splitlines()) == len(expected_records.splitlines())


def test_nothing_is_compiled_after_the_first_epoch(tmp_path):
    """A run of four epochs compiles as often as one of two: evaluation and records included."""
    compiled = []

    def count(event, duration, **_):
        if event == '/jax/core/compile/backend_compile_duration':
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(count)
    counts = []
    for epochs in (2, 4):
        before = len(compiled)
        fields = {'train.steps': 0, 'train.epochs': epochs, 'data.placement': 'device'}
        train.train_and_evaluate(
            make_config(**fields, **{'train.steps_per_call': 2}), tmp_path / f'{epochs}'
        )
        counts.append(len(compiled) - before)
    jax.monitoring.clear_event_listeners()
    assert counts[0] == counts[1] > 0


def test_where_images_wait():
    """On CPU in the host's memory, unless asked for; a call is then one step."""
    config = make_config()
    dataset = datasets.load(config.data)
    assert not feed.on_device(config, dataset)
    assert feed.on_device(make_config(**{'data.placement': 'device'}), dataset)
    assert feed.steps_per_call(config, False, 5) == 1
    asked = make_config(**{'train.steps_per_call': 100})
    assert feed.steps_per_call(asked, False, 5) == 3
    assert feed.steps_per_call(asked, False, 2) == 2


def test_a_call_of_fewer_steps_is_padded():
    config = make_config()
    dataset = datasets.load(config.data)
    mesh = parallel.make_mesh(jax.devices()[:1])
    batches = dataset.train_batches(8, 0)
    for examples in (None, dataset.splits['train']):
        given = feed.Feed([batches], mesh, 3, 4, examples)(4, 2)
        assert int(given['count']) == 2
        if examples is None:
            found = given['image'][:2], given['label'][:2]
            assert given['image'].shape == (3, 8, 8, 8, 3)
        else:
            place = given['index'][:2]
            found = given['examples']['image'][place], given['examples']['label'][place]
        expected = [batches.batch(step) for step in (4, 5)]
        np.testing.assert_array_equal(found[0], np.stack([b['image'] for b in expected]))
        np.testing.assert_array_equal(found[1], np.stack([b['label'] for b in expected]))
        np.testing.assert_array_equal(given['mask'][:2], 1)


def test_scalars_come_in_order_and_records_behind_them():
    """A record is written at the latest when the next one is due."""
    events = []
    readback = Readback(
        lambda step, scalars: events.append((step, scalars['loss'].tolist())),
        lambda step: events.append(f'record {step}'),
    )
    for step in range(0, 4, 2):
        readback.add(step, 2, {'loss': jax.numpy.arange(3.0) + step})
    readback.mark_record(4)
    assert events == []
    readback.add(4, 1, {'loss': jax.numpy.arange(3.0)})
    readback.mark_record(5)
    assert events == [(0, [0.0, 1.0]), (2, [2.0, 3.0]), 'record 4']
    readback.read()
    assert events[3:] == [(4, [0.0]), 'record 5']
    for step in range(3 * MAX_CALLS_IN_FLIGHT):
        readback.add(step, 1, {'loss': jax.numpy.ones(1)})
    jax.block_until_ready(jax.numpy.ones(1))
    readback.read_ready()
    readback.read()
    assert [event[0] for event in events[5:]] == list(range(3 * MAX_CALLS_IN_FLIGHT))


def test_a_trace_is_left_in_the_workdir(tmp_path, capsys):
    """Of a run of one method; the steps of the trace are the first after the warm-up."""
    train.train_and_evaluate(make_config(**{'profile_steps': 2}), tmp_path)
    assert 'trace of the steps until 5 in' in capsys.readouterr().out
    assert list(tmp_path.glob('profile/plugins/profile/*/*.xplane.pb'))
