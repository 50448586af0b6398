"""The benchmarks of the train step and of faults, on tiny settings."""

import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest
from command_helpers import REPOSITORY, TIMEOUT, environment

from benchmarks import timing, train_step
from one_jax.runtime import parallel

TINY = timing.Setting('resnet8', 'float32', 8)


def stage_multiply_adds(size, inputs, outputs):
    """Multiply-adds of the block of a stage of ResNet-8, with its shortcut if the width changes."""
    shortcut = inputs * outputs if inputs != outputs else 0
    return size**2 * (9 * inputs * outputs + 9 * outputs**2 + shortcut)


# Multiply-adds of ResNet-8 for 100 classes of 32x32 images, from the sizes of its layers.
TRUNK = 32**2 * 9 * 3 * 16 + stage_multiply_adds(32, 16, 16) + stage_multiply_adds(16, 16, 32)
BRANCH = stage_multiply_adds(8, 32, 64) + 64 * 100
# The linear layer of the gate, and the weighted sum of the branches' logits.
GATE = 32 * 3 + 3 * 100


def run(module, *flags):
    return subprocess.run(
        [sys.executable, '-m', f'benchmarks.{module}', *flags],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def test_train_step_benchmark_counts_the_flops_of_the_layers(tmp_path):
    output = tmp_path / 'rows.json'
    done = run(
        'train_step',
        '--networks=resnet8',
        '--methods=plain,one',
        '--dtypes=float32',
        '--batch_sizes=8',
        '--steps=4',
        '--rounds=2',
        '--input=host',
        '--peak_tflops=0.5',
        '--bandwidth=10',
        f'--output={output}',
    )
    assert done.returncode == 0, done.stderr
    rows = {row['case']: row for row in json.loads(output.read_text())['rows']}
    assert list(rows) == ['plain', 'plain, host input', 'one', 'one, host input']
    plain, one = rows['plain'], rows['one']
    assert plain['forward_flops'] == 2 * (TRUNK + BRANCH)
    assert one['forward_flops'] == pytest.approx(2 * (TRUNK + 3 * BRANCH + GATE), rel=1e-4)
    expected = (TRUNK + 3 * BRANCH + GATE) / (TRUNK + BRANCH)
    assert one['flops_ratio'] == pytest.approx(expected, rel=1e-4)
    assert plain['flops_floor'] == pytest.approx(3 * 8 * plain['forward_flops'] / 0.5e9)
    assert one['bytes_floor'] == pytest.approx(one['bytes_accessed'] / 10e6)
    assert one['compiled_bytes'] > plain['compiled_bytes'] > 0
    for row in rows.values():
        assert len(row['rounds']) == 2
        assert row['images_per_second'] == pytest.approx(8000 / row['milliseconds'])
    pairs = zip(one['rounds'], plain['rounds'], strict=True)
    assert one['ratio'] == pytest.approx(np.median([ours / base for ours, base in pairs]))
    pairs = zip(rows['one, host input']['rounds'], one['rounds'], strict=True)
    overhead = 100 * (np.median([host / ours for host, ours in pairs]) - 1)
    assert rows['one, host input']['input_percent'] == pytest.approx(overhead)
    assert rows['one, host input']['input_milliseconds'] > 0
    assert f'| one | {one["milliseconds"]:,.2f} |' in done.stdout


def test_train_step_benchmark_bad_flag_is_one_line():
    done = run('train_step', '--steps=5', '--rounds=2')
    assert done.returncode == 1
    assert done.stderr.startswith('error: --steps=5 is not allowed')
    assert done.stderr.count('\n') == 1


def test_train_step_cases_continue_from_the_state_of_the_step_before():
    mesh = parallel.make_mesh(jax.devices()[:1])
    cases = train_step.make_cases(['plain'], TINY, mesh, train_step.INPUTS, 1)
    others = ('', ', host input', ', device input', ', evaluation')
    assert [case.label for case in cases] == ['plain' + other for other in others]
    for case in cases:
        assert math.isfinite(float(case.advance(1)))
    case = cases[0]
    training = case.advance.func.__self__
    before = int(training.state.step)
    params = jax.device_get(training.state.params)
    loss = float(case.advance(3))
    assert math.isfinite(loss)
    assert int(training.state.step) == before + 3
    moved = jax.tree.map(
        lambda old, new: np.abs(old - new).max(), params, jax.device_get(training.state.params)
    )
    assert min(jax.tree.leaves(moved)) > 0
    assert float(case.advance(3)) != loss


def test_timing_takes_turns_and_a_nonfinite_loss_is_an_error():
    calls = []

    def make(label):
        def advance(steps):
            calls.append((label, steps))
            return 1.0

        return timing.Case(label, advance)

    cases = [make('a'), timing.Case('broken', facts={'failed': 'out of memory'}), make('b')]
    ticks = iter(range(100))
    timing.time_in_turns(cases, rounds=8, steps=5, clock=lambda: next(ticks))
    turns = [tuple(calls[start : start + 2]) for start in range(0, 16, 2)]
    assert set(turns) == {(('a', 5), ('b', 5)), (('b', 5), ('a', 5))}
    assert cases[0].milliseconds == [200.0] * 8
    assert cases[1].milliseconds == []
    cases[2].advance = lambda steps: float('nan')
    with pytest.raises(FloatingPointError, match='b: the loss is nan'):
        timing.time_in_turns(cases, rounds=1, steps=1)


def test_timing_rows_are_compared_with_the_main_case():
    plain = timing.Case('plain', milliseconds=[1.0, 2.0], facts={'forward_flops': 1})
    rows = {
        case.label: timing.measured_row(case, TINY, None)
        for case in (
            timing.Case('plain, evaluation', None, None, plain, {}, [0.25, 0.5]),
            timing.Case('plain, host input', None, None, plain, {}, [1.5, 3.0]),
            timing.Case('plain, torch eager', None, None, plain, {}, [2.0, 4.0]),
        )
    }
    assert rows['plain, evaluation']['of_a_step'] == pytest.approx(0.25)
    assert rows['plain, host input']['input_percent'] == pytest.approx(50)
    assert rows['plain, torch eager']['ours_over_torch'] == pytest.approx(0.5)


def test_timing_ratio_is_the_median_over_rounds():
    plain = timing.Case('plain', milliseconds=[1.0, 10.0, 2.0])
    one = timing.Case('one', milliseconds=[2.0, 15.0, 2.2], plain=plain)
    assert timing.paired_ratio(one, plain) == 1.5
    assert timing.paired_ratio(one, None) is None
    assert timing.paired_ratio(one, timing.Case('not timed')) is None


def test_torch_step_has_the_same_network_and_loss():
    torch = pytest.importorskip('torch')
    from benchmarks import torch_step

    # The counts of spec/one.md and of torchvision; ResNet-18 with two of four stages branched.
    for name, classes, branches, share, count in (
        ('resnet32', 100, 1, 2, 472_756),
        ('resnet32', 100, 3, 2, 1_193_189),
        ('resnet18', 1000, 1, 2, 11_689_512),
        ('resnet18', 1000, 3, 2, 33_702_785),
    ):
        with torch.device('meta'):
            network = torch_step.Network(name, classes, branches, share)
        assert sum(x.numel() for x in network.parameters()) == count, name

    # The fixture of the specification.
    logits = torch.tensor(
        [[[1, 2, 3], [0, 0, 0]], [[2, 0, 1], [1, -1, 0]], [[0, 1, 0], [-1, 2, 0.5]]]
    )
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3]])
    teacher = torch.einsum('bk,kbc->bc', weights, logits)
    loss = torch_step.loss_function(logits, teacher, torch.tensor([2, 0]))
    assert loss.item() == pytest.approx(5.869510, abs=1e-5)

    experiment, source = train_step.load_experiment('one', TINY)
    batch = next(iter(source.train_batches(8, 0).iterate(0)))
    training = torch_step.Training(experiment, [batch], compiled=False)
    losses = [training.advance(1) for _ in range(5)]
    assert losses[-1] < losses[0]


def test_faults_benchmark_of_a_few_kills_loses_nothing():
    done = run('faults', '--kills=4')
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith('4 kills in ')
    assert done.stdout.endswith('runs: all survived, nothing lost\n')
