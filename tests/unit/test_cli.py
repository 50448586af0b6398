"""Flags of the commands: configs from anywhere, and one line for each mistake."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from one_jax import fields
from one_jax.config import default_config, validate
from one_jax.errors import ConfigError, UserError
from one_jax.runtime import cli

REPOSITORY = Path(__file__).parents[2]
# ml_collections loads config files by a deprecated call.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module')
CONFIG = '--config=configs/cifar100_resnet32.py'


@pytest.fixture
def parse(monkeypatch):
    """Parses flags like a command with --config, in this process; returns the config."""
    values = flags.FlagValues()
    monkeypatch.setattr(flags, 'FLAGS', values)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    config_flags.DEFINE_config_file('config', flag_values=values)

    def parse(*arguments):
        argv = ['main', *arguments]
        monkeypatch.setattr(sys, 'argv', argv)
        cli.parse_flags(argv)
        return values.config

    return parse


def test_config_flag_with_overrides_sets_the_fields(parse):
    config = parse(f'{CONFIG}:okddip,smoke', '--config.model.num_branches=3', '--config.seed=7')
    assert config.method.name == 'okddip'
    assert (config.seed, config.model.num_branches, config.model.name) == (7, 3, 'resnet8')


def test_config_flag_as_two_arguments_loads_the_config(parse):
    assert parse('--config', 'configs/mnist5k_resnet8.py:few').train.epochs == 60


def test_config_outside_the_working_directory_finds_common(parse, tmp_path, monkeypatch):
    """The folder above the config is on the path, though no other entry leads to `configs`."""
    folder = tmp_path / 'clone' / 'configs'
    folder.mkdir(parents=True)
    for name in ('__init__.py', 'common.py', 'mnist5k_resnet8.py'):
        (folder / name).write_bytes((REPOSITORY / 'configs' / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.partition('.')[0] == 'configs']:
        monkeypatch.delitem(sys.modules, name)
    assert parse(f'--config={folder}/mnist5k_resnet8.py:few').train.epochs == 60
    assert sys.modules['configs.common'].__file__ == str(folder / 'common.py')


def test_config_field_none_is_the_default_of_fields_that_may_be_none(parse):
    """Also after a recipe's value; validation reports others."""
    placeholders = [field for field, value in fields.flatten(default_config()).items() if not value]
    placeholders = [
        field for field in placeholders if fields.get_field(default_config(), field) is None
    ]
    config = parse(f'{CONFIG}:mde,paper', *(f'--config.{field}=None' for field in placeholders))
    assert {'model.num_branches', 'method.teachers', 'method.leader'} <= {*placeholders}
    assert {fields.get_field(config, field) for field in placeholders} == {None}
    for field in ('seed', 'data.name', 'optimizer.nesterov', 'optimizer.learning_rate'):
        with pytest.raises(ConfigError, match=f'{field}=None is not allowed: '):
            validate(parse(CONFIG, f'--config.{field}=None'))


MISTAKES = {
    'unknown field': (['--config.modle.name=x'], ['modle.name', "'x'", 'model']),
    'unknown field of a group': (['--config.model.nmae=x'], ['model.nmae', "'x'", 'num_branches']),
    'below a field': (['--config.seed.x=1'], ['seed.x', "'1'"]),
    'unknown top field': (['--config.sed=1'], ['sed', "'1'", 'seed']),
    'int': (['--config.model.num_branches=three'], ['model.num_branches', "'three'", 'int']),
    'bool': (['--config.optimizer.nesterov=maybe'], ['optimizer.nesterov', 'maybe', 'boolean']),
    'unknown flag': (['--cnfig=x'], ['cnfig', 'config']),
    'renamed': (['--config.model.old=x'], ['model.old', 'model.name']),
    'removed': (['--config.model.gone=x'], ['model.gone', 'do without']),
}


@pytest.mark.parametrize('case', MISTAKES)
def test_mistake_in_a_flag_is_one_line(parse, monkeypatch, case):
    monkeypatch.setitem(fields.RENAMED, 'model.old', 'model.name')
    monkeypatch.setitem(fields.REMOVED, 'model.gone', 'do without')
    arguments, words = MISTAKES[case]
    with pytest.raises(SystemExit) as raised:
        parse(CONFIG, *arguments)
    line = str(raised.value)
    assert line.startswith('error: ')
    assert '\n' not in line
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ('config', 'words'),
    [
        ('configs/cifar1000.py', 'configs/cifar1000.py: no such file'),
        ('configs/cifar100_resnet32.py:fast', "'fast' is not one of"),
        ('configs/cifar100_resnet32.py:dml,okddip', 'one method'),
    ],
)
def test_unknown_config_or_option_is_one_line(parse, config, words):
    with pytest.raises(SystemExit, match=words) as raised:
        parse(f'--config={config}', '--config.seed=1')
    assert '\n' not in str(raised.value)


@pytest.mark.parametrize(
    ('recipe', 'message'),
    [
        ('def get_config(options=""):\n    return {}["name"]\n', r"KeyError: 'name' \(line 2\)"),
        ('import nonsense\n', r"ModuleNotFoundError: No module named 'nonsense' \(line 1\)"),
        ('import sys\nsys.exit()\n', r'SystemExit:  \(line 2\)'),
        ('def get_config(:\n', 'SyntaxError: .*line 1'),
        ('def get_config(options=""):\n    return {}\n', 'returns no ConfigDict, but dict'),
    ],
)
def test_fault_in_a_recipe_is_one_line_with_its_place(parse, tmp_path, recipe, message):
    path = tmp_path / 'config.py'
    path.write_text(recipe)
    with pytest.raises(SystemExit, match=rf'^error: --config={path}: .*{message}') as raised:
        parse(f'--config={path}', '--config.seed=1')
    assert '\n' not in str(raised.value)


@pytest.mark.parametrize('path', ['', '/nowhere.py', 300 * 'x'])
def test_recipe_that_does_not_exist_is_one_line(parse, path):
    with pytest.raises(SystemExit, match=f'^error: --config={path}: no such file$'):
        parse(f'--config={path}')


PRINTS = """
from one_jax.runtime import cli
with cli.reporting_errors():
    for _ in range(100_000):
        print('caf\\u00e9 \\udcff')
"""


def test_output_that_nobody_reads_ends_quietly():
    command = [sys.executable, '-c', PRINTS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b''
    assert process.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize('count', ['1', '100_000'])
def test_output_to_a_full_disk_is_one_line(count):
    """One line fails when it is flushed at the end, many fail before."""
    command = [sys.executable, '-c', PRINTS.replace('100_000', count)]
    with open('/dev/full', 'w') as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.stderr == 'error: the output cannot be written: No space left on device\n'
    assert done.returncode == 1


@pytest.mark.parametrize('closed', ['>&-', '2>&-', '>&- 2>&-', '<&- >&- 2>&-'])
@pytest.mark.parametrize(('flags', 'status'), [(['--help'], 0), (['--nonsense\udcff'], 2)])
def test_command_with_closed_streams_has_its_usual_status(closed, flags, status):
    command = ['sh', '-c', f'exec "$@" {closed}', 'sh', sys.executable, '-m', 'one_jax.report']
    done = subprocess.run([*command, *flags], cwd=REPOSITORY, capture_output=True)
    assert done.returncode == status
    assert b'Traceback' not in done.stderr


def test_line_of_output_is_written_at_once():
    script = PRINTS.replace('100_000', '1') + '    import os; os._exit(0)'
    assert subprocess.run([sys.executable, '-c', script], capture_output=True).stdout


def test_names_that_the_terminal_cannot_print_are_escaped():
    environment = {**os.environ, 'PYTHONIOENCODING': 'ascii'}
    command = [sys.executable, '-c', PRINTS.replace('100_000', '1')]
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert done.stdout == b'caf\\xe9 \\udcff\n'


def test_reporting_errors_of_the_system_are_one_line(tmp_path):
    with (
        pytest.raises(SystemExit, match=r"^error: '.*\\x1b': Permission denied$"),
        cli.reporting_errors(),
    ):
        raise PermissionError(13, 'Permission denied', str(tmp_path / '\x1b'))


def test_reporting_errors_escapes_what_changes_the_terminal(capsys):
    with cli.reporting_errors():
        print('a\x1b[31m\tb\u202e\x9bü')
    assert capsys.readouterr().out == 'a\\x1b[31m\tb\\u202e\\x9bü\n'
    with pytest.raises(SystemExit, match=r'^error: a\\x1b\\nb$'), cli.reporting_errors():
        raise UserError('a\x1b\nb')
