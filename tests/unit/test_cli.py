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


def test_fault_in_a_config_keeps_its_traceback(parse, tmp_path):
    (tmp_path / 'config.py').write_text('def get_config(options=""):\n    return {}["name"]\n')
    with pytest.raises(KeyError, match='name'):
        parse(f'--config={tmp_path}/config.py', '--config.seed=1')


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


def test_names_that_the_terminal_cannot_print_are_escaped():
    environment = {**os.environ, 'PYTHONIOENCODING': 'ascii'}
    command = [sys.executable, '-c', PRINTS.replace('100_000', '1')]
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert done.stdout == b'caf\\xe9 \\udcff\n'
