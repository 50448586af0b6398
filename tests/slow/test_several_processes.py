"""Two real processes of four devices each, against one process of eight."""

import contextlib
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from command_helpers import REPOSITORY
from device_worker import SMALL, TIMEOUT, Job, environment, free_port
from PIL import Image
from student_fixtures import write_student
from training_fixtures import cut_back, saved_state

from one_jax import config as config_lib
from one_jax import train
from one_jax.runtime.records import read_records

BATCH, TEST_IMAGES = SMALL['data.batch_size'], {'resident': 17, 'streamed': 11}


def write_images(root, seed=0):
    """Writes two classes of JPEGs: 36 for training, 11 for testing."""
    generator = np.random.default_rng(seed)
    for split, count in (('train', 36), ('test', TEST_IMAGES['streamed'])):
        for index in range(count):
            path = root / split / 'ab'[index % 2] / f'{index}.jpg'
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (12, 12, 3), np.uint8)
            Image.fromarray(pixels).save(path, quality=100)
    return root


def folder_fields(root, **fields):
    return {**SMALL, 'data.generated_examples': 0, 'data.root': str(root), **fields}


def unlike_runs(folder):
    """Returns runs in which process 1 differs from process 0, and words of both errors."""
    kd = {**SMALL, 'method.name': 'kd', 'model.num_branches': 1, 'data.name': 'cifar10'}
    kd['data.image_size'] = 0
    config = config_lib.default_config()
    config.update_from_flattened_dict(kd)
    teachers = [str(write_student(folder / f'teacher{n}', config, n)) for n in range(2)]
    kd['method.teachers'] = teachers[0]
    others = [write_images(folder / f'images{seed}', seed) for seed in range(2)]
    alike = 'start all processes with the same command, data and version'
    cannot_start = ['process 1 cannot start: see its own message']

    def both(*words):
        return [*words, alike], [*words, alike]

    return {
        'config': (
            {'fields': SMALL, 'own_fields': {1: {'optimizer.learning_rate': 0.2}}},
            both('process 1 has another config', 'learning_rate=0.2 and not', '=0.05'),
        ),
        'data': (
            {
                'fields': folder_fields(others[0], **{'optimizer.learning_rate': 0.1}),
                'own_fields': {1: {'data.root': str(others[1])}},
            },
            both('process 1 has another data set than process 0', 'mean='),
        ),
        'version': (
            {'fields': SMALL, 'own_versions': {1: '99.0'}},
            both('process 1 has another version of the code', "one_jax='99.0' and not"),
        ),
        'teacher': (
            {'fields': kd, 'own_fields': {1: {'method.teachers': teachers[1]}}},
            both('process 1 has another student than process 0', 'method.teachers[0]='),
        ),
        'bad field': (
            {'fields': SMALL, 'own_fields': {1: {'optimizer.momentum': 2.0}}},
            (cannot_start, ['optimizer.momentum=2.0 is not allowed: at least 0 and below 1']),
        ),
        'missing data': (
            {
                'fields': folder_fields(others[0], **{'data.stream': True}),
                'own_fields': {1: {'data.root': str(folder / 'nowhere')}},
            },
            (cannot_start, ['data.root=', 'nowhere', 'train/<class>']),
        ),
        'missing teacher': (
            {'fields': kd, 'own_fields': {1: {'method.teachers': str(folder / 'nowhere')}}},
            (cannot_start, ['method.teachers=', 'nowhere', 'holds no student']),
        ),
    }


UNLIKE = ('config', 'data', 'version', 'teacher', 'bad field', 'missing data', 'missing teacher')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('processes')


@pytest.fixture(scope='module')
def runs(folder):
    """The reports of one process of 8 devices and of a pair of 4 each on the same runs; and the
    pair's errors in runs in which the two differ, with the words they should have."""
    streamed = folder_fields(
        write_images(folder / 'streamed'), **{'data.stream': True, 'train.steps': 3}
    )
    kinds, unlike = {'resident': SMALL, 'streamed': streamed}, unlike_runs(folder)
    assert tuple(unlike) == UNLIKE

    def cases(name):
        return [
            {'workdir': str(folder / name / kind), 'fields': fields}
            for kind, fields in kinds.items()
        ]

    bad = [{'workdir': str(folder / 'bad' / name), **case} for name, (case, _) in unlike.items()]
    # One after the other, to share two cores and the compiled programs.
    with Job(folder / 'alone_job', 8, cases('alone')) as alone:
        (own,) = alone.reports()
    with Job(folder / 'pair_job', 4, [*cases('pair'), *bad], num_processes=2) as pair:
        shares = pair.reports()
    for each in (own, *shares):
        assert [report.get('error') for report in each[:2]] == [None, None]
    return {
        'alone': dict(zip(kinds, own, strict=True)),
        'pair': {kind: [share[i] for share in shares] for i, kind in enumerate(kinds)},
        'unlike': {
            name: ([share[2 + i].get('error') for share in shares], words)
            for i, (name, (_, words)) in enumerate(unlike.items())
        },
    }


def assert_close_runs(workdir, reference):
    """Compares the newest checkpoints and all records to 1e-10."""
    (state, step), (expected, expected_step) = saved_state(workdir), saved_state(reference)
    assert step == expected_step
    assert state.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(state[name], values, rtol=1e-10, atol=1e-10, err_msg=name)
    for record, other in zip(read_records(workdir), read_records(reference), strict=True):
        assert record.keys() == other.keys()
        for name, value in other.items():
            if isinstance(value, str) or value is None:
                assert record[name] == value
            else:
                np.testing.assert_allclose(record[name], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('kind', TEST_IMAGES)
def test_two_processes_of_four_devices_equal_one_of_eight(runs, folder, kind):
    assert_close_runs(folder / 'pair' / kind, folder / 'alone' / kind)
    assert len(read_records(folder / 'pair' / kind)) > 3


@pytest.mark.parametrize('kind', TEST_IMAGES)
def test_each_process_reads_its_own_part_of_a_batch(runs, kind):
    first, second = runs['pair'][kind]
    for step, whole in enumerate(runs['alone'][kind]['indices']):
        parts = first['indices'][step], second['indices'][step]
        assert [len(part) for part in parts] == [BATCH // 2] * 2
        assert not set(parts[0]) & set(parts[1])
        assert parts[0] + parts[1] == whole
    for share in (first, second):
        assert share['batch_shape'] == [BATCH // 2, 8, 8, 3]


@pytest.mark.parametrize('kind', TEST_IMAGES)
def test_evaluation_in_two_processes_counts_each_image_once(runs, folder, kind):
    """The last batch is not whole; accuracies are multiples of one image."""
    count = TEST_IMAGES[kind]
    assert count % SMALL['data.eval_batch_size']
    evaluations = [r for r in read_records(folder / 'pair' / kind) if r['split'] == 'test']
    for record in evaluations:
        hits = np.array([*record['branch_top1'], *record['branch_top5']]) * count / 100
        np.testing.assert_allclose(hits, np.round(hits), atol=1e-9)
    assert evaluations


@pytest.mark.parametrize('kind', TEST_IMAGES)
def test_process_0_alone_writes_records(runs, kind):
    first, second = (share['written'] for share in runs['pair'][kind])
    assert 'metrics.jsonl' in first
    # Orbax notes the arrays of each process.
    assert second
    assert all('/array_metadatas/process_1' in path for path in second)


@pytest.mark.parametrize('case', UNLIKE)
def test_processes_that_differ_end_with_one_line_each(runs, folder, case):
    messages, words = runs['unlike'][case]
    for message, expected in zip(messages, words, strict=True):
        assert len(message.splitlines()) == 1
        for word in expected:
            assert word in message
    assert not (folder / 'bad' / case).exists()


def test_run_saved_in_two_processes_resumes_in_one(runs, folder, tmp_path):
    assert jax.device_count() == 4
    workdir = cut_back(folder / 'pair/resident', 4, tmp_path / 'resumed')
    config = config_lib.default_config()
    config.update_from_flattened_dict(SMALL)
    with jax.enable_x64(True):
        train.train_and_evaluate(config, workdir)
    assert_close_runs(workdir, folder / 'alone/resident')


@contextlib.contextmanager
def started(workdir, *own_flags, num_processes=2):
    """A block with a process for each of `own_flags`, started as a user starts the run `SMALL`."""
    fields = [
        f'--config.{name}={str(value).lower() if isinstance(value, bool) else value}'
        for name, value in SMALL.items()
    ]
    config = '--config=configs/cifar10_resnet32.py'
    flags = [f'--coordinator_address=localhost:{free_port()}', f'--num_processes={num_processes}']
    flags += [f'--workdir={workdir}', '--connect_timeout=60', '--heartbeat_timeout=10']
    with contextlib.ExitStack() as stack:
        processes = []
        for index, own in enumerate(own_flags):
            command = [sys.executable, '-m', 'one_jax.main', config, *fields, *flags]
            process = subprocess.Popen(
                [*command, f'--process_id={index}', *own],
                cwd=REPOSITORY,
                env=environment(4),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.callback(process.communicate)
            stack.callback(process.kill)
            processes.append(process)
        yield processes


def wait_for_line(process, beginning):
    """Waits for a line of process 0: of its devices, then of its memory, before the first step."""
    line = ''
    while not line.startswith(beginning):
        line = process.stdout.readline()
        assert line, process.communicate()


def ends(processes):
    """Waits for the processes; returns the status of each, and its lines on stderr but records."""
    errors = [process.communicate(timeout=TIMEOUT)[1].splitlines() for process in processes]
    lines = [[line for line in text if not line.startswith(('step ', 'epoch '))] for text in errors]
    return [process.returncode for process in processes], lines


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ('number', 'statuses'), [(signal.SIGTERM, [143, 143]), (signal.SIGINT, [143, 130])]
)
def test_signal_to_one_of_two_processes_stops_both_and_they_resume(
    runs, folder, tmp_path, number, statuses
):
    """The first steps take longer than the news of the signal."""
    workdir = tmp_path / 'run'
    with started(workdir, [], []) as pair:
        wait_for_line(pair[0], 'memory')
        # Written when both have compiled: before, a signal ends its process.
        while not (workdir / 'config.json').exists():
            assert pair[0].poll() is None
        pair[1].send_signal(number)
        found, lines = ends(pair)
    assert found == statuses, lines
    _, step = saved_state(workdir)
    assert 1 <= step < SMALL['train.steps']
    names = ['SIGTERM', number.name]
    assert lines == [
        [f'stopped by {name} at step {step}, saved; the same command resumes'] for name in names
    ]
    with started(workdir, [], []) as pair:
        outputs = [process.communicate(timeout=TIMEOUT) for process in pair]
        assert [process.returncode for process in pair] == [0, 0], outputs
    assert f'resumes after step {step} of' in outputs[0][0]
    assert_close_runs(workdir, folder / 'pair/resident')


def test_second_ctrl_c_ends_both_processes_at_once(tmp_path):
    with started(tmp_path / 'run', [], []) as pair:
        wait_for_line(pair[0], 'memory')
        for process in pair:
            while process.poll() is None:  # Signals that arrive together count once.
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.1)
        statuses, lines = ends(pair)
    assert statuses[0] == 130
    assert lines[0] == ['stopped by SIGINT']
    # Process 1 may notice first that process 0 is gone.
    assert (statuses[1], lines[1]) == (130, ['stopped by SIGINT']) or (
        statuses[1] == 1 and len(lines[1]) == 1 and 'this process lost the others' in lines[1][0]
    )


def test_killed_process_ends_the_other_with_one_line(tmp_path):
    with started(tmp_path / 'run', [], []) as pair:
        wait_for_line(pair[0], '8 x cpu')
        pair[1].kill()
        (status, _), (lines, _) = ends(pair)
    assert (status, len(lines)) == (1, 1), lines
    assert lines[0].startswith('error: this process lost the others (')


ALIKE = r'process 1 has another command than process 0 \({}\): start all processes with the same'
NOT_FOUND = (
    'the processes of the run do not find each other .*: one is missing, or was started twice'
)
MISFITS = {
    'workdir': ([[], ['--workdir=runs/other']], ALIKE.format(r"workdir='.*other' and not .*run'")),
    'number': ([[], ['--num_processes=3']], ALIKE.format('num_processes=3 and not .*=2')),
    'missing': ([['--connect_timeout=5']], NOT_FOUND),
    'no coordinator': ([['--process_id=1', '--connect_timeout=5']], NOT_FOUND),
}


@pytest.mark.parametrize('case', MISFITS)
def test_processes_that_do_not_fit_end_with_one_line_each(tmp_path, case):
    own_flags, message = MISFITS[case]
    with started(tmp_path / 'run', *own_flags) as processes:
        statuses, lines = ends(processes)
    assert set(statuses) == {1}, lines
    for (line,) in lines:
        assert re.match(f'error: {message}', line), line
    assert list(tmp_path.iterdir()) == []
