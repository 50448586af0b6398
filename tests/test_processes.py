"""Several processes: how they start, and two real ones of four devices each on this machine."""

import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from commands import REPOSITORY, final_state
from device_worker import SMALL, TIMEOUT, Job, cut_back, environment, free_port, records
from PIL import Image
from student_fixtures import write_student
from test_devices import SAVED_AT, assert_close_runs, make_config

from one_jax import config as config_lib
from one_jax import processes, train
from one_jax.errors import ConfigError, UserError

BATCH, TEST_IMAGES = SMALL['data.batch_size'], {'resident': 17, 'streamed': 11}


def test_three_flags_go_together():
    with pytest.raises(UserError, match='--process_id is missing'):
        processes.initialize('localhost:1', 2)
    with pytest.raises(ConfigError, match='process_id=2 is not allowed: 0 to 1'):
        processes.initialize('localhost:1', 2, 2)


def test_one_process_waits_for_nobody(monkeypatch):
    """Not even as one of the tasks of a cluster's job, if it is told so or the job is its own."""
    monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '1')
    processes.initialize()
    monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '4')
    processes.initialize(distributed=False)
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('SLURM_STEP_NUM_TASKS', '4'),
        ('OMPI_COMM_WORLD_SIZE', '2'),
        ('TPU_WORKER_HOSTNAMES', 'host0,host1'),
    ],
)
def test_a_cluster_that_does_not_say_where_the_others_are(monkeypatch, name, value):
    """JAX is asked to join them, and its answer is one line."""
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r'do not find each other \([^\n]*--distributed=false'):
        processes.initialize()


def test_alone_everything_is_agreed():
    assert processes.is_first()
    assert processes.from_first(7) == 7
    assert processes.stop_signals() == (signal.SIGTERM, signal.SIGINT)
    assert processes.stop_agreed(3, True)
    assert not processes.stop_agreed(3, False)
    processes.wait_for_all('name')
    with processes.first_alone('name'):
        processes.agree({'config': 'a'})
    error = UserError('mine')
    with pytest.raises(UserError) as raised:
        processes.agree({'config': 'a'}, error)
    assert raised.value is error


def write_images(root, seed=0):
    """Two classes of JPEGs: 36 for training, 11 for testing."""
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


def refusals(folder):
    """Runs in which process 1 is not like process 0, and what each of the two says."""
    kd = {**SMALL, 'method.name': 'kd', 'model.num_branches': 1, 'data.name': 'cifar10'}
    config = config_lib.default_config()
    config.update_from_flattened_dict(kd)
    teachers = [str(write_student(folder / f'teacher{n}', config, n)) for n in range(2)]
    kd['method.teachers'] = teachers[0]
    others = [write_images(folder / f'images{seed}', seed) for seed in range(2)]
    alike = 'start all processes with the same command, data and version'
    cannot_start = ['process 1 cannot start: its own message says why']

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
            both('process 1 has another student than process 0', 'teacher 0='),
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
            (cannot_start, ['data.root=', 'nowhere', 'has no folder train']),
        ),
        'missing teacher': (
            {'fields': kd, 'own_fields': {1: {'method.teachers': str(folder / 'nowhere')}}},
            (cannot_start, ['method.teachers=', 'nowhere', 'holds no student']),
        ),
    }


REFUSALS = ('config', 'data', 'version', 'teacher', 'bad field', 'missing data', 'missing teacher')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('processes')


@pytest.fixture(scope='module')
def runs(folder):
    """What one process of 8 devices, and the two of a pair of 4 each, say of the same two runs;
    and what the pair says of runs that are refused, with what it should say."""
    streamed = folder_fields(
        write_images(folder / 'streamed'), **{'data.stream': True, 'train.steps': 3}
    )
    kinds = {'resident': SMALL, 'streamed': streamed}
    refused = refusals(folder)
    assert tuple(refused) == REFUSALS

    def cases(name):
        return [
            {'workdir': str(folder / name / kind), 'fields': fields}
            for kind, fields in kinds.items()
        ]

    bad = [
        {'workdir': str(folder / 'refused' / name), **given} for name, (given, _) in refused.items()
    ]
    with (
        Job(folder / 'pair_job', 4, [*cases('pair'), *bad], num_processes=2) as pair,
        Job(folder / 'alone_job', 8, cases('alone')) as alone,
    ):
        (own,), shares = alone.reports(), pair.reports()
    assert [[report.get('error') for report in each[:2]] for each in (own, *shares)] == [
        [None, None]
    ] * 3
    return {
        'alone': dict(zip(kinds, own, strict=True)),
        'pair': {kind: [share[i] for share in shares] for i, kind in enumerate(kinds)},
        'refused': {
            name: ([share[2 + i].get('error') for share in shares], words)
            for i, (name, (_, words)) in enumerate(refused.items())
        },
    }


@pytest.mark.parametrize('kind', TEST_IMAGES)
def test_two_processes_of_four_devices_are_one_of_eight(runs, folder, kind):
    """Parameters, statistics, optimiser state and all records."""
    assert_close_runs(folder / 'pair' / kind, folder / 'alone' / kind)
    assert len(records(folder / 'pair' / kind)) > 3


@pytest.mark.parametrize('kind', TEST_IMAGES)
def test_every_process_reads_its_own_part_of_each_batch(runs, kind):
    first, second = runs['pair'][kind]
    for step, whole in enumerate(runs['alone'][kind]['indices']):
        parts = first['indices'][step], second['indices'][step]
        assert [len(part) for part in parts] == [BATCH // 2] * 2
        assert not set(parts[0]) & set(parts[1])
        assert parts[0] + parts[1] == whole
    for share in (first, second):
        assert share['batch_shape'] == [BATCH // 2, 8, 8, 3]


@pytest.mark.parametrize('kind', TEST_IMAGES)
def test_each_test_image_counts_once(runs, folder, kind):
    """The last batch is not whole: accuracies are multiples of one image, of all of them."""
    count = TEST_IMAGES[kind]
    assert count % SMALL['data.eval_batch_size']
    evaluations = [r for r in records(folder / 'pair' / kind) if r['split'] == 'test']
    for record in evaluations:
        hits = np.array([*record['branch_top1'], *record['branch_top5']]) * count / 100
        np.testing.assert_allclose(hits, np.round(hits), atol=1e-9)
    assert evaluations


@pytest.mark.parametrize('kind', TEST_IMAGES)
def test_process_0_alone_writes_the_records(runs, kind):
    first, second = (share['written'] for share in runs['pair'][kind])
    assert 'metrics.jsonl' in first
    # Orbax keeps a note of each process's arrays beside them.
    assert second
    assert all('/array_metadatas/process_1' in path for path in second)


@pytest.mark.parametrize('case', REFUSALS)
def test_processes_that_are_not_alike_stop(runs, folder, case):
    messages, words = runs['refused'][case]
    for message, expected in zip(messages, words, strict=True):
        assert len(message.splitlines()) == 1
        for word in expected:
            assert word in message
    assert not (folder / 'refused' / case).exists()


def test_saved_in_two_processes_and_resumed_in_one(runs, folder, tmp_path):
    assert jax.device_count() == 4
    workdir = cut_back(folder / 'pair/resident', SAVED_AT, tmp_path / 'resumed')
    with jax.enable_x64(True):
        train.train_and_evaluate(make_config(), workdir)
    assert_close_runs(workdir, folder / 'alone/resident')


def start_pair(workdir):
    """Both processes of the run `SMALL`, as a user starts them."""
    fields = [
        f'--config.{name}={str(value).lower() if isinstance(value, bool) else value}'
        for name, value in SMALL.items()
    ]
    port = free_port()
    config = '--config=configs/cifar10_resnet32.py'
    pair = [f'--coordinator_address=localhost:{port}', '--num_processes=2']
    command = [sys.executable, '-m', 'one_jax.main', config, *fields, *pair]
    return [
        subprocess.Popen(
            [*command, f'--workdir={workdir}', f'--process_id={index}'],
            cwd=REPOSITORY,
            env=environment(4),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]


@pytest.mark.end_to_end
def test_sigterm_to_one_of_two_processes_stops_both_and_loses_nothing(runs, folder, tmp_path):
    workdir = tmp_path / 'run'
    pair = start_pair(workdir)
    try:
        # The first steps are next, which take longer than the news of the signal.
        deadline = time.monotonic() + TIMEOUT
        while not (workdir / 'config.json').exists() and time.monotonic() < deadline:
            os.sched_yield()
        pair[1].send_signal(signal.SIGTERM)
        errors = [process.communicate(timeout=TIMEOUT)[1] for process in pair]
        assert [process.returncode for process in pair] == [143, 143], errors
        last_lines = {text.splitlines()[-1] for text in errors}
        _, step = final_state(workdir)
        assert 1 <= step < SMALL['train.steps']
        assert last_lines == {f'stopped by SIGTERM at step {step}, saved; the same command goes on'}
        pair = start_pair(workdir)
        outputs = [process.communicate(timeout=TIMEOUT) for process in pair]
        assert [process.returncode for process in pair] == [0, 0], outputs
    finally:
        for process in pair:
            process.kill()
    assert f'resumes after step {step} of' in outputs[0][0]
    assert_close_runs(workdir, folder / 'pair/resident')
