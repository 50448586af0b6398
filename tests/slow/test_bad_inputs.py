"""The corpus of malformed inputs: every sixteenth case, and what the benchmark itself detects."""

import subprocess
import sys

import pytest
from command_helpers import REPOSITORY, TIMEOUT

from benchmarks.bad_inputs import runner


def test_bad_inputs_sample_of_every_kind_has_no_failures():
    command = [sys.executable, '-m', 'benchmarks.bad_inputs', '--sample=16', '--jobs=2']
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=2 * TIMEOUT
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert ' cases, 0 failures, ' in done.stdout.splitlines()[-1]
    kinds = ('images', 'folders', 'configs', 'students', 'workdirs', 'weights', 'records')
    for kind in kinds:
        assert f'\n| {kind} | ' in done.stdout


@pytest.mark.parametrize(
    ('accepts', 'outcome', 'problem'),
    [
        (None, (1, '', 'error: data.root=3\n'), ''),
        (None, (0, 'done', ''), 'silent acceptance'),
        (None, (None, '', ''), 'hang'),
        (None, (1, '', 'Traceback (most recent call last):\nKeyError: 3\n'), 'traceback: KeyError'),
        (None, (1, '', 'W1 warning\nerror: data.root=3\n'), 'not one line of error but 2'),
        (None, (1, '', 'error: data.name=3\n'), "refused for another reason, 'data.root'"),
        (None, (-9, '', ''), 'exit status -9'),
        (runner.shows('cat'), (0, 'cat 99 %', ''), ''),
        (runner.shows('cat'), (0, 'dog 99 %', ''), 'wrong output'),
        (runner.shows('cat'), (1, '', 'error: data.root=3\n'), 'refused an input'),
    ],
)
def test_judge_of_an_outcome_names_what_is_wrong(accepts, outcome, problem):
    case = runner.Case('kind', 'name', (), accepts=accepts)
    found = runner.judge(case, runner.Outcome(*outcome), 'data.root')
    assert found.startswith(problem)
    assert bool(found) == bool(problem)


@pytest.mark.parametrize(
    ('place', 'problem'),
    [
        ('input/config.json', "changed its input: ['config.json']"),
        ('input/more', "changed its input: ['more']"),
        ('output/config.json', "refused, but wrote ['config.json']"),
        ('input/.lock', ''),
        (runner.CANARY, 'ran code of its input; '),
    ],
)
def test_run_case_whose_command_writes_is_a_failure(tmp_path, monkeypatch, place, problem):
    def run(command, folder, *_):
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_text('{}')
        return runner.Outcome(1, '', f'error: {command[1]} is damaged\n')

    def make(folder):
        (folder / 'config.json').write_text('')

    monkeypatch.setattr(runner, 'run', run)
    case = runner.Case('kind', 'name', ('report', '{input}'), make, names='{input}')
    assert runner.run_case(case, tmp_path / 'case', {}) == problem
    assert not runner.CANARY.exists()
