"""Any number of devices: the same run, in float64 with synchronised batch normalisation."""

import jax
import numpy as np
import pytest
from commands import final_state
from device_worker import SMALL, Job, cut_back, records
from student_fixtures import write_student

from one_jax import config as config_lib
from one_jax import train
from one_jax.data import datasets

STEPS = 5
METHODS = {
    'one': {},
    'dml': {},
    'okddip': {'model.num_branches': 3},
    'kd': {'model.num_branches': 1},
}
SAVED_AT = 4


def make_config():
    config = config_lib.default_config()
    config.update_from_flattened_dict(SMALL)
    return config


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """What one process of 8 devices has made: steps of the methods on 1 and on 8 of them, a whole
    run, and that run from its middle on with 1 and with 2."""
    folder = tmp_path_factory.mktemp('devices')
    data = datasets.load(make_config().data).spec
    cifar10 = config_lib.default_config()
    cifar10.data.name = 'cifar10'
    cifar10.data.generated_examples = 1
    normalisation = {'mean': data.mean, 'std': data.std}
    teacher = write_student(folder / 'teacher', cifar10, input_size=[8, 8], **normalisation)
    fields = {name: {**SMALL, 'method.name': name, **own} for name, own in METHODS.items()}
    fields['kd']['method.teachers'] = str(teacher)
    cases = [
        {
            'arrays': {number: str(folder / f'{name}-{number}.npz') for number in (1, 8)},
            'fields': fields[name],
            'steps': STEPS,
        }
        for name in METHODS
    ]
    cases.append({'workdir': str(folder / 'run8'), 'fields': SMALL})
    for number in (1, 2):
        saved = [str(folder / 'run8'), SAVED_AT]
        run = {'workdir': str(folder / f'resumed{number}'), 'copied_from': saved}
        cases.append({**run, 'fields': SMALL, 'num_devices': number})
    with Job(folder / 'job', 8, cases) as job:
        (reports,) = job.reports()
    assert [report.get('error') for report in reports] == [None] * len(cases)
    return folder


def load(folder, method, number):
    with np.load(folder / f'{method}-{number}.npz') as arrays:
        return dict(arrays)


@pytest.mark.parametrize('method', METHODS)
def test_the_step_is_the_same_on_one_device_and_on_eight(folder, method):
    alone, shared = load(folder, method, 1), load(folder, method, 8)
    assert alone.keys() == shared.keys()
    rounding = 1e-10
    for name, values in alone.items():
        np.testing.assert_allclose(shared[name], values, rtol=rounding, atol=rounding, err_msg=name)
    assert alone['step'] == STEPS
    parameters = [values for name, values in alone.items() if name.startswith('params')]
    assert {values.dtype for values in parameters} == {np.dtype(np.float64)}


@pytest.mark.parametrize('method', METHODS)
def test_the_gradient_is_the_mean_over_devices_and_not_their_sum(folder, method):
    """A `pmean` of what is summed already would make it 8 times as large."""
    alone, shared = load(folder, method, 1), load(folder, method, 8)
    for step in range(STEPS):
        norm = f'scalars.{step}.gradient_norm'
        assert alone[norm] > 0.1
        np.testing.assert_allclose(shared[norm] / alone[norm], 1, rtol=1e-10)


def assert_close_runs(workdir, reference):
    """The same state and the same records, to 1e-10."""
    (state, step), (expected, expected_step) = final_state(workdir), final_state(reference)
    assert step == expected_step
    assert state.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(state[name], values, rtol=1e-10, atol=1e-10, err_msg=name)
    assert_close_records(records(workdir), records(reference))


def assert_close_records(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            if isinstance(value, str) or value is None:
                assert one[name] == value
            else:
                np.testing.assert_allclose(one[name], value, rtol=1e-10, atol=1e-10, err_msg=name)


@pytest.mark.parametrize('number', [1, 2])
def test_saved_on_eight_devices_and_resumed_on_fewer(folder, number):
    assert final_state(folder / 'run8')[1] == SMALL['train.steps']
    assert_close_runs(folder / f'resumed{number}', folder / 'run8')


def test_saved_on_eight_devices_and_resumed_on_the_four_of_the_tests(folder, tmp_path):
    assert jax.device_count() == 4
    workdir = cut_back(folder / 'run8', SAVED_AT, tmp_path / 'resumed')
    with jax.enable_x64(True):
        result = train.train_and_evaluate(make_config(), workdir)
    assert result['num_devices'] == 4
    assert_close_runs(workdir, folder / 'run8')
