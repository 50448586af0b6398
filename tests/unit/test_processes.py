"""How processes find each other and agree; here with one process, real pairs are in tests/slow."""

import contextlib
import itertools

import jax
import pytest

from one_jax.errors import ConfigError, UserError
from one_jax.runtime import processes


def test_initialize_flags_that_are_incomplete_or_out_of_range_are_an_error():
    with pytest.raises(UserError, match='process_id=None is not allowed: --coordinator_address'):
        processes.initialize('localhost:1', 2)
    with pytest.raises(ConfigError, match='process_id=2 is not allowed: 0 to 1'):
        processes.initialize('localhost:1', 2, 2)
    with pytest.raises(ConfigError, match='num_processes=0 is not allowed: at least 1'):
        processes.initialize('localhost:1', 0, 0)
    for address in ('localhost', 'localhost:', ':1', 'localhost:http', 'localhost:65536'):
        with pytest.raises(ConfigError, match=f"coordinator_address='{address}' .* host:port"):
            processes.initialize(address, 2, 1)


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
    monkeypatch.setattr(processes, '_handle_aborts', lambda: None)
    with pytest.raises(UserError, match=r'do not find each other \([^\n]*--distributed=false'):
        processes.initialize()


def test_processes_alone_agree_with_themselves():
    assert processes.is_first()
    assert processes.count() == 1
    assert processes.from_first(7) == 7
    processes.request_stop()
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


class Coordinator:
    """JAX's key-value store, in which the given processes have left their facts already."""

    def __init__(self, texts):
        self.entries = {f'one_jax/agreement/7/{i}': text for i, text in texts.items()}

    def key_value_set(self, key, value):
        self.entries[key] = value

    def blocking_key_value_get(self, key, milliseconds):
        if key not in self.entries:
            raise jax.errors.JaxRuntimeError(f'DEADLINE_EXCEEDED: {milliseconds}')
        return self.entries[key]


SAME = """{"config": "a=1\\nb=2"}"""
VERDICTS = {
    'equal': ({1: SAME, 2: SAME}, ''),
    'other line': ({1: SAME, 2: SAME.replace('b=2', 'b=3')}, 'process 2 has another config than'),
    'fewer lines': ({1: '{"config": "a=1"}', 2: SAME}, r'process 1 .*\(nothing and not b=2\)'),
    'no such fact': ({1: '{}', 2: SAME}, 'process 1 has another config'),
    'error': ({1: SAME, 2: 'null'}, 'process 2 cannot start: see its own message'),
    'missing': ({1: SAME}, 'process 2 has not started within 9 s'),
}


@pytest.mark.parametrize('case', VERDICTS)
def test_agreement_ends_with_one_verdict_for_all(monkeypatch, case):
    texts, message = VERDICTS[case]
    monkeypatch.setattr(processes._state, 'client', Coordinator(texts))
    monkeypatch.setattr(processes._state, 'num_processes', 3)
    monkeypatch.setattr(processes, '_numbers', itertools.repeat(7))
    outcome = pytest.raises(UserError, match=message) if message else contextlib.nullcontext()
    with outcome, processes.agreement(9) as facts:
        facts['config'] = {'a': 1, 'b': 2}
    # The others learn the same.
    monkeypatch.setattr(processes._state, 'process_id', 1)
    outcome = pytest.raises(UserError, match=message) if message else contextlib.nullcontext()
    with outcome, processes.agreement(9) as facts:
        facts['config'] = {'a': 1, 'b': 2}


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
