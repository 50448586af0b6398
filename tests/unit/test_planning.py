"""What a plan prints, and the search for the largest batch; tests/slow compiles for real TPUs."""

import json

import pytest

from one_jax.runtime import topology
from one_jax.training.compiled_step import Memory
from one_jax.training.planning import Plan, largest_batch

CYCLES = {
    ('trunk', 'forward'): 1_000_000,
    ('heads', 'forward'): 2_000_000,
    ('heads', 'backward'): 6_000_000,
}


def make_plan(**fields):
    values = {
        'parameters': 1_193_189,
        'student_parameters': 472_756,
        'flops': 228_500_000,
        'student_flops': 138_300_000,
        'num_devices': 8,
        'batch_size': 128,
        'total_steps': 4000,
        'epochs': 10.0,
        'memory': Memory(10**6, 0, 10**6, 0, 10**8, 16 * 2**30),
        'all_reduces': 1,
        'all_reduce_bytes': 5_000_000,
        'cycles': CYCLES,
        'step_flops': 197e9,
        'step_bytes': 819e6,
        'chip': topology.CHIPS['v5e'],
    }
    return Plan(**{**values, **fields})


def test_plan_prints_estimates_of_the_compiler_with_their_floors():
    # 9 million cycles at 1.5 GHz take 6 ms.
    assert str(make_plan()).splitlines() == [
        '1,193,189 parameters, 0.229 GFLOPs in training; 472,756 parameters, 0.138 GFLOPs deployed',
        '4,000 steps of 128 images, 10 epochs, on 8 devices; 1 all-reduce of 5.0 MB per step',
        'memory per device: 0.10 GB (state 1.0 MB, batch 1.0 MB, temporaries 0.10 GB) of 17.18 GB',
        'estimated cycles per step: 9.00 M (forward + backward: heads 2.00 + 6.00, trunk 1.00)',
        'estimated time per step: 6.00 ms without communication; at least 1.00 ms for its FLOPs '
        'and 1.00 ms for its bytes',
        'estimated speed: 2,667 images/s per device, 21,333 in all; 0.01 hours of training steps',
    ]


def test_plan_without_estimates_prints_none():
    plan = make_plan(cycles={}, chip=None)
    assert plan.step_seconds is None
    assert 'estimated' not in str(plan)


def test_plan_as_json_has_every_number():
    fields = json.loads(json.dumps(make_plan().as_dict()))
    assert fields['cycles'] == {'trunk forward': 10**6, 'heads forward': 2 * 10**6} | {
        'heads backward': 6 * 10**6
    }
    assert fields['memory']['needed'] == 102_000_000
    assert fields['step_seconds'] == pytest.approx(0.006)


@pytest.mark.parametrize('limit', [0, 1, 7, 100, 1000, 4096])
def test_largest_batch_is_within_an_eighth_and_fits(limit):
    asked = []

    def fits(size):
        asked.append(size)
        return size <= 4 * limit

    found = largest_batch(fits, 4)
    assert found % 4 == 0
    assert found <= 4 * limit <= found + max(4, found // 8)
    assert len(set(asked)) == len(asked) < 20
