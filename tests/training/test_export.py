"""Exports of a trained run: every branch, the ensemble and the teacher score as in the run."""

import itertools
import shutil
from types import SimpleNamespace

import jax.export
import numpy as np
import pytest
from student_fixtures import generated_config

from one_jax import config as config_lib
from one_jax import data, methods, train
from one_jax.errors import ConfigError, UserError
from one_jax.models.backbone import Backbone
from one_jax.runtime import files
from one_jax.students import folder
from one_jax.students.evaluation import evaluate_students
from one_jax.students.student import load_student
from one_jax.training import saved, teachers
from one_jax.training.checkpoint import Checkpoints
from one_jax.training.export import Options, export_student

DEFAULT = Options()


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run of ONE with two heterogeneous branches and a gate, and the students in it."""
    directory = tmp_path_factory.mktemp('runs')
    fields = {'method.name': 'one', 'model.branch_networks': 'resnet8,resnet8@0.5'}
    config = generated_config(**{'data.generated_examples': 32, 'train.steps': 2, **fields})
    result = train.train_and_evaluate(config, directory / 'run')
    folders = {branch: directory / f'student-{branch}' for branch in (0, 1, 'ensemble', 'teacher')}
    students = {
        branch: export_student(directory / 'run', folder, branch)
        for branch, folder in folders.items()
    }
    workdir = directory / 'run'
    return SimpleNamespace(workdir=workdir, result=result, folders=folders, students=students)


def test_run_of_an_earlier_version_with_other_widths_is_an_error(run, tmp_path, monkeypatch):
    before = Backbone.scaled
    monkeypatch.setattr(Backbone, 'scaled', lambda self, channels: before(self, channels - 1))
    with pytest.raises(UserError, match=r"checkpoint 2 does not fit .*'resnet8@0.5'") as e:
        export_student(run.workdir, tmp_path / 'student')
    assert '\n' not in str(e.value)
    assert not (tmp_path / 'student').exists()
    with pytest.raises(UserError, match=r'weights do not fit the network: .* has shape'):
        load_student(run.folders[1])


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)


def test_students_score_as_in_the_run(run):
    """Of heterogeneous branches, their mean and the gated teacher."""
    result, students = run.result, run.students
    assert [students[branch].config['network'] for branch in (0, 1)] == ['resnet8', 'resnet8@0.5']
    parameters = {branch: student.config['parameters'] for branch, student in students.items()}
    assert [parameters[0], parameters[1]] == result['branch_parameters']
    assert parameters['ensemble'] == sum(result['branch_parameters'])
    assert parameters['teacher'] == result['parameters']
    record = evaluate_students(list(run.folders.values()))
    expected = {
        measure: [
            *result[f'branch_{measure}'],
            result[f'ensemble_{measure}'],
            result[f'teacher_{measure}'],
        ]
        for measure in ('top1', 'nll')
    }
    assert record['branch_top1'] == expected['top1']
    np.testing.assert_allclose(record['branch_nll'], expected['nll'], rtol=1e-4)
    assert len(set(record['branch_nll'])) == 4
    assert [s.config['metric']['top1'] for s in students.values()] == expected['top1']


def test_ensemble_is_the_mean_without_the_gate(run, images):
    first, second, ensemble, teacher = run.students.values()
    mean = (first(images) + second(images)) / 2
    np.testing.assert_allclose(ensemble(images), mean, rtol=1e-4, atol=1e-5)
    assert 'aggregator' in teacher.variables['params']
    assert 'aggregator' not in ensemble.variables['params']
    networks = ['resnet8', 'resnet8@0.5']
    expected = {'members': networks, 'share_stages': 0, 'share_stem': False}
    assert ensemble.config['ensemble'] == expected
    checks = ensemble.config['checks']
    assert (checks['split'], checks['num_images']) == ('test', 10)
    assert checks['top1'] == run.result['ensemble_top1']
    assert checks['formats'].keys() == {'student.safetensors', 'student.stablehlo'}
    assert all(check['same_argmax'] == 100 for check in checks['formats'].values())


def test_ensemble_may_teach(run):
    config = generated_config(**{'data.generated_examples': 32, 'method.name': 'kd'})
    config.method.teachers = str(run.folders['ensemble'])
    method = methods.create(config_lib.resolve(config))
    source = data.open(config.data)
    (teacher,) = teachers.load(method, source.spec, source.label_names)
    assert teacher.num_branches == 2


def test_small_student_is_read_back_as_it_was_checked(run, images, tmp_path, monkeypatch):
    monkeypatch.setattr(folder, 'BATCH_SIZES', (1, 2))
    options = Options(fold_batch_norm=True, weights='int8', latency=True)
    small, plain = export_student(run.workdir, tmp_path / 's', 0, options), run.students[0]
    sizes = [
        (folder / 'student.safetensors').stat().st_size
        for folder in (tmp_path / 's', run.folders[0])
    ]
    assert sizes[0] < 0.35 * sizes[1]
    assert small.config['batch_norm'] == 'folded'
    names = ('student.safetensors', 'student.stablehlo')
    timed = {*names, *(f'ensemble {name}' for name in names)}
    assert small.config['latency']['milliseconds'].keys() == timed
    # Each channel of the 9 convolutions has a bias in place of a scale and a bias.
    channels = 16 * 3 + 32 * 3 + 64 * 3
    assert small.config['parameters'] == plain.config['parameters'] - channels
    assert small.config['step'] == run.result['step'] == 2
    expected, actual = np.asarray(plain(images)), np.asarray(small(images))
    difference = np.abs(actual - expected).max()
    assert 1e-6 < difference < 0.1 * np.abs(expected).max()
    program = (tmp_path / 's/student.stablehlo').read_bytes()
    program = jax.export.deserialize(bytearray(program)).call
    np.testing.assert_allclose(program(images), actual, rtol=1e-4, atol=1e-5)


def test_missing_data_set_is_replaced_by_random_images(run, tmp_path, capsys):
    workdir = tmp_path / 'run'
    shutil.copytree(run.workdir, workdir)
    config = files.read_json(workdir / 'config.json')
    config['data'] |= {'generated_examples': 0, 'root': str(tmp_path / 'nothing')}
    files.write_json(workdir / 'config.json', config)
    with Checkpoints(workdir / 'checkpoints') as checkpoints:
        state, progress, step = checkpoints.read()
        checkpoints.save(step + 1, state, {**progress, 'config': config})
    student = export_student(workdir, tmp_path / 'student', 0)
    assert student.config['checks']['split'] == 'random'
    assert student.config['checks']['top1'] is None
    assert 'note: random images in place of the test images' in capsys.readouterr().out
    assert 'random images' in (tmp_path / 'student/README.md').read_text()
    # With --data_root, a missing data set is an error.
    options = Options(data_root=str(tmp_path / 'elsewhere'))
    with pytest.raises(UserError, match='elsewhere'):
        export_student(workdir, tmp_path / 'other', 0, options)
    assert not (tmp_path / 'other').exists()


def test_impossible_export_writes_nothing(run, tmp_path):
    def fails(words, branch=0, options=DEFAULT, workdir=run.workdir, output=tmp_path / 's'):
        with pytest.raises(UserError, match=words):
            export_student(workdir, output, branch, options)
        assert not (tmp_path / 's').exists()

    fails(r"weights='int4' is not allowed: one of 'float32'", options=Options(weights='int4'))
    fails(r"branch='2' is not allowed: 0 to 1", branch='2')
    fails('holds no run', workdir=tmp_path)
    (tmp_path / 'mine.txt').write_text('precious')
    fails('nothing is overwritten', output=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['mine.txt']


def test_checkpoint_that_the_run_deletes_while_it_is_read_is_read_again(run, monkeypatch):
    read, steps = Checkpoints.read, Checkpoints.steps
    found = iter([[1], [2], [2], [2]])
    monkeypatch.setattr(Checkpoints, 'steps', lambda self: next(found, None) or steps(self))
    outcomes = iter([FileNotFoundError('1/state'), None])

    def read_one(self):
        if error := next(outcomes):
            raise error
        return read(self)

    monkeypatch.setattr(Checkpoints, 'read', read_one)
    assert saved.load(run.workdir).step == 2
    # Nothing was deleted: the error is a fault of the checkpoint.
    monkeypatch.setattr(Checkpoints, 'steps', steps)
    monkeypatch.setattr(Checkpoints, 'read', lambda self: (self.directory / 'gone').read_bytes())
    with pytest.raises(FileNotFoundError):
        saved.load(run.workdir)
    counter = itertools.count()
    monkeypatch.setattr(Checkpoints, 'steps', lambda self: [next(counter)])
    with pytest.raises(UserError, match='the run deletes its checkpoints before they are read'):
        saved.load(run.workdir)


def test_evaluation_on_unsuitable_data_is_an_error(run):
    config = generated_config(**{'data.name': 'cifar100', 'data.image_size': 0})
    with pytest.raises(UserError, match="the data set 'cifar100'"):
        evaluate_students([run.folders[0]], config)
    config.data.eval_batch_size = 18
    with pytest.raises(ConfigError, match=r'data\.eval_batch_size=18 is not allowed'):
        evaluate_students([run.folders[0]], config)
