"""How processes find each other and agree; here with one process, real pairs are in tests/slow."""

import signal

import jax
import pytest

from one_jax.errors import ConfigError, UserError
from one_jax.runtime import processes


def test_initialize_flags_that_are_incomplete_or_out_of_range_are_an_error():
    with pytest.raises(UserError, match='process_id=None is not allowed: --coordinator_address'):
        processes.initialize('localhost:1', 2)
    with pytest.raises(ConfigError, match='process_id=2 is not allowed: 0 to 1'):
        processes.initialize('localhost:1', 2, 2)


def test_initialize_single_process_connects_to_nobody(monkeypatch):
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
def test_initialize_on_a_cluster_that_jax_cannot_read_is_one_line(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r'do not find each other \([^\n]*--distributed=false'):
        processes.initialize()


def test_processes_alone_agree_with_themselves():
    assert processes.is_first()
    assert processes.from_first(7) == 7
    assert processes.stop_signals() == (signal.SIGTERM, signal.SIGINT)
    assert processes.stop_agreed(3, True)
    assert not processes.stop_agreed(3, False)
    processes.wait_for_all('name')


def test_agreement_alone_calls_no_fact_and_keeps_the_error():
    def never():
        raise AssertionError('a fact was computed')

    with processes.agreement() as facts:
        facts['data set'] = never
    error = UserError('mine')
    with pytest.raises(UserError) as raised, processes.agreement():
        raise error
    assert raised.value is error


@pytest.mark.parametrize('first', [True, False])
def test_first_alone_releases_the_others_when_the_block_raises(monkeypatch, first):
    """Process 0 waits for the others after its block, the others before theirs: once each."""
    events = []
    monkeypatch.setattr(processes, 'is_first', lambda: first)
    monkeypatch.setattr(processes, 'wait_for_all', lambda name: events.append(f'wait {name}'))

    def fail():
        events.append('block')
        raise UserError('disk')

    with pytest.raises(UserError, match='disk'), processes.first_alone('data'):
        fail()
    assert events == (['block', 'wait data'] if first else ['wait data', 'block'])
