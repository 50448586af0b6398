"""Who may write to a workdir, and what is read from an older one."""

import errno
import json
import os
import types

import pytest
from training_fixtures import small_config, snapshot

from one_jax import config as config_lib
from one_jax.errors import UserError
from one_jax.runtime import files
from one_jax.training import workdir
from one_jax.training.run import Run


@pytest.fixture
def config():
    return config_lib.resolve(small_config())


def write_config(folder, config):
    folder.mkdir(exist_ok=True)
    (folder / workdir.CONFIG).write_text(json.dumps(config.to_dict()))
    return folder


def test_workdir_new_or_empty_passes_and_nothing_is_written(tmp_path, config):
    workdir.check(tmp_path / 'a/new/one', config)
    workdir.check(tmp_path, config)
    assert list(tmp_path.iterdir()) == []


def test_workdir_of_the_same_config_passes_on_another_machine(tmp_path, config):
    write_config(tmp_path, config)
    elsewhere = small_config(**{'data.data_dir': '/elsewhere', 'train.steps_per_call': 2})
    workdir.check(tmp_path, config_lib.resolve(elsewhere))


def test_workdir_of_another_config_is_an_error_with_the_fields(tmp_path, config):
    write_config(tmp_path, config)
    other = config_lib.resolve(small_config(seed=1, **{'method.temperature': 4.0}))
    with pytest.raises(UserError, match='a run of another config; give another --workdir') as error:
        workdir.check(tmp_path, other)
    assert 'seed: 0 in the workdir, 1 now' in str(error.value)
    assert 'method.temperature: 3.0 in the workdir, 4.0 now' in str(error.value)


def test_workdir_with_other_files_is_an_error(tmp_path, config):
    (tmp_path / 'thesis.tex').write_text('precious')
    with pytest.raises(UserError, match=r'is not empty and holds no config\.json'):
        workdir.check(tmp_path, config)


def test_workdir_of_a_run_killed_before_its_config_was_written_passes(tmp_path, config):
    (tmp_path / workdir.LOCK).write_text('process 1 on another\n')
    (tmp_path / '.config.json.x7_ab').write_text('{"seed"')
    workdir.check(tmp_path, config)


@pytest.mark.parametrize('below', ['', 'below'])
def test_workdir_that_is_a_file_or_below_one_is_an_error(tmp_path, config, below):
    file = tmp_path / 'file'
    file.write_text('precious')
    with pytest.raises(UserError, match=r"workdir='.*file.*' cannot be written \(Not a directory"):
        workdir.check(file / below if below else file, config)
    assert file.read_text() == 'precious'


def test_workdir_without_a_run_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r'holds no run: there is no config\.json'):
        workdir.read_config(tmp_path)


def test_workdir_that_is_a_student_is_named_as_such(tmp_path, config):
    (tmp_path / workdir.CONFIG).write_text(json.dumps({'network': 'resnet8', 'label_names': ['a']}))
    for read in (workdir.read_config, lambda path: workdir.check(path, config)):
        with pytest.raises(UserError, match='is an exported student, not a run'):
            read(tmp_path)


def test_workdir_of_an_earlier_version_resolves(tmp_path, config):
    """Renamed fields, a field that is gone, and fields that did not exist."""
    old = config.to_dict()
    for name in ('mixup_alpha', 'cutmix_alpha'):
        del old['data'][name]
    old['model'] |= {'keep_activations': 'all', 'members': old['model'].pop('branch_networks')}
    del old['model']['remat']
    old['seeds'] = []
    (tmp_path / workdir.CONFIG).write_text(json.dumps(old))
    assert workdir.read_config(tmp_path) == config
    workdir.check(tmp_path, config)
    old['model'] |= {'keep_activations': 'blocks', 'members': 'resnet8,resnet14'}
    old['model'] |= {'num_branches': 2, 'share_stages': 0}
    old['method'] = {'name': 'independent'}
    (tmp_path / workdir.CONFIG).write_text(json.dumps(old))
    model = workdir.read_config(tmp_path).model
    assert (model.remat, model.branch_networks) == ('blocks', 'resnet8,resnet14')


def test_failed_write_is_reported_and_other_errors_are_not():
    message = 'workdir={} cannot be written ({reason})'
    with (
        pytest.raises(
            UserError, match=r'^workdir=\{\} cannot be written \(No space left on device'
        ),
        files.reporting_failed_writes(message),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileNotFoundError), files.reporting_failed_writes(message):
        raise FileNotFoundError(errno.ENOENT, 'a bug')
    clear = UserError('could not save checkpoint 8 (No space left on device)')
    with pytest.raises(UserError) as raised, files.reporting_failed_writes(message):
        raise clear
    assert raised.value is clear


def test_lock_held_by_one_is_an_error_for_a_second(tmp_path):
    folder = tmp_path / 'new/run'
    held_by_us = f'in use by process {os.getpid()} on .*: wait for it, or give another --workdir'
    for _ in range(2):  # Leaving the block releases it.
        with workdir.hold(folder):
            workdir.require(folder)
            with pytest.raises(UserError, match=held_by_us), workdir.hold(folder):
                raise AssertionError('held twice')
    assert list(snapshot(folder)) == [workdir.LOCK]


def test_lock_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / workdir.LOCK).mkdir()
    with pytest.raises(UserError, match='cannot be written'), workdir.hold(tmp_path):
        raise AssertionError('held')


def test_lock_that_is_replaced_or_gone_is_noticed(tmp_path):
    folder = tmp_path / 'run'
    with workdir.hold(folder):
        (folder / workdir.LOCK).write_text('process 1 on another\n')
        with pytest.raises(UserError, match='removed, moved or replaced'):
            workdir.require(folder)
        folder.rename(tmp_path / 'moved')
        with pytest.raises(UserError, match='removed, moved or replaced'):
            workdir.require(folder)


def test_run_checks_the_workdir_again_under_its_lock(tmp_path, config):
    """Another process wrote its config after the first check."""
    folder = tmp_path / 'run'
    run = Run(types.SimpleNamespace(config=config), folder, None, {}, {})
    workdir.check(folder, config)
    write_config(folder, config_lib.resolve(small_config(seed=1)))
    with pytest.raises(UserError, match='seed: 1 in the workdir, 0 now'):
        run.__enter__()
    with workdir.hold(folder):  # It was released.
        pass


BEFORE = {'label_names': ['cat', 'dog'], 'train': '40 images (checksum 00000001)'}


def check_data(folder, config, **changes):
    """Checks a run of `config` on the data `BEFORE`, but for `changes`, under the lock."""
    workdir.check(folder, config, {**BEFORE, **changes})


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        (
            {'train': '45 images (checksum 00000002)'},
            r'train: 40 images \(.*1\) in the workdir, 45 images \(.*2\) now$',
        ),
        ({'label_names': ['dog', 'cat']}, 'label_names: in another order$'),
        (
            {'label_names': ['cat', 'cow', 'emu']},
            r"label_names: only in the workdir \['dog'\], only now \['cow', 'emu'\]$",
        ),
        ({'method.teachers[0]': 'ab12'}, r'method\.teachers\[0\]: none in the workdir, ab12 now$'),
    ],
)
def test_workdir_of_other_data_is_an_error(tmp_path, config, changes, words):
    write_config(tmp_path, config)
    files.write_json(tmp_path / workdir.DATA, BEFORE)
    check_data(tmp_path, config)
    with pytest.raises(UserError, match=words):
        check_data(tmp_path, config, **changes)


def test_workdir_of_an_earlier_version_is_accepted_with_a_note(tmp_path, config, capsys):
    write_config(tmp_path, config)
    check_data(tmp_path, config)
    assert 'has no data.json, as in earlier versions' in capsys.readouterr().out


@pytest.mark.parametrize('content', ['{"train"', '[1, 2]'])
def test_workdir_with_a_damaged_data_json_is_an_error(tmp_path, config, content):
    write_config(tmp_path, config)
    (tmp_path / workdir.DATA).write_text(content)
    with pytest.raises(UserError, match=r"/data\.json' is damaged"):
        check_data(tmp_path, config)


def test_workdir_killed_between_its_first_files_passes(tmp_path, config):
    files.write_json(tmp_path / workdir.DATA, BEFORE)
    check_data(tmp_path, config, train='on other data')


@pytest.mark.parametrize('name', ['lr=[0.1]', 'a*', 'a?', 'a\\b'])
def test_workdir_that_looks_like_a_pattern_is_an_error(tmp_path, config, name):
    with pytest.raises(UserError, match=r'cannot be read back from a path with one of \* \? \['):
        workdir.check(tmp_path / name / 'run', config)
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_of_another_run_is_an_error(tmp_path, config):
    progress = {'config': config.to_dict(), 'fingerprint': BEFORE}
    workdir.check_checkpoint(tmp_path, config, progress, BEFORE)
    workdir.check_checkpoint(tmp_path, config, {}, BEFORE)  # Of an earlier version.
    other = config_lib.resolve(small_config(seed=1))
    with pytest.raises(
        UserError, match=r'a checkpoint of another .* seed: 0 in the workdir, 1 now'
    ):
        workdir.check_checkpoint(tmp_path, other, progress, BEFORE)
    with pytest.raises(UserError, match='test: none in the workdir, 9 images now'):
        workdir.check_checkpoint(tmp_path, config, progress, {**BEFORE, 'test': '9 images'})
