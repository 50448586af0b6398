"""Times a train step: every method beside the plain network, and beside PyTorch.

    python -m benchmarks.train_step [--networks=resnet32,resnet110,resnet18]
        [--methods=plain,branches,one,dml,okddip,mde] [--dtypes=float32,bfloat16]
        [--batch_sizes=128] [--steps=200] [--rounds=10] [--steps_per_call=1] [--input=host,device]
        [--evaluation] [--torch] [--clock=processor] [--peak_tflops=T] [--bandwidth=GB/S]
        [--output=FILE.json]

Prints one table for each network, precision and batch size, on one device. It times one_jax's own
train step on generated images, with batches that lie on the device. `--input` adds a row with
batches as in training: gathered on the 'host' and sent, or on the 'device' from the whole data set.
`--evaluation` adds a row that evaluates as many images. The cases take turns, some steps each per
round, and ratios are medians over the rounds, so that they hold on a busy machine. On cores that
others use, `--clock=processor` counts the processor time of all threads; PyTorch's threads spin
while they wait, so give it one core (`taskset -c 0`).

'branches' is the method `independent`, three branches that learn from the labels alone; the other
methods have their default branches. Columns:

- FLOPs ratio: of the traced forward passes, convolutions and matrix products.
- compile s: tracing, lowering and compiling, without a cache.
- memory: the peak of the device's allocator in the first step, the state included; '~' marks the
  compiler's number, if the allocator reports nothing or an earlier case used more.
- FLOPs floor: three times the forward pass (forward, gradients of inputs and of kernels) at the
  chip's peak. Bytes floor: operands and results of all kernels, as the compiler counts them after
  fusion, at the memory's bandwidth; caches can beat it.
- input ms: to gather and send the batch of a step. Input %: by how much the row is slower.
- of a step: the time of an evaluation over that of training on as many images.
- reached: the larger floor over the time. Of peak: the FLOPs floor over the time.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import itertools
import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from benchmarks import timing
from benchmarks.timing import Case, Setting
from one_jax import config as config_lib
from one_jax import data
from one_jax.data.table import DATASETS
from one_jax.errors import ConfigError, UserError
from one_jax.models import cost, resnet_imagenet
from one_jax.reporting.tables import markdown_table
from one_jax.runtime import cli, environment, files, parallel
from one_jax.training.compiled_step import CompiledStep
from one_jax.training.evaluation import Evaluator
from one_jax.training.experiment import Experiment, make_experiment
from one_jax.training.feed import Feed
from one_jax.training.step import make_initial_state

METHODS = {
    'plain': 'plain',
    'branches': 'independent',
    'one': 'one',
    'dml': 'dml',
    'okddip': 'okddip',
    'mde': 'mde',
}
# The methods of torch_step.py.
TORCH_METHODS = ('plain', 'one')
INPUTS = ('host', 'device')
# Different batches on the device, used in turn.
BATCHES_ON_DEVICE = 2
WARM_UP_CALLS = 3
INPUT_REPEATS = 20
# Of generated images; CIFAR's 50,000 fit.
DATA_BYTES = 200e6
# One epoch that does not end: no call is cut short.
ENDLESS = 10**6

Batch = dict[str, Any]

NETWORKS = flags.DEFINE_list('networks', ['resnet32', 'resnet110', 'resnet18'], 'Network names.')
METHOD_NAMES = flags.DEFINE_list('methods', list(METHODS), f'Some of {", ".join(METHODS)}.')
DTYPES = flags.DEFINE_list('dtypes', ['float32', 'bfloat16'], 'Values of model.dtype.')
BATCH_SIZES = flags.DEFINE_list('batch_sizes', ['128'], 'Images per step.')
STEPS = flags.DEFINE_integer('steps', 200, 'Timed steps of each case.', 1)
ROUNDS = flags.DEFINE_integer('rounds', 10, 'Rounds in which the cases take turns.', 1)
STEPS_PER_CALL = flags.DEFINE_integer('steps_per_call', 1, 'More than 1 is for accelerators.', 1)
INPUT = flags.DEFINE_list('input', [], f'Rows with the input of training: {", ".join(INPUTS)}.')
EVALUATION = flags.DEFINE_boolean('evaluation', False, 'A row of evaluating as many images.')
CLOCK = flags.DEFINE_enum('clock', 'wall', list(timing.CLOCKS), 'Processor time is for CPUs.')
TORCH = flags.DEFINE_boolean('torch', False, 'Whether to time PyTorch, too.')
TORCH_MODES = flags.DEFINE_list('torch_modes', ['eager', 'compile'], 'How PyTorch runs.')
PEAK = flags.DEFINE_float('peak_tflops', 0, 'Peak of the device; 0: as known.', 0)
BANDWIDTH = flags.DEFINE_float('bandwidth', 0, 'Memory bandwidth, GB/s; 0: as known.', 0)
OUTPUT = flags.DEFINE_string('output', '', 'A JSON file for all numbers.')


def load_experiment(
    method: str, setting: Setting, source: data.Source | None = None
) -> tuple[Experiment, data.Source]:
    """Builds an experiment on generated images, and the images unless `source` is given."""
    config = config_lib.default_config()
    imagenet = setting.network in resnet_imagenet.NETWORKS
    config.data.name = 'imagenet2012' if imagenet else 'cifar100'
    spec = DATASETS[config.data.name]
    needed = BATCHES_ON_DEVICE * setting.batch_size * setting.steps_per_call
    count = max(needed, int(DATA_BYTES / math.prod(spec.image_shape)))
    config.data.generated_examples = min(count, max(needed, spec.num_train))
    config.data.batch_size = config.data.eval_batch_size = setting.batch_size
    config.model.name, config.model.dtype = setting.network, setting.dtype
    config.method.name = METHODS[method]
    config.train.log_every = ENDLESS
    config_lib.validate(config)
    source = source or data.open(config.data)
    resolved = config_lib.resolve(config)
    return make_experiment(resolved, source.spec, source.label_names, ENDLESS), source


class Training:
    """The train step of an experiment, compiled and warm.

    Args:
      experiment: to train.
      mesh: of one device.
      batches: one for each call; two are used.
      steps_per_call: train steps in one call.

    Attributes:
      state: after the steps so far.
      facts: of the case: 'compile_seconds'; 'bytes_accessed' per step, by the compiler, or None if
        it is unknown (for several steps per call, it counts the loop once); 'compiled_bytes', the
        compiler's number for the memory; 'allocated_bytes', the allocator's for the first step, or
        None.
    """

    def __init__(
        self,
        experiment: Experiment,
        mesh: Mesh,
        batches: Iterator[Batch],
        steps_per_call: int = 1,
    ):
        first = list(itertools.islice(batches, BATCHES_ON_DEVICE))
        num_examples = len(first[0]['examples']['label']) if 'examples' in first[0] else 0
        self._steps_per_call = steps_per_call
        started = time.perf_counter()
        self._step = CompiledStep(experiment, mesh, steps_per_call, num_examples)
        compile_seconds = time.perf_counter() - started
        (program,) = self._step._programs.values()
        analysis = program.cost_analysis() or {}
        device = mesh.devices.flat[0]
        others = _allocated(device, 'bytes_in_use')
        self.state = make_initial_state(experiment, mesh)(np.uint32(0))
        self._start_anew = jax.jit(lambda state: state.replace(metrics=state.metrics.start_anew()))
        highest_before = _allocated(device, 'peak_bytes_in_use')
        self.advance(steps_per_call, iter(first))
        highest = _allocated(device, 'peak_bytes_in_use')
        self.facts = {
            'compile_seconds': compile_seconds,
            'bytes_accessed': analysis.get('bytes accessed') if steps_per_call == 1 else None,
            'compiled_bytes': self._step.memory.needed,
            'allocated_bytes': highest - others if highest > highest_before else None,
        }
        self.advance(WARM_UP_CALLS * steps_per_call, itertools.cycle(first))

    def advance(self, num_steps: int, batches: Iterator[Batch]) -> float:
        """Makes the steps, waits for the last, and returns their mean loss.

        Args:
          num_steps: a multiple of `steps_per_call`.
          batches: one for each call.
        """
        for _ in range(num_steps // self._steps_per_call):
            self.state = self._step(self.state, next(batches))
        loss = jax.device_get(self.state.metrics).means()['loss']
        self.state = self._start_anew(self.state)
        jax.block_until_ready(self.state)
        return loss


def _allocated(device: jax.Device, name: str) -> int:
    """Reads the device's allocator; 0 if it reports nothing."""
    return (device.memory_stats() or {}).get(name, 0)


def fed_batches(
    experiment: Experiment,
    source: data.Source,
    mesh: Mesh,
    steps_per_call: int = 1,
    place: str = 'host',
) -> Iterator[Batch]:
    """Yields batches as in training, from one of `INPUTS`."""
    batches = source.train_batches(experiment.config.data.batch_size, experiment.config.seed)
    examples = source.examples('train') if place == 'device' else None
    for _, batch in Feed(experiment, batches, mesh, steps_per_call, 0, examples):
        yield batch


def input_milliseconds(batches: Iterator[Batch]) -> float:
    """Returns the median time to gather and send a batch."""
    seconds = []
    for _ in range(INPUT_REPEATS):
        started = time.perf_counter()
        jax.block_until_ready(next(batches))
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds)


def make_case(
    label: str,
    experiment: Experiment,
    setting: Setting,
    mesh: Mesh,
    batches: Iterator[Batch],
    ours: Case | None = None,
) -> Case:
    """Returns a compiled, warm case of one_jax, or one that failed for lack of memory."""
    case = Case(label, ours=ours)
    try:
        training = Training(experiment, mesh, batches, setting.steps_per_call)
    except (ConfigError, jax.errors.JaxRuntimeError) as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        case.facts['failed'] = 'out of memory'
        return case
    case.advance = functools.partial(training.advance, batches=batches)
    case.facts |= training.facts
    return case


def evaluation_case(
    case: Case, experiment: Experiment, source: data.Source, mesh: Mesh, steps: int
) -> Case:
    """Returns a case that evaluates as many images as `steps` steps of `case` train on."""
    images = source.examples('train').take(slice(0, steps * experiment.config.data.batch_size))
    source = dataclasses.replace(source, splits={'test': images})
    evaluator = Evaluator(experiment.config, experiment.method, experiment.network, source, mesh)
    variables = make_initial_state(experiment, mesh)(np.uint32(0)).evaluated_variables

    def advance(steps: int) -> float:
        del steps  # Always all images.
        return evaluator(variables, 'test')['deployed_nll']

    advance(steps)
    return Case(case.label + timing.EVALUATION, advance, ours=case)


def make_cases(
    methods: Sequence[str],
    setting: Setting,
    mesh: Mesh,
    inputs: Sequence[str] = (),
    evaluated_steps: int = 0,
) -> list[Case]:
    """Returns one_jax's cases of a table, compiled and warm.

    Args:
      methods: names of `METHODS`.
      setting: of the table.
      mesh: of one device.
      inputs: some of `INPUTS`; each adds a case to every method.
      evaluated_steps: steps per round, for a case of evaluation; 0 for none.
    """
    source, on_device, cases = None, None, []
    for method in methods:
        experiment, source = load_experiment(method, setting, source)
        feed = functools.partial(fed_batches, experiment, source, mesh, setting.steps_per_call)
        on_device = on_device or list(itertools.islice(feed(), BATCHES_ON_DEVICE))
        case = make_case(method, experiment, setting, mesh, itertools.cycle(on_device))
        flops = cost.forward_cost(experiment.network, experiment.spec.image_shape)[1]
        case.facts['forward_flops'] = flops
        cases.append(case)
        for place in inputs:
            label, fed = f'{method}, {place}{timing.INPUT}', feed(place)
            other = make_case(label, experiment, setting, mesh, fed, case)
            other.facts['input_milliseconds'] = input_milliseconds(fed) / setting.steps_per_call
            cases.append(other)
        if evaluated_steps:
            cases.append(evaluation_case(case, experiment, source, mesh, evaluated_steps))
    plain = next((case for case in cases if case.label == 'plain'), None)
    for case in cases:
        if case.ours is None:
            case.plain = plain
    return cases


def make_torch_cases(ours: Sequence[Case], setting: Setting, modes: Sequence[str]) -> list[Case]:
    """Returns PyTorch's cases of a table, warm; 'failed' is set in those that do not work.

    Args:
      ours: one_jax's cases, with which they are compared.
      setting: of the table.
      modes: values of --torch_modes.
    """
    # Imported late: it takes seconds, and one_jax does without it.
    from benchmarks import torch_step

    source, cases = None, []
    for mode in modes:
        plain = None
        for mine in ours:
            if mine.label not in TORCH_METHODS or mine.advance is None:
                continue
            experiment, source = load_experiment(mine.label, setting, source)
            batches = source.train_batches(setting.batch_size, 0).iterate(0)
            case = Case(f'{mine.label}, torch {mode}', None, plain, mine)
            plain = case if mine.label == 'plain' else plain
            cases.append(case)
            try:
                first = list(itertools.islice(batches, BATCHES_ON_DEVICE))
                training = torch_step.Training(experiment, first, compiled=mode == 'compile')
                training.advance(WARM_UP_CALLS)
            except Exception as error:  # whatever PyTorch's compiler cannot do
                case.facts['failed'] = type(error).__name__
                continue
            case.advance = training.advance
    return cases


def measure(
    setting: Setting, mesh: Mesh, chip: timing.Chip | None, rounds: int, steps: int
) -> list[dict[str, Any]]:
    """Prints one table and returns its numbers.

    Args:
      setting: of the table.
      mesh: of one device.
      chip: limits of the device, or None.
      rounds: in which the cases are timed.
      steps: of a case, in all rounds together.
    """
    evaluated_steps = steps // rounds if EVALUATION.value else 0
    cases = make_cases(METHOD_NAMES.value, setting, mesh, INPUT.value, evaluated_steps)
    if TORCH.value:
        cases += make_torch_cases(cases, setting, TORCH_MODES.value)
    load = os.getloadavg()[0]
    timing.time_in_turns(cases, rounds, steps // rounds, timing.CLOCKS[CLOCK.value])
    rows = [{**timing.measured_row(case, setting, chip), 'clock': CLOCK.value} for case in cases]
    lines = [timing.shown(row) for row in rows]
    columns = [name for name in lines[0] if any(line[name] for line in lines)]
    print(
        f'{setting.network}, {setting.dtype}, batch {setting.batch_size}: {steps} steps in '
        f'{rounds} rounds, {CLOCK.value} time, load {load:.1f} before and '
        f'{os.getloadavg()[0]:.1f} after\n\n{markdown_table(lines, columns)}\n',
        flush=True,
    )
    return rows


def _check_flags() -> None:
    for flag, given, known in (
        ('methods', METHOD_NAMES.value, METHODS),
        ('input', INPUT.value, INPUTS),
    ):
        if unknown := set(given) - set(known):
            raise UserError(f'--{flag}={unknown.pop()!r} is not one of {", ".join(known)}')
    if STEPS.value % (ROUNDS.value * STEPS_PER_CALL.value):
        raise UserError(
            f'--steps={STEPS.value} is not allowed: a multiple of --rounds={ROUNDS.value} times '
            f'--steps_per_call={STEPS_PER_CALL.value}'
        )
    if TORCH.value and not importlib.util.find_spec('torch'):
        raise UserError("--torch requires PyTorch: pip install --editable '.[torch]'")


def main() -> None:
    """Prints a table for each combination, and writes all numbers."""
    _check_flags()
    # Compile times are of compilation.
    jax.config.update('jax_enable_compilation_cache', False)
    if TORCH.value:
        # JAX would take most of a GPU's memory at once.
        os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'
    device = jax.local_devices()[0]
    mesh = parallel.make_mesh([device])
    chip = timing.known_chip(device, PEAK.value, BANDWIDTH.value)
    versions = environment.versions()
    if TORCH.value:
        versions['torch'] = importlib.metadata.version('torch')
    device_name = environment.device_name()
    print(f'{device_name}, {", ".join(f"{name} {v}" for name, v in versions.items())}\n')
    result = {'device': device_name, 'versions': versions, 'rows': []}
    combinations = itertools.product(NETWORKS.value, DTYPES.value, map(int, BATCH_SIZES.value))
    for network, dtype, batch_size in combinations:
        setting = Setting(network, dtype, batch_size, STEPS_PER_CALL.value)
        result['rows'] += measure(setting, mesh, chip, ROUNDS.value, STEPS.value)
        if OUTPUT.value:
            files.write_json(Path(OUTPUT.value), result)


if __name__ == '__main__':
    cli.run(main)
