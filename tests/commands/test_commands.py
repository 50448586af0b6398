"""Whole commands: train, stop and resume, evaluate, export, plan, report; and exit statuses."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from command_helpers import REPOSITORY, TINY, cache_flag, environment, run, start
from training_fixtures import assert_same_run, saved_state, snapshot

from one_jax.runtime import records


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """The workdir of an uninterrupted run, in its default place below the working directory."""
    folder = tmp_path_factory.mktemp('clone')
    config = f'--config={REPOSITORY}/configs/image_folder.py:smoke'
    output, _ = run('main', config, *TINY[1:], cache_flag(), cwd=folder)
    assert 'branch 0' in output
    return folder / 'runs/image_folder_smoke'


def read_json(path):
    return json.loads(path.read_text())


def error_line(*arguments, **options):
    """Runs a command that fails, and returns its one line."""
    _, errors = run(*arguments, status=1, **options)
    (line,) = errors.splitlines()
    assert line.startswith('error: ')
    return line


@pytest.mark.end_to_end
def test_main_leaves_a_whole_run(finished):
    result = read_json(finished / 'result.json')
    assert (result['method'], result['step'], result['epochs']) == ('one', 16, 2)
    assert len(result['branch_top1']) == 3
    found = records.read_records(finished)
    assert [r['step'] for r in found if r['split'] == 'train'] == [3, 6, 8, 9, 12, 15, 16]
    assert [r['step'] for r in found if r['split'] == 'test'] == [8, 16]
    assert found[-1]['branch_top1'] == result['branch_top1']
    names = {path.name for path in finished.iterdir()}
    assert names >= {'config.json', 'curves.png', 'checkpoints', 'metrics.jsonl'}


@pytest.mark.end_to_end
def test_main_stopped_by_a_signal_resumes_to_the_same_end(tmp_path, finished):
    """The signal comes after the first record, with the rest of the epoch still to do."""
    flags = (*TINY, cache_flag(), f'--workdir={tmp_path / "run"}')
    process = start('main', *flags)
    line = ''
    while not line.startswith('step '):
        line = process.stderr.readline()
        assert line, process.communicate()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    if process.returncode:  # Otherwise the run ended before the signal came.
        assert process.returncode == 128 + signal.SIGTERM
        assert 'saved; the same command resumes' in errors.splitlines()[-1]
        assert 'Traceback' not in errors
        assert 3 <= saved_state(tmp_path / 'run')[1] <= 16
    run('main', *flags)
    assert_same_run(tmp_path / 'run', finished)


def test_main_bad_config_is_one_line_and_leaves_nothing(tmp_path):
    workdir = f'--workdir={tmp_path / "run"}'
    # The first is found while parsing, the second by validation, the third in the data.
    for flags, words in (
        (['--config.model.nmae=x'], ['model.nmae', "'x'", 'num_branches']),
        (['--config.data.batch_size=18'], ['data.batch_size=18', 'multiple of the 4 devices']),
        (['--config.data.batch_size=256'], ['batch_size=256', '64']),
    ):
        four = '--xla_force_host_platform_device_count=4'
        line = error_line('main', *TINY, *flags, workdir, XLA_FLAGS=four)
        assert all(word in line for word in words), line
        assert list(tmp_path.iterdir()) == []


def test_main_exploding_loss_is_one_line(tmp_path):
    """As users meet it: the learning rate is far too large."""
    flags = (*TINY, cache_flag(), '--config.optimizer.learning_rate=999')
    _, errors = run('main', *flags, f'--workdir={tmp_path / "run"}', status=1)
    last = errors.splitlines()[-1]
    assert last.startswith('error: step ')
    assert ' is not finite: ' in last
    assert 'there is no checkpoint yet' in last
    assert 'Traceback' not in errors
    assert not (tmp_path / 'run/checkpoints').exists()


STUDENT = """
import sys, numpy as np, jax, jax.export
program = jax.export.deserialize(bytearray(open(sys.argv[1], 'rb').read()))
images = np.load(sys.argv[2])
np.save(sys.argv[3], np.concatenate([program.call(images[:1]), program.call(images[1:])]))
assert 'one_jax' not in sys.modules
"""


@pytest.mark.end_to_end
def test_evaluate_and_export_agree_with_the_run(tmp_path, finished):
    result, student = read_json(finished / 'result.json'), tmp_path / 'student'
    output, _ = run('evaluate', f'--workdir={finished}')
    assert all(f'{top1:.2f}' in output for top1 in result['branch_top1'])
    run('export', f'--workdir={finished}', f'--output={student}', '--branch=2')
    config = read_json(student / 'config.json')
    assert config['metric']['top1'] == result['branch_top1'][2]
    output, _ = run('evaluate', f'--student={student}')
    assert f'{result["branch_top1"][2]:.2f}' in output
    assert f'{result["branch_nll"][2]:.4f}' in output

    # The program runs without one_jax, on batches of any size, and computes the same logits.
    from one_jax import load_student

    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    np.save(tmp_path / 'images.npy', images)
    program = [student / 'student.stablehlo', tmp_path / 'images.npy', tmp_path / 'logits.npy']
    subprocess.run([sys.executable, '-c', STUDENT, *program], env=environment(), check=True)
    logits = load_student(student)(images)
    np.testing.assert_allclose(np.load(tmp_path / 'logits.npy'), logits, rtol=1e-4, atol=1e-4)


def test_export_into_a_folder_with_files_is_one_line(tmp_path, finished):
    before = snapshot(finished)
    (tmp_path / 'mine.txt').write_text('precious')
    line = error_line('export', f'--workdir={finished}', f'--output={tmp_path}')
    assert 'nothing is overwritten' in line
    assert snapshot(tmp_path) == {'mine.txt': b'precious'}
    assert snapshot(finished) == before


@pytest.mark.end_to_end
def test_report_compares_runs(tmp_path, finished):
    result = read_json(finished / 'result.json')
    output, _ = run('report', str(finished), f'--output={tmp_path / "report"}')
    assert f'{result["deployed_top1"]:.2f}' in output
    assert (tmp_path / 'report/report.md').exists()
    assert (tmp_path / 'report/curves.png').read_bytes().startswith(b'\x89PNG')


def test_plan_prints_costs_of_a_recipe_without_its_data(tmp_path):
    flags = ('--config=configs/cifar10_resnet32.py', '--config.model.name=resnet8')
    flags += (f'--config.data.data_dir={tmp_path}', cache_flag())
    output, _ = run('plan', *flags, '--devices=8')
    costs, steps, memory = output.splitlines()
    assert costs.startswith('194,903 parameters, ')
    assert steps.startswith('117,000 steps of 128 images, 300 epochs, on 8 devices; 1 all-reduce ')
    assert memory.startswith('memory per device: ')
    assert list(tmp_path.iterdir()) == []
    for wrong in ('--topology=v9:2x2', '--slices=2'):
        assert wrong.partition('=')[0][2:] in error_line('plan', *flags, wrong)
    assert '--config' in error_line('plan')
