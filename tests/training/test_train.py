"""Whole runs: what they leave behind, and that stopping and placement change nothing."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from training_fixtures import (
    assert_same_run,
    cut_back,
    saved_state,
    small_config,
    snapshot,
    stopping_after,
)

from one_jax import train
from one_jax.errors import UserError
from one_jax.runtime import records
from one_jax.runtime.interrupt import Interrupted
from one_jax.training import saved
from one_jax.training.checkpoint import Checkpoints
from one_jax.training.evaluation import evaluate_workdir
from one_jax.training.run import Run

# With all that a run may have: 30 of 40 images train, three steps per epoch.
FIELDS = {
    'data.validation_fraction': 0.25,
    'train.ema_decay': 0.9,
    'train.log_every': 2,
    'train.steps': 9,
    'profile_steps': 2,
}


@pytest.fixture(scope='module')
def compiled():
    """The number of programs that had been compiled at each checkpoint of `finished`."""
    return []


@pytest.fixture(scope='module')
def finished(tmp_path_factory, compiled):
    """An uninterrupted run and its result."""
    directory, durations = tmp_path_factory.mktemp('runs') / 'one', []

    def note(event, duration, **_):
        if event == '/jax/core/compile/backend_compile_duration':
            durations.append(duration)

    save = Run.save

    def save_and_count(run, *arguments):
        save(run, *arguments)
        compiled.append(len(durations))

    jax.monitoring.register_event_duration_secs_listener(note)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, 'save', save_and_count)
        result = train.train_and_evaluate(small_config(**FIELDS), directory)
    jax.monitoring.clear_event_listeners()
    return directory, result


def test_run_records_training_validation_and_at_the_end_the_test_split(finished):
    directory, result = finished
    found = records.read_records(directory)
    steps = {
        split: [record['step'] for record in found if record['split'] == split]
        for split in ('train', 'validation', 'test')
    }
    assert steps == {'train': [2, 3, 4, 6, 8, 9], 'validation': [3, 6, 9], 'test': [9]}
    # ONE's ramp: over 80 / 300 of three epochs, which the first is part of.
    weights = {r['step']: r['distill_weight'] for r in found if r['split'] == 'train'}
    assert weights[3] == pytest.approx(np.exp(-5))
    assert weights[4] == 1.0
    assert result['split'] == 'test'
    assert found[-1]['deployed_top1'] == result['deployed_top1'] == result['branch_top1'][0]
    assert found[-2]['deployed_top1'] == result['validation_deployed_top1']
    assert result == json.loads((directory / 'result.json').read_text())
    assert (result['step'], result['epochs'], result['num_devices']) == (9, 3, 4)
    assert len(result['branch_top1']) == len(result['branch_top5']) == 2
    assert 0 <= result['teacher_top1'] <= result['teacher_top5'] <= 100
    assert result['parameters'] > result['deployed_parameters']
    assert result['versions']['jax']


def test_run_leaves_its_files(finished):
    directory, _ = finished
    config = json.loads((directory / 'config.json').read_text())
    assert config['method']['temperature'] == 3.0
    assert config['model']['num_branches'] == 2
    assert (directory / 'curves.png').read_bytes().startswith(b'\x89PNG')
    assert list(directory.glob('events.out.tfevents.*'))
    assert list(directory.glob('profile/plugins/profile/*/*.xplane.pb'))
    run = saved.load(directory)
    assert run.step == 9
    state, _ = saved_state(directory)
    average, own = 'averages.params.head.fc.bias', 'params.head.fc.bias'
    np.testing.assert_array_equal(run.variables['params']['head']['fc']['bias'], state[average])
    assert not np.array_equal(state[average], state[own])


def test_run_compiles_nothing_after_the_first_epoch(finished, compiled):
    first, *later = compiled
    assert len(later) == 2
    assert later[-1] == later[0]
    assert later[0] == first


def test_run_repeated_returns_the_result_and_writes_nothing(finished):
    directory, result = finished
    before = snapshot(directory)
    assert train.train_and_evaluate(small_config(**FIELDS), directory) == result
    assert snapshot(directory) == before


def test_run_stopped_inside_a_record_resumes_to_the_same_records(finished, tmp_path, capsys):
    """Stopped after step 5, between the records of steps 4 and 6, whose sums are saved."""
    config = small_config(**FIELDS)
    with stopping_after(5), pytest.raises(Interrupted, match='SIGTERM at step 5'):
        train.train_and_evaluate(config, tmp_path / 'run')
    state, step = saved_state(tmp_path / 'run')
    assert (step, state['metrics.steps']) == (5, 1)
    result = train.train_and_evaluate(config, tmp_path / 'run')
    assert 'resumes after step 5 of 9' in capsys.readouterr().out
    assert_same_run(tmp_path / 'run', finished[0])
    assert result['deployed_nll'] == finished[1]['deployed_nll']


def test_run_resumed_past_a_damaged_checkpoint_from_device_memory_makes_the_same_steps(
    finished, tmp_path
):
    """Bit for bit, though the run before had its images on the host."""
    workdir = shutil.copytree(finished[0], tmp_path / 'run')
    (workdir / 'result.json').unlink()
    largest = max((workdir / 'checkpoints/9').rglob('*'), key=lambda path: path.stat().st_size)
    with largest.open('r+b') as file:
        file.truncate(largest.stat().st_size // 2)
    train.train_and_evaluate(small_config(**FIELDS, **{'data.placement': 'device'}), workdir)
    assert (workdir / 'damaged_checkpoints/9').is_dir()
    assert_same_run(workdir, finished[0])


def test_run_with_a_checkpoint_of_an_earlier_version_is_an_error(finished, tmp_path):
    """Before the state had its metric sums."""
    workdir = cut_back(finished[0], 6, tmp_path / 'run')
    with Checkpoints(workdir / 'checkpoints') as checkpoints:
        state, progress, _ = checkpoints.read()
        del state['metrics']
        checkpoints.save(7, state, progress)
    before = snapshot(workdir / 'checkpoints')
    with pytest.raises(
        UserError, match=r'checkpoint 7 in .* version of one_jax: metrics/\S+ is abs'
    ):
        train.train_and_evaluate(small_config(**FIELDS), workdir)
    assert snapshot(workdir / 'checkpoints') == before


def test_run_of_another_config_is_an_error_and_changes_nothing(finished):
    before = snapshot(finished[0])
    with pytest.raises(UserError, match='seed: 0 in the workdir, 1 now'):
        train.train_and_evaluate(small_config(seed=1, **FIELDS), finished[0])
    assert snapshot(finished[0]) == before


# Runs on a folder of images. All errors come before anything is compiled.


def write_images(root, count):
    """Writes a folder of two classes: `count` images of each to train, two to test."""
    for split, number in (('train', count), ('test', 2)):
        for label in 'ab':
            for index in range(number):
                array = np.random.default_rng([index, ord(label), number]).integers(
                    256, size=(8, 8, 3)
                )
                path = root / split / label / f'{index}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array.astype(np.uint8)).save(path)
    return root


def on_folder(root, **fields):
    generated = {'data.generated_examples': 0, 'data.image_size': 0, 'method.name': 'independent'}
    return small_config(**{**generated, 'data.root': str(root), 'train.steps': 2, **fields})


@pytest.fixture(scope='module')
def on_images(tmp_path_factory):
    """A finished run of two steps, the same stopped after one, and the folder of both."""
    folder = tmp_path_factory.mktemp('images')
    config = on_folder(write_images(folder / 'data', 8))
    result = train.train_and_evaluate(config, folder / 'finished')
    with stopping_after(1), pytest.raises(Interrupted):
        train.train_and_evaluate(config, folder / 'stopped')
    return folder, result


@pytest.mark.parametrize('run', ['finished', 'stopped'])
def test_run_on_other_data_is_an_error_and_changes_nothing(on_images, tmp_path, run):
    workdir = on_images[0] / run
    before = snapshot(workdir)
    grown = on_folder(write_images(tmp_path / 'grown', 9))
    with pytest.raises(UserError, match=r'train: 16 images \(.* 18 images \(\S+ \w+\) now$'):
        train.train_and_evaluate(grown, workdir)
    renamed = shutil.copytree(on_images[0] / 'data', tmp_path / 'renamed')
    for split in ('train', 'test'):
        (renamed / split / 'b').rename(renamed / split / 'c')
    message = r"label_names: only in the workdir \['b'\], only now \['c'\]$"
    with pytest.raises(UserError, match=message):
        train.train_and_evaluate(on_folder(renamed), workdir)
    # A checkpoint has the same knowledge, whatever became of the file beside it.
    if run == 'stopped':
        copy = shutil.copytree(workdir, tmp_path / 'copy')
        (copy / 'data.json').unlink()
        with pytest.raises(UserError, match='a checkpoint of another config, data or teacher'):
            train.train_and_evaluate(grown, copy)
    assert snapshot(workdir) == before


def test_run_on_moved_data_resumes_and_returns_the_same_result(on_images, tmp_path):
    folder, result = on_images
    moved = on_folder(shutil.copytree(folder / 'data', tmp_path / 'moved'))
    workdir = shutil.copytree(folder / 'stopped', tmp_path / 'run')
    assert train.train_and_evaluate(moved, folder / 'finished') == result
    train.train_and_evaluate(moved, workdir)
    assert_same_run(workdir, folder / 'finished')


def test_evaluation_of_a_run_whose_folder_has_grown_normalises_as_in_training(on_images, tmp_path):
    folder, _ = on_images
    expected = evaluate_workdir(folder / 'finished')
    grown = shutil.copytree(folder / 'data', tmp_path / 'grown')
    Image.new('RGB', (8, 8), 'white').save(grown / 'train' / 'a' / 'white.png')
    workdir = shutil.copytree(folder / 'finished', tmp_path / 'run')
    config = json.loads((workdir / 'config.json').read_text())
    config['data']['root'] = str(grown)
    (workdir / 'config.json').write_text(json.dumps(config))
    assert evaluate_workdir(workdir) == expected


def test_run_finished_returns_its_result_with_a_note_if_its_data_is_gone(on_images, capsys):
    folder, result = on_images
    gone = on_folder(folder / 'gone')
    assert train.train_and_evaluate(gone, folder / 'finished') == result
    assert f'not compared with the data of this command: there is no {str(folder / "gone")!r}' in (
        capsys.readouterr().out
    )
    with pytest.raises(UserError, match=r'data\.root=.*gone'):
        train.train_and_evaluate(gone, folder / 'stopped')


def test_run_of_an_earlier_version_returns_its_result_with_a_note(on_images, tmp_path, capsys):
    folder, result = on_images
    workdir = shutil.copytree(folder / 'finished', tmp_path / 'run')
    (workdir / 'data.json').unlink()
    assert train.train_and_evaluate(on_folder(folder / 'data'), workdir) == result
    assert 'has no data.json' in capsys.readouterr().out


def test_run_with_a_checkpoint_of_another_run_or_step_is_an_error(on_images, finished, tmp_path):
    folder, _ = on_images
    config = on_folder(folder / 'data')
    workdir = shutil.copytree(folder / 'stopped', tmp_path / 'run')
    checkpoints = workdir / 'checkpoints'
    shutil.copytree(checkpoints / '1', checkpoints / '2')
    with pytest.raises(UserError, match='is a copy of checkpoint 1'):
        train.train_and_evaluate(config, workdir)
    shutil.rmtree(checkpoints / '2')
    shutil.copytree(finished[0] / 'checkpoints/9', checkpoints / '9')
    for start in (lambda: train.train_and_evaluate(config, workdir), lambda: saved.load(workdir)):
        with pytest.raises(UserError, match=r'a checkpoint of another config.* train\.steps: 9 in'):
            start()


@pytest.mark.parametrize('content', [None, b'', b'\x00\x00{"st'])
def test_run_without_its_records_finishes(on_images, tmp_path, capsys, content):
    folder, result = on_images
    workdir = shutil.copytree(folder / 'finished', tmp_path / 'run')
    for name in ('result.json', 'curves.png', 'metrics.jsonl'):
        (workdir / name).unlink()
    if content is not None:
        (workdir / 'metrics.jsonl').write_bytes(content)
    again = train.train_and_evaluate(on_folder(folder / 'data'), workdir)
    assert again == {**result, 'name': 'run'}
    assert 'holds no records: curves.png is not drawn' in capsys.readouterr().out
