"""Several seeds at once: each is the run alone, in a workdir of its own, and goes on as one."""

import json
import shutil

import jax
import numpy as np
import pytest

from one_jax import checkpoint, guard, parallel, report, seeds, train
from one_jax import config as config_lib
from one_jax.errors import ConfigError, UserError

STEPS_PER_EPOCH = 3


def make_config(**fields):
    """ONE in float64 with synchronised statistics, so that devices make no difference."""
    config = config_lib.default_config()
    config.update_from_flattened_dict(
        {
            'sync_batch_norm': True,
            'model.name': 'resnet8',
            'model.num_branches': 2,
            'model.dtype': 'float64',
            'data.name': 'image_folder',
            'data.image_size': 8,
            'data.generated_examples': 24,
            'data.batch_size': 8,
            'data.eval_batch_size': 16,
            'train.steps': 2 * STEPS_PER_EPOCH,
            'train.log_every': 2,
            'train.ema_decay': 0.9,
            'train.compilation_cache_dir': '',
            **fields,
        }
    )
    return config


@pytest.fixture(scope='module', autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def final(directory):
    """The arrays of the newest checkpoint, and the records as text."""
    with checkpoint.Checkpoints(directory / 'checkpoints', read_only=True) as checkpoints:
        state = checkpoints.read().state
    return state, (directory / 'metrics.jsonl').read_text()


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Three seeds, whose devices stay together."""
    directory = tmp_path_factory.mktemp('seeds')
    return directory, train.train_seeds(make_config(seeds=(0, 3, 1)), directory)


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    """Seed 3 by itself."""
    directory = tmp_path_factory.mktemp('alone')
    return directory, train.train_and_evaluate(make_config(seed=3), directory)


def assert_same_run(directory, other):
    (state, records), (expected, expected_records) = final(directory), final(other)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-10), state, expected)
    pairs = zip(records.splitlines(), expected_records.splitlines(), strict=True)
    for line, expected_line in pairs:
        record, expected_record = json.loads(line), json.loads(expected_line)
        assert record.keys() == expected_record.keys()
        for name, value in expected_record.items():
            if name == 'split':
                assert record[name] == value
            else:
                np.testing.assert_allclose(record[name], value, rtol=1e-8, atol=1e-10)


def test_a_seed_is_the_run_alone(trained, alone):
    directory, results = trained
    assert [result['seed'] for result in results] == [0, 3, 1]
    assert [result['seeds_at_once'] for result in results] == [3] * 3
    assert alone[1]['seeds_at_once'] == 1
    assert_same_run(directory / 'seed-3', alone[0])
    config, expected = (
        json.loads((path / 'config.json').read_text()) for path in (directory / 'seed-3', alone[0])
    )
    assert config == expected


def test_seeds_are_unlike(trained):
    directory, _ = trained
    losses = {
        json.loads((directory / f'seed-{seed}/metrics.jsonl').read_text().splitlines()[0])['loss']
        for seed in (0, 1, 3)
    }
    assert len(losses) == 3


def test_pairs_of_devices_for_two_seeds(tmp_path, alone):
    mesh = parallel.seeds_mesh(parallel.make_mesh(), 2)
    assert dict(mesh.shape) == {'seed': 2, 'data': 2}
    assert dict(parallel.seeds_mesh(parallel.make_mesh(), 3).shape) == {'seed': 1, 'data': 4}
    # A batch of two devices, not of four.
    results = train.train_seeds(make_config(seeds=(3, 5)), tmp_path)
    assert [result['num_devices'] for result in results] == [2, 2]
    assert_same_run(tmp_path / 'seed-3', alone[0])


def test_killed_between_two_saves_they_go_on_together(tmp_path, trained, capsys):
    """Bit for bit, though one seed has a checkpoint that the others have not."""
    shutil.copytree(trained[0], tmp_path / 'again')
    for seed in (0, 3, 1):
        (tmp_path / f'again/seed-{seed}/result.json').unlink()
    for seed in (3, 1):
        shutil.rmtree(tmp_path / f'again/seed-{seed}/checkpoints/{2 * STEPS_PER_EPOCH}')
    train.train_seeds(make_config(seeds=(0, 3, 1)), tmp_path / 'again')
    assert f'seed 3: resumes after step {STEPS_PER_EPOCH} of' in capsys.readouterr().out
    for seed in (0, 3, 1):
        resumed, expected = (
            final(path / f'seed-{seed}') for path in (tmp_path / 'again', trained[0])
        )
        assert resumed[1] == expected[1]
        jax.tree.map(np.testing.assert_array_equal, resumed[0], expected[0])


def test_what_is_finished_is_left_alone(tmp_path, trained):
    """Asked for again, in another order: nothing is written; nor is it taken for another config."""
    directory, results = trained
    shutil.copytree(directory, tmp_path / 'more')
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / 'more').rglob('*.json*')}
    again = train.train_seeds(make_config(seeds=(3, 0, 1)), tmp_path / 'more')
    assert [result['deployed_nll'] for result in again] == [
        results[index]['deployed_nll'] for index in (1, 0, 2)
    ]
    other = make_config(seeds=(3, 0), **{'optimizer.momentum': 0.8})
    with pytest.raises(UserError, match=r'momentum: 0.9 in the workdir, 0.8 now'):
        train.train_seeds(other, tmp_path / 'more')
    assert before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / 'more').rglob('*.json*')
    }


def test_a_seed_more_is_trained_beside_finished_ones(tmp_path, trained, alone):
    shutil.copytree(trained[0], tmp_path / 'more')
    shutil.rmtree(tmp_path / 'more/seed-3')
    results = train.train_seeds(make_config(seeds=(0, 3)), tmp_path / 'more')
    assert [result['seeds_at_once'] for result in results] == [3, 1]
    assert_same_run(tmp_path / 'more/seed-3', alone[0])


def test_seeds_far_apart_are_refused(tmp_path, trained):
    shutil.copytree(trained[0], tmp_path / 'apart')
    for seed in (0, 3, 1):
        (tmp_path / f'apart/seed-{seed}/result.json').unlink()
    shutil.rmtree(tmp_path / 'apart/seed-3')
    with pytest.raises(UserError, match=r'seed 0 is at step 6, seed 3 at 0; train those behind'):
        train.train_seeds(make_config(seeds=(0, 3, 1)), tmp_path / 'apart')
    assert not (tmp_path / 'apart/seed-3/config.json').exists()


def test_the_report_knows_them_as_seeds_of_one_recipe(trained):
    runs = report.read_runs([trained[0] / seeds.folder(seed) for seed in (0, 1, 3)])
    table = report.runs_table(runs)
    assert 'mean over seeds' in table
    assert 'n=3' in table


def test_a_loss_that_is_not_finite_names_its_seed():
    watch = guard.Guard(config_lib.resolve(make_config()), 8, label='seed 3: ')
    with pytest.raises(guard.NonFiniteError, match=r'^seed 3: step 2 .* loss is nan'):
        watch.check(1, {'loss': np.array([1.0, np.nan])}, None)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'seeds': (0, 0)}, r'seeds=\(0, 0\) is not allowed: numbers that differ'),
        ({'seeds': (0, -1)}, r'seeds=\(0, -1\) is not allowed: whole numbers'),
        ({'seeds': (0, 2**32)}, 'is not allowed: whole numbers'),
        (
            {'seeds': (0, 1), 'train.keep_checkpoints': 1},
            'train.keep_checkpoints=1 is not allowed: at least 2 with seeds',
        ),
    ],
)
def test_seeds_that_are_not_allowed(fields, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        train.train_seeds(make_config(**fields), tmp_path / 'new')
    assert not (tmp_path / 'new').exists()


def test_seeds_and_one_run_do_not_share_a_workdir(tmp_path, alone, trained):
    with pytest.raises(UserError, match='holds a run of one seed'):
        train.train_seeds(make_config(seeds=(0, 1)), alone[0])
    with pytest.raises(UserError, match=r'is not empty and holds no config.json'):
        train.train_and_evaluate(make_config(), trained[0])
    with pytest.raises(ConfigError, match='train_seeds takes several'):
        train.train_and_evaluate(make_config(seeds=(0, 1)), tmp_path)
