"""Times cases in turns and computes the numbers of their table: see `benchmarks.train_step`."""

import dataclasses
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from one_jax import config as config_lib

# How the labels of cases with batches as in training, and of evaluations, end.
INPUT, EVALUATION = ' input', ', evaluation'
CLOCKS = {'wall': time.perf_counter, 'processor': time.process_time}


@dataclasses.dataclass(frozen=True)
class Chip:
    """The best that a device can do.

    Attributes:
      tflops: by `model.dtype`. JAX multiplies float32 in TF32 by default where the chip has it.
      bandwidth: of its memory, GB/s.
    """

    tflops: dict[str, float]
    bandwidth: float


_HOPPER = {'bfloat16': 989.0, 'float32': 495.0}
_AMPERE = {'bfloat16': 312.0, 'float32': 156.0}
# By JAX's name of the device, from NVIDIA's data sheets, without sparsity.
CHIPS = {
    'NVIDIA H100 80GB HBM3': Chip(_HOPPER, 3350.0),
    'NVIDIA H200': Chip(_HOPPER, 4800.0),
    'NVIDIA A100-SXM4-40GB': Chip(_AMPERE, 1555.0),
    'NVIDIA A100-SXM4-80GB': Chip(_AMPERE, 2039.0),
    'NVIDIA L4': Chip({'bfloat16': 121.0, 'float32': 60.0}, 300.0),
    # It has neither TF32 nor bfloat16.
    'Tesla V100-SXM2-16GB': Chip({'float32': 15.7}, 900.0),
}


def known_chip(device: jax.Device, peak_tflops: float, bandwidth: float) -> Chip | None:
    """Returns the limits of the device, from the flags or `CHIPS`; None if they are unknown."""
    known = CHIPS.get(device.device_kind)
    if not (peak_tflops or bandwidth):
        return known
    tflops = dict.fromkeys(config_lib.CHOICES['model.dtype'], peak_tflops) if peak_tflops else {}
    return Chip(
        tflops or (known.tflops if known else {}), bandwidth or (known.bandwidth if known else 0.0)
    )


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the cases of one table share."""

    network: str
    dtype: str
    batch_size: int
    steps_per_call: int = 1


@dataclasses.dataclass(eq=False)
class Case:
    """A line of a table: something that trains, timed in turns with the others.

    Attributes:
      label: of the line.
      advance: makes a number of steps, waits for them, and returns a loss.
      plain: the case whose time is 1 in the column 'ratio', if there is one.
      ours: the method's main case, for a case of PyTorch, of other input or of evaluation.
      facts: what is known without timing; 'failed' with the reason if the case cannot run.
      milliseconds: per step, in each round.
    """

    label: str
    advance: Callable[[int], Any] | None = None
    plain: 'Case | None' = None
    ours: 'Case | None' = None
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    milliseconds: list[float] = dataclasses.field(default_factory=list)


def time_in_turns(
    cases: Sequence[Case],
    rounds: int,
    steps: int,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Fills in `milliseconds` of the cases that work, in another order every round.

    The order matters by a few percent, because a case leaves its memory to the next.

    Args:
      cases: to time.
      rounds: how many.
      steps: of each case in each round.
      clock: one of `CLOCKS`.

    Raises:
      FloatingPointError: a loss is not finite.
    """
    working = [case for case in cases if case.advance is not None]
    for number in range(rounds):
        for case in random.Random(number).sample(working, len(working)):
            started = clock()
            loss = case.advance(steps)
            case.milliseconds.append(1000 * (clock() - started) / steps)
            if not math.isfinite(float(loss)):
                raise FloatingPointError(f'{case.label}: the loss is {float(loss)}')


def paired_ratio(case: Case, other: Case | None) -> float | None:
    """Returns the median over rounds of the ratio of two times, or None without timings."""
    if other is None or not (case.milliseconds and other.milliseconds):
        return None
    pairs = zip(case.milliseconds, other.milliseconds, strict=True)
    return statistics.median(time / other_time for time, other_time in pairs)


def measured_row(case: Case, setting: Setting, chip: Chip | None) -> dict[str, Any]:
    """Returns the numbers of a line; unknown ones are missing or None."""
    row = {**dataclasses.asdict(setting), 'case': case.label, **case.facts}
    if not case.milliseconds:
        return row
    milliseconds = statistics.median(case.milliseconds)
    row |= {
        'milliseconds': milliseconds,
        'rounds': case.milliseconds,
        'images_per_second': 1000 * setting.batch_size / milliseconds,
        'ratio': paired_ratio(case, case.plain),
    }
    if case.ours:
        slower = paired_ratio(case, case.ours)
        if case.label.endswith(EVALUATION):
            return {**row, 'of_a_step': slower}
        if case.label.endswith(INPUT):
            return {**row, 'input_percent': 100 * (slower - 1)}
        return {**row, 'ours_over_torch': 1 / slower}
    if case.plain:
        row['flops_ratio'] = case.facts['forward_flops'] / case.plain.facts['forward_flops']
    peak = chip.tflops.get(setting.dtype) if chip else None
    if peak:
        flops = 3 * setting.batch_size * case.facts['forward_flops']
        row['flops_floor'] = flops / peak / 1e9
        row['share_of_peak'] = row['flops_floor'] / milliseconds
    if chip and chip.bandwidth and case.facts['bytes_accessed']:
        row['bytes_floor'] = case.facts['bytes_accessed'] / chip.bandwidth / 1e6
    floors = [row[name] for name in ('flops_floor', 'bytes_floor') if name in row]
    return {**row, 'reached': max(floors) / milliseconds} if floors else row


def shown(row: dict[str, Any]) -> dict[str, str]:
    """Formats a line of the table."""

    def text(name: str, form: str, factor: float = 1.0) -> str:
        return '' if row.get(name) is None else format(factor * row[name], form)

    memory = text('allocated_bytes', ',.0f', 1e-6)
    if not memory and row.get('compiled_bytes'):
        memory = '~' + text('compiled_bytes', ',.0f', 1e-6)
    cells = {
        'case': row['case'],
        'ms/step': text('milliseconds', ',.2f') or f'failed: {row["failed"]}',
        'images/s': text('images_per_second', ',.0f'),
        'ratio': text('ratio', '.2f'),
        'FLOPs ratio': text('flops_ratio', '.2f'),
        'compile s': text('compile_seconds', '.1f'),
        'memory MB': memory,
        'FLOPs floor ms': text('flops_floor', '.3f'),
        'bytes floor ms': text('bytes_floor', '.3f'),
        'reached %': text('reached', '.1f', 100),
        'of peak %': text('share_of_peak', '.1f', 100),
        'input ms': text('input_milliseconds', '.2f'),
        'input %': text('input_percent', '+.1f'),
        'of a step': text('of_a_step', '.2f'),
        'ours / torch': text('ours_over_torch', '.2f'),
    }
    return cells
