"""Whole commands: train, resume after kills, evaluate, export, report, and refuse bad input."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from commands import (
    REPOSITORY,
    TINY,
    TINY_PLAIN,
    assert_same_run,
    environment,
    final_state,
    run,
    snapshot,
    start,
)


@pytest.fixture(scope='session')
def cache(tmp_path_factory):
    """The flag of a compilation cache that the tests' processes share."""
    return f'--config.train.compilation_cache_dir={tmp_path_factory.mktemp("cache")}'


@pytest.fixture(scope='session')
def finished(tmp_path_factory, cache):
    """The workdir of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp('runs') / 'one'
    run('main', *TINY, cache, f'--workdir={workdir}')
    return workdir


def read_json(path):
    return json.loads(path.read_text())


@pytest.mark.end_to_end
def test_a_run_leaves_its_records(finished):
    result = read_json(finished / 'result.json')
    assert result['step'] == 16
    assert result['epochs'] == 2
    assert result['method'] == 'one'
    assert len(result['branch_top1']) == len(result['branch_top5']) == 3
    assert result['deployed_top1'] == result['branch_top1'][0]
    assert 0 <= result['teacher_top1'] <= result['teacher_top5'] <= 100
    assert result['parameters'] > result['deployed_parameters']
    assert result['versions']['jax']

    config = read_json(finished / 'config.json')
    assert config['method'] == {
        'name': 'one',
        'temperature': 3.0,
        'distill_weight': 1.0,
        'rampup_fraction': 80 / 300,
        'teacher': 'gate',
        'detach_teacher': True,
    }
    records = [json.loads(line) for line in (finished / 'metrics.jsonl').read_text().splitlines()]
    steps = {
        split: [record['step'] for record in records if record['split'] == split]
        for split in ('train', 'test')
    }
    # Every third step and every epoch's end.
    assert steps == {'train': [3, 6, 8, 9, 12, 15, 16], 'test': [8, 16]}
    assert records[-1]['branch_top1'] == result['branch_top1']
    # The ramp: epoch 0 and epoch 1 of 2.
    weights = {r['step']: r['distill_weight'] for r in records if r['split'] == 'train'}
    assert weights[8] == pytest.approx(np.exp(-5))
    assert weights[9] == 1.0
    assert list(finished.glob('events.out.tfevents.*'))
    assert (finished / 'curves.png').read_bytes().startswith(b'\x89PNG')


def test_the_same_command_again_shows_the_result_and_writes_nothing(finished, cache):
    before = snapshot(finished)
    output, _ = run('main', *TINY, cache, f'--workdir={finished}')
    assert 'branch 0' in output
    assert snapshot(finished) == before


def test_the_default_workdir_is_named_after_the_config(tmp_path, cache):
    env = environment(PYTHONPATH=str(REPOSITORY))
    config = f'--config={REPOSITORY}/configs/cifar100_resnet32.py:smoke,plain'
    command = [sys.executable, '-m', 'one_jax.main', config, cache]
    subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True)
    result = read_json(tmp_path / 'runs/cifar100_resnet32_smoke_plain/result.json')
    assert result['method'] == 'plain'
    assert result['teacher_top1'] is None
    assert len(result['branch_top1']) == 1


@pytest.mark.end_to_end
def test_killed_at_any_moment_it_goes_on_to_the_same_end(tmp_path, finished, cache):
    """SIGKILL at six moments: start-up, steps, evaluation and saves are all within their range."""
    workdir = tmp_path / 'run'
    generator = random.Random(0)
    kills = 0
    for _ in range(40):
        process = start('main', *TINY, cache, f'--workdir={workdir}')
        try:
            process.communicate(timeout=generator.uniform(0.3, 1.0) * (2 + kills))
            assert process.returncode == 0
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            if kills == 6:
                run('main', *TINY, cache, f'--workdir={workdir}')
                break
    assert kills > 0
    assert_same_run(workdir, finished)


@pytest.mark.end_to_end
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends(tmp_path, finished, cache, number):
    """The signal comes after the first record, and the rest of the epoch is still to do."""
    workdir = tmp_path / 'run'
    process = start('main', *TINY, cache, f'--workdir={workdir}')
    records = workdir / 'metrics.jsonl'
    deadline = time.monotonic() + 120
    while not (records.exists() and records.stat().st_size) and time.monotonic() < deadline:
        os.sched_yield()
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    if process.returncode != 0:  # unless the run was over before the signal came
        assert process.returncode == 128 + number
        assert 'saved' in errors.splitlines()[-1]
        assert 'Traceback' not in errors
        _, step = final_state(workdir)
        assert 3 <= step <= 16
    run('main', *TINY, cache, f'--workdir={workdir}')
    assert_same_run(workdir, finished)


@pytest.mark.end_to_end
def test_a_truncated_newest_checkpoint_is_passed_over(tmp_path, finished, cache):
    workdir = tmp_path / 'run'
    process = start('main', *TINY, cache, f'--workdir={workdir}')
    process.communicate(timeout=120)
    (workdir / 'result.json').unlink()
    largest = max((workdir / 'checkpoints/16').rglob('*'), key=lambda path: path.stat().st_size)
    with largest.open('r+b') as file:
        file.truncate(largest.stat().st_size // 2)
    output, errors = run('main', *TINY, cache, f'--workdir={workdir}')
    assert 'checkpoints/16' in output + errors
    assert 'after step 8' in output
    assert_same_run(workdir, finished)


def test_another_config_is_refused_with_the_differing_fields(finished, cache):
    before = snapshot(finished)
    flags = (*TINY, cache, '--config.seed=1', '--config.method.temperature=4')
    _, errors = run('main', *flags, f'--workdir={finished}', status=1)
    (line,) = errors.splitlines()
    assert 'seed: 0 in the workdir, 1 now' in line
    assert 'method.temperature: 3.0 in the workdir, 4.0 now' in line
    assert snapshot(finished) == before


BAD_INPUT = {
    'unknown field': (['--config.modle.name=x'], ['modle.name', "'x'", 'model']),
    'unknown field of a group': (['--config.model.nmae=x'], ['model.nmae', "'x'", 'num_branches']),
    'wrong type': (['--config.model.num_branches=three'], ['num_branches', "'three'", 'int']),
    'unknown data set': (
        ['--config.data.name=cifar11', '--config.data.generated_examples=0'],
        ['data.name', "'cifar11'", "'cifar10'"],
    ),
    'unknown network': (['--config.model.name=resnet33'], ['model.name', "'resnet33'", '6n + 2']),
    'unknown method': (['--config.method.name=two'], ['method.name', "'two'", "'one'", "'plain'"]),
    'no branches': (['--config.model.num_branches=0'], ['model.num_branches', '0', 'at least']),
    'branches of the plain network': (
        ['--config.method.name=plain', '--config.model.num_branches=3'],
        ['model.num_branches', '3', 'exactly 1'],
    ),
    "another method's field": (
        ['--config.method.name=plain', '--config.method.temperature=3'],
        ['method.temperature', '3', "'plain'"],
    ),
    'temperature 0': (['--config.method.temperature=0'], ['method.temperature', '0', 'above 0']),
    'not a number': (['--config.optimizer.learning_rate=nan'], ['learning_rate', 'nan', '0']),
    'share_stages': (['--config.model.share_stages=3'], ['model.share_stages', '3', '0 to 2']),
    'data set missing': (
        ['--config.data.generated_examples=0', '--config.data.data_dir=/nowhere'],
        ['data.name', "'cifar100'", '/nowhere', 'one_jax.prepare'],
    ),
    'unknown flag': (['--wrkdir=x'], ['wrkdir', 'workdir']),
    'batch larger than the data': (['--config.data.batch_size=256'], ['batch_size', '256', '128']),
}


@pytest.mark.parametrize('case', BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, case):
    flags, words = BAD_INPUT[case]
    workdir = tmp_path / 'run'
    _, errors = run('main', *TINY, *flags, f'--workdir={workdir}', status=1)
    (line,) = errors.splitlines()
    assert line.startswith('error: ')
    for word in words:
        assert word in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('config', 'words'),
    [
        ('configs/cifar1000.py', 'no such file'),
        ('configs/cifar100_resnet32.py:fast', "'fast' is not one of 'plain', 'smoke'"),
    ],
)
def test_a_config_that_is_not_there_is_one_line(tmp_path, config, words):
    flags = (f'--config={config}', '--config.seed=1', f'--workdir={tmp_path / "run"}')
    _, errors = run('main', *flags, status=1)
    (line,) = errors.splitlines()
    assert line.startswith('error: ')
    assert words in line
    assert list(tmp_path.iterdir()) == []


def test_a_batch_that_the_devices_cannot_share_is_refused(tmp_path):
    flags = (*TINY, '--config.data.batch_size=18', f'--workdir={tmp_path / "run"}')
    three = '--xla_force_host_platform_device_count=4'
    _, errors = run('main', *flags, status=1, XLA_FLAGS=three)
    assert errors == 'error: data.batch_size=18 is not allowed: a multiple of the 4 devices\n'
    assert list(tmp_path.iterdir()) == []


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
    file = tmp_path / 'file'
    file.write_text('precious')
    for workdir in (file, file / 'below'):
        _, errors = run('main', *TINY, f'--workdir={workdir}', status=1)
        (line,) = errors.splitlines()
        assert str(workdir) in line
        assert 'cannot be written' in line
    assert file.read_text() == 'precious'


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / 'thesis.tex').write_text('precious')
    _, errors = run('main', *TINY, f'--workdir={tmp_path}', status=1)
    assert 'is not empty' in errors
    assert snapshot(tmp_path) == {'thesis.tex': b'precious'}


STUDENT = """
import sys, numpy as np, jax, jax.export
program = jax.export.deserialize(bytearray(open(sys.argv[1], 'rb').read()))
images = np.load(sys.argv[2])
np.save(sys.argv[3], np.concatenate([program.call(images[:1]), program.call(images[1:])]))
assert 'one_jax' not in sys.modules
"""


@pytest.mark.end_to_end
def test_export_and_evaluation_of_every_branch(tmp_path, finished, cache):
    result = read_json(finished / 'result.json')
    output, _ = run('evaluate', f'--workdir={finished}')
    for top1 in result['branch_top1']:
        assert f'{top1:.2f}' in output
    for branch in (0, 2):
        student = tmp_path / f'student{branch}'
        run('export', f'--workdir={finished}', f'--output={student}', f'--branch={branch}')
        config = read_json(student / 'config.json')
        assert config['metric']['top1'] == result['branch_top1'][branch]
        output, _ = run('evaluate', f'--student={student}')
        assert f'{result["branch_top1"][branch]:.2f}' in output
        assert f'{result["branch_nll"][branch]:.4f}' in output

    # The program runs without one_jax, on batches of any size, and gives the same logits.
    from one_jax.student import load_student

    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    np.save(tmp_path / 'images.npy', images)
    program = [student / 'student.stablehlo', tmp_path / 'images.npy', tmp_path / 'logits.npy']
    subprocess.run([sys.executable, '-c', STUDENT, *program], env=environment(), check=True)
    logits = load_student(student)(images)
    np.testing.assert_allclose(np.load(tmp_path / 'logits.npy'), logits, rtol=1e-4, atol=1e-4)


def test_export_refuses_what_it_cannot_do(tmp_path, finished):
    before = snapshot(finished)
    (tmp_path / 'mine.txt').write_text('precious')
    cases = [
        ([f'--workdir={finished}', f'--output={tmp_path}'], 'nothing is overwritten'),
        ([f'--workdir={finished}', f'--output={tmp_path}/s', '--branch=3'], '0 to 2'),
        ([f'--workdir={tmp_path}', f'--output={tmp_path}/s'], 'holds no run'),
        ([f'--output={tmp_path}/s'], '--workdir=DIR'),
    ]
    for flags, words in cases:
        _, errors = run('export', *flags, status=1)
        (line,) = errors.splitlines()
        assert words in line
    assert snapshot(tmp_path) == {'mine.txt': b'precious'}
    assert snapshot(finished) == before


@pytest.mark.end_to_end
def test_report_of_several_runs(tmp_path, finished, cache):
    plain = tmp_path / 'plain'
    run('main', *TINY_PLAIN, cache, f'--workdir={plain}')
    output, _ = run('report', str(plain), str(finished), f'--output={tmp_path / "report"}')
    for workdir in (plain, finished):
        assert f'{read_json(workdir / "result.json")["deployed_top1"]:.2f}' in output
    assert (tmp_path / 'report/report.md').exists()
    assert (tmp_path / 'report/curves.png').read_bytes().startswith(b'\x89PNG')
