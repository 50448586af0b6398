"""Who may write to a workdir, and what is read from an older one."""

import errno
import json
import os
import types

import jax
import pytest
from training_fixtures import small_config, snapshot

from one_jax import config as config_lib
from one_jax import train
from one_jax.errors import ConfigError, UserError
from one_jax.runtime import files, parallel
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


MALFORMED = {
    'empty': b'',
    'a list': b'[1, 2]',
    'null': b'null',
    'half': b'{"train": "40 im',
    'not UTF-8': b'{"train": "\xff"}',
    'NaN': b'{"train": NaN}',
    'infinity': b'{"train": 1e999}',
    'a name twice': b'{"train": 1, "train": 2}',
    'a number of 5,000 digits': b'{"train": ' + 5000 * b'1' + b'}',
    '100,000 lists': 100_000 * b'[',
    '100 lists': b'{"train": ' + 100 * b'[' + 100 * b']' + b'}',
}


def assert_one_line(error, path):
    """Whether an error is one short line that names the file."""
    text = str(error.value)
    assert f'{str(path)!r} is damaged: ' in text
    assert text.isprintable()
    assert len(text) < 1000


@pytest.mark.parametrize('kind', MALFORMED)
def test_read_json_malformed_is_one_line(tmp_path, kind):
    path = tmp_path / 'a.json'
    path.write_bytes(MALFORMED[kind])
    with pytest.raises(UserError) as error:
        files.read_json(path)
    assert_one_line(error, path)


@pytest.mark.parametrize('make', [os.mkdir, os.mkfifo, lambda path: os.symlink('/dev/zero', path)])
def test_read_json_of_no_regular_file_is_an_error(tmp_path, make):
    make(tmp_path / 'a.json')
    with pytest.raises(UserError, match=r"a\.json' cannot be read: not a regular file"):
        files.read_json(tmp_path / 'a.json')


@pytest.mark.parametrize('name', ['missing', 'x' * 300, 'file/below'])
def test_read_json_of_no_file_is_an_error(tmp_path, name):
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match='cannot be read: '):
        files.read_json(tmp_path / name)


@pytest.mark.parametrize('umask', [0o022, 0o077, 0o007])
def test_write_obeys_the_umask_and_leaves_nothing_else(tmp_path, umask):
    before = os.umask(umask)
    try:
        files.write_json(tmp_path / 'a.json', {'x': float('nan')})
    finally:
        os.umask(before)
    assert (tmp_path / 'a.json').stat().st_mode & 0o777 == 0o666 & ~umask
    assert files.read_json(tmp_path / 'a.json') == {'x': None}
    assert [path.name for path in tmp_path.iterdir()] == ['a.json']


# Dotted fields of a config.json, values that no config has, and words of the error.
BAD_FIELDS = [
    ('seed', None, 'a whole number'),
    ('seed', True, 'a whole number'),
    ('seed', 0.5, 'a whole number'),
    ('seed', {}, 'a whole number'),
    ('seed', {'x': 1}, 'do not fit together'),
    ('seed', 10**400, 'a whole number'),
    ('model', 3, 'an object with fields'),
    ('model', [], 'an object with fields'),
    ('model.name', 3, 'text'),
    ('model.name', 10_000 * 'x', 'one of'),
    ('model.name', 'a\x1b[31m\nb', 'one of'),
    ('model.num_branches', '3', 'a whole number, or null'),
    ('method.name', None, 'text'),
    ('method.temperature', [[[1]]], 'a number, or null'),
    ('method.temperature', -1.0, 'at least 0.01'),
    ('data.stream', 1, 'true or false'),
    ('data.batch_size', '128', 'a whole number'),
    ('optimizer.learning_rate', '', 'a number'),
    ('optimizer.milestones', 0.5, 'a list of numbers'),
    ('optimizer.milestones', ['a'], 'a list of numbers'),
]


@pytest.mark.parametrize(('field', 'value', 'words'), BAD_FIELDS)
def test_config_with_a_value_of_another_kind_is_one_line(tmp_path, config, field, value, words):
    content = config.to_dict()
    group, _, name = field.rpartition('.')
    (content[group] if group else content)[name] = value
    (tmp_path / workdir.CONFIG).write_text(json.dumps(content))
    for read in (workdir.read_config, lambda path: workdir.check(path, config)):
        with pytest.raises(UserError, match=words) as error:
            read(tmp_path)
        assert_one_line(error, tmp_path / workdir.CONFIG)


def test_lock_removes_what_killed_processes_left_and_nothing_else(tmp_path):
    names = (workdir.CONFIG, workdir.RESULT, workdir.DATA, 'metrics.jsonl')
    litter = [files.temporary_beside(tmp_path / name) for name in names]
    others = ['.config.json.original', '.config.json.swp', '.thesis.tex.0123abcd.one_jax']
    for path in (*litter, *map(tmp_path.joinpath, (*names, *others))):
        path.write_text('{}')
    with workdir.hold(tmp_path):
        with pytest.raises(UserError), workdir.hold(tmp_path):  # A second one removes nothing.
            raise AssertionError('held twice')
        found = {path.name for path in tmp_path.iterdir()}
    assert found == {workdir.LOCK, *names, *others}


def test_lock_held_by_another_process_keeps_its_temporary_files(tmp_path):
    with workdir.hold(tmp_path):
        live = files.temporary_beside(tmp_path / workdir.CONFIG)
        live.touch()
        with pytest.raises(UserError, match='in use'), workdir.hold(tmp_path):
            raise AssertionError('held twice')
        assert live.exists()


@pytest.mark.parametrize('content', ['{"train"', '[1, 2]'])
def test_workdir_with_a_damaged_data_json_is_an_error(tmp_path, config, content):
    write_config(tmp_path, config)
    (tmp_path / workdir.DATA).write_text(content)
    with pytest.raises(UserError, match=r"/data\.json' is damaged"):
        check_data(tmp_path, config)


def test_workdir_killed_between_its_first_files_passes(tmp_path, config):
    files.write_json(tmp_path / workdir.DATA, BEFORE)
    check_data(tmp_path, config, train='on other data')


@pytest.mark.parametrize('name', ['lr=[0.1]', 'a*', 'a?', 'a\\b', os.fsdecode(b'\xff')])
def test_workdir_that_checkpoints_cannot_be_read_from_is_an_error(tmp_path, config, name):
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


def test_start_with_a_field_without_effect_is_an_error_unless_the_run_has_begun(tmp_path):
    """Milestones with a constant rate, which earlier versions accepted."""
    config = small_config(**{'optimizer.milestones': (0.3,)})
    mesh = parallel.make_mesh(jax.devices()[:1])
    with pytest.raises(ConfigError, match=r'milestones=\[0\.3\] is not allowed: its default'):
        train._check(config, tmp_path, mesh)
    files.write_json(tmp_path / workdir.CONFIG, config_lib.resolve(config).to_dict())
    assert train._check(config, tmp_path, mesh).optimizer.milestones == (0.3,)


def test_workdir_with_a_name_that_is_too_long_is_an_error(tmp_path, config):
    name = 300 * 'x'
    with pytest.raises(UserError, match=r'cannot be written \(File name too long\)'):
        workdir.check(tmp_path / name, config)
    with pytest.raises(UserError, match=r'holds no run: there is no config\.json'):
        workdir.read_config(tmp_path / name)
