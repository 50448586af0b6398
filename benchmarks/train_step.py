"""Milliseconds of a train step: every method beside the plain network, and beside PyTorch.

    python -m benchmarks.train_step [--networks=resnet32,resnet110,resnet18]
        [--methods=plain,branches,one,dml,okddip,mde] [--dtypes=float32,bfloat16]
        [--batch_sizes=128] [--steps=200] [--rounds=10] [--steps_per_call=1] [--input=host,device]
        [--seeds=5] [--evaluation] [--torch] [--clock=processor] [--peak_tflops=T]
        [--bandwidth=GB/S] [--output=FILE.json]

One table for each network, precision and batch size; one device. It is the project's own train
step, on generated images of the network's data set, from batches that lie on the device. With
`--input` each method has a row more with its batches as in training: gathered on the 'host' and
sent, or on the 'device' out of the whole data set. With `--seeds` it has one with so many seeds at
once, with `--evaluation` one of evaluating as many images in place of training on them. The
cases of a table are timed in turns, some steps each a round, so that ratios hold on a busy machine:
a ratio is the median over the rounds of two times of the same round. Without an accelerator, on
cores that others use, `--clock=processor` takes the processor time of all threads in place of the
time on the clock; PyTorch's threads spin while they wait, so let it have one core (`taskset -c 0`).

'branches' are three branches that learn from the labels alone (the method `independent`); the
others have their method's own number of members. Columns:

- FLOPs ratio: of the traced forward passes, convolutions and matrix products.
- compile s: tracing, lowering and compiling, with no cache of earlier runs.
- memory: the most that the device's allocator had at a time in the first step, the case's state
  included; where the device does not tell, or an earlier case had more, the compiler's number for
  the program with its arguments ('~' before it).
- FLOPs floor: 3 times the forward pass (forward, gradients of inputs and of kernels) at the chip's
  peak. Bytes floor: the operands and results of all of the program's kernels, as the compiler
  counts them after fusion, at the memory's bandwidth; what stays in caches can beat it.
- input ms: what a step is given, gathered, sent and waited for, alone. Input %: what the row takes
  longer.
- of a step: the time of an evaluation over that of training on as many images.
- to runs apart: the time of a step of all seeds over that of as many steps of one.
- reached: the larger floor over the time. Of peak: the FLOPs floor over the time.
"""

import collections
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
from one_jax import command, device_memory, evaluate, feed, parallel, seeds, workdir
from one_jax import config as config_lib
from one_jax.analysis.tables import markdown_table
from one_jax.data import datasets
from one_jax.data.table import DATASETS
from one_jax.errors import UserError
from one_jax.models import cost, resnet_imagenet
from one_jax.readback import MAX_CALLS_IN_FLIGHT
from one_jax.recipe import Recipe, make_recipe
from one_jax.train_step import make_train_step

METHODS = {
    'plain': 'plain',
    'branches': 'independent',
    'one': 'one',
    'dml': 'dml',
    'okddip': 'okddip',
    'mde': 'mde',
}
# What PyTorch trains too, see torch_step.py.
TORCH_METHODS = ('plain', 'one')
# As many different batches lie on the device, one after the other.
BATCHES_ON_DEVICE = 2
WARM_UP_CALLS = 3
INPUT_REPEATS = 20
# Of generated images; CIFAR's 50,000 fit.
DATA_BYTES = 200e6

INPUTS = ('host', 'device')

Batch = dict[str, Any]

NETWORKS = flags.DEFINE_list(
    'networks', ['resnet32', 'resnet110', 'resnet18'], 'Of one_jax.models.'
)
METHOD_NAMES = flags.DEFINE_list('methods', list(METHODS), f'Of {", ".join(METHODS)}.')
DTYPES = flags.DEFINE_list('dtypes', ['float32', 'bfloat16'], 'Values of model.dtype.')
BATCH_SIZES = flags.DEFINE_list('batch_sizes', ['128'], 'Images a step.')
STEPS = flags.DEFINE_integer('steps', 200, 'Timed steps of each case.', 1)
ROUNDS = flags.DEFINE_integer('rounds', 10, 'In which the cases take turns.', 1)
STEPS_PER_CALL = flags.DEFINE_integer('steps_per_call', 1, 'Above 1 is for accelerators.', 1)
INPUT = flags.DEFINE_list('input', [], f'Rows with the input of training: {", ".join(INPUTS)}.')
EVALUATION = flags.DEFINE_boolean('evaluation', False, 'A row of evaluating as many images.')
SEEDS = flags.DEFINE_integer('seeds', 0, 'A row of so many seeds at once; 0: none.', 0)
CLOCK = flags.DEFINE_enum('clock', 'wall', list(timing.CLOCKS), 'Processor time is for CPUs alone.')
TORCH = flags.DEFINE_boolean('torch', False, 'Time PyTorch, too.')
TORCH_MODES = flags.DEFINE_list('torch_modes', ['eager', 'compile'], 'How PyTorch runs.')
PEAK = flags.DEFINE_float('peak_tflops', 0, 'Of the device; 0: as known.', 0)
BANDWIDTH = flags.DEFINE_float('bandwidth', 0, "Of the device's memory, GB/s; 0: as known.", 0)
OUTPUT = flags.DEFINE_string('output', '', 'The JSON file to write.')


def load_recipe(method: str, setting: Setting, data: datasets.Dataset | None = None) -> tuple:
    """The recipe of a method of `METHODS` on generated images, and the images.

    Args:
      method: its name here.
      setting: of the table.
      data: the images, where they were made already.

    Returns:
      (recipe, data).
    """
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
    config_lib.validate(config)
    data = data or datasets.load(config.data)
    steps_per_epoch = data.train_batches(setting.batch_size, config.seed).steps_per_epoch
    return make_recipe(config_lib.resolve(config), data.spec, steps_per_epoch), data


class Training:
    """A run of the project's train step, compiled and warm.

    Args:
      recipe: of the run.
      mesh: of one device; of several seeds a `parallel.seeds_mesh`.
      batches: the first ones, each with an axis of `steps_per_call` in front.
      steps_per_call: train steps in one compiled call.
      num_seeds: that train at once.

    Attributes:
      compile_seconds: of the step.
      bytes_accessed: a step, by the compiler; None where it does not tell, and for several steps a
        call, whose loop it counts once.
      compiled_bytes: the compiler's number for the memory, None where it does not tell.
      allocated_bytes: what the first step needed at a time by the device's allocator, None where
        it does not tell.
      state: after the steps so far.
    """

    def __init__(
        self,
        recipe: Recipe,
        mesh: Mesh,
        batches: Sequence[Batch],
        steps_per_call: int = 1,
        num_seeds: int = 1,
    ):
        self._steps_per_call = steps_per_call
        num_examples = len(batches[0]['examples']['label']) if 'examples' in batches[0] else 0
        arguments = device_memory.abstract_arguments(
            recipe, mesh, steps_per_call, num_seeds, num_examples
        )
        started = time.perf_counter()
        self._call = make_train_step(recipe, mesh).lower(*arguments).compile()
        self.compile_seconds = time.perf_counter() - started
        analysis = self._call.cost_analysis() or {}
        self.bytes_accessed = analysis.get('bytes accessed') if steps_per_call == 1 else None
        self.compiled_bytes = None
        if memory := self._call.memory_analysis():
            # Results that take over the buffer of an argument count once.
            self.compiled_bytes = (
                memory.argument_size_in_bytes
                + memory.output_size_in_bytes
                - memory.alias_size_in_bytes
                + memory.temp_size_in_bytes
                + memory.generated_code_size_in_bytes
            )
        device = mesh.devices.flat[0]
        others = _allocated(device, 'bytes_in_use')
        fresh = jax.jit(recipe.random_state)
        states = [fresh(np.uint32(seed)) for seed in range(num_seeds)]
        self.state = (
            seeds.stack(states, mesh)
            if parallel.has_seeds(mesh)
            else parallel.replicate(states[0], mesh)
        )
        highest_before = _allocated(device, 'peak_bytes_in_use')
        self.advance(steps_per_call, iter(batches))
        highest = _allocated(device, 'peak_bytes_in_use')
        self.allocated_bytes = highest - others if highest > highest_before else None
        self.advance(WARM_UP_CALLS * steps_per_call, itertools.cycle(batches))

    def advance(self, num_steps: int, batches: Iterator[Batch]) -> jax.Array:
        """Makes the steps and waits for the last; the host runs ahead as far as in training.

        Args:
          num_steps: a multiple of `steps_per_call`.
          batches: each with an axis of `steps_per_call` in front.

        Returns:
          The loss of the last step.
        """
        in_flight = collections.deque()
        for _ in range(num_steps // self._steps_per_call):
            self.state, scalars = self._call(self.state, next(batches))
            in_flight.append(scalars['loss'])
            if len(in_flight) > MAX_CALLS_IN_FLIGHT:
                in_flight.popleft().block_until_ready()
        jax.block_until_ready(self.state)
        return in_flight[-1][-1].mean()


def _allocated(device: jax.Device, name: str) -> int:
    """Of the device's allocator; 0 where it does not tell."""
    return (device.memory_stats() or {}).get(name, 0)


def fed_batches(
    data: datasets.Dataset,
    setting: Setting,
    mesh: Mesh,
    place: str = 'host',
    num_seeds: int = 1,
) -> Iterator[Batch]:
    """Batches as training has them.

    Args:
      data: the images.
      setting: of the table.
      mesh: of one device; of several seeds a `parallel.seeds_mesh`.
      place: of `INPUTS`.
      num_seeds: that train at once.
    """
    batches = [data.train_batches(setting.batch_size, seed) for seed in range(num_seeds)]
    examples = data.splits['train'] if place == 'device' else None
    feeds = feed.Feed(batches, mesh, setting.steps_per_call, 0, examples)
    for step in itertools.count(0, setting.steps_per_call):
        yield feeds(step, setting.steps_per_call)


def input_milliseconds(batches: Iterator[Batch]) -> float:
    """To gather a batch, send it, and wait until it is there: the median of some."""
    seconds = []
    for _ in range(INPUT_REPEATS):
        started = time.perf_counter()
        jax.block_until_ready(next(batches))
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds)


def make_case(
    label: str,
    recipe: Recipe,
    setting: Setting,
    mesh: Mesh,
    batches: Iterator[Batch],
    ours: Case | None = None,
    num_seeds: int = 1,
) -> Case:
    """One of the project's own cases, compiled and warm, or why it cannot be.

    Args:
      label: of the line.
      recipe: of the run.
      setting: of the table.
      mesh: see `Training`.
      batches: all that the case will take.
      ours: see `Case`.
      num_seeds: that train at once.
    """
    case = Case(label, ours=ours)
    try:
        first = list(itertools.islice(batches, BATCHES_ON_DEVICE))
        training = Training(recipe, mesh, first, setting.steps_per_call, num_seeds)
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        case.facts['failed'] = 'out of memory'
        return case
    case.advance = functools.partial(training.advance, batches=batches)
    for name in ('compile_seconds', 'bytes_accessed', 'compiled_bytes', 'allocated_bytes'):
        case.facts[name] = getattr(training, name)
    return case


def evaluation_case(
    case: Case, recipe: Recipe, data: datasets.Dataset, mesh: Mesh, steps: int
) -> Case:
    """The evaluation of as many images as `steps` steps train on; see `evaluate.Evaluator`.

    Args:
      case: of training.
      recipe: of the run.
      data: the images.
      mesh: of one device.
      steps: of one round.
    """
    images = data.splits['train'].take(slice(0, steps * recipe.config.data.batch_size))
    data = dataclasses.replace(data, splits={'test': images})
    evaluator = evaluate.Evaluator(recipe.config, recipe.method, recipe.network, data, mesh)
    variables = parallel.replicate(jax.jit(recipe.random_state)().evaluated_variables, mesh)

    def advance(steps: int) -> float:
        del steps  # All images, always.
        return evaluator(variables, 'test')['deployed_nll']

    advance(steps)
    return Case(case.label + timing.EVALUATION, advance, ours=case)


def make_cases(
    methods: Sequence[str],
    setting: Setting,
    mesh: Mesh,
    inputs: Sequence[str] = (),
    num_seeds: int = 0,
    evaluated_steps: int = 0,
) -> list[Case]:
    """The project's own cases of a table, compiled and warm.

    Args:
      methods: names of `METHODS`.
      setting: of the table.
      mesh: of one device.
      inputs: of `INPUTS`; for each, every method has one case more.
      num_seeds: of one case more, unless it is 0.
      evaluated_steps: steps of a round, for one case more, unless it is 0.
    """
    data, on_device, cases = None, None, []
    for method in methods:
        recipe, data = load_recipe(method, setting, data)
        sent = fed_batches(data, setting, mesh)
        on_device = on_device or list(itertools.islice(sent, BATCHES_ON_DEVICE))
        case = make_case(method, recipe, setting, mesh, itertools.cycle(on_device))
        case.facts['forward_flops'] = cost.forward_cost(recipe.network, recipe.spec.image_shape)[1]
        cases.append(case)
        for place in inputs:
            fed = fed_batches(data, setting, mesh, place)
            label = f'{method}, {place}{timing.INPUT}'
            other = make_case(label, recipe, setting, mesh, fed, case)
            other.facts['input_milliseconds'] = input_milliseconds(fed) / setting.steps_per_call
            cases.append(other)
        if evaluated_steps:
            cases.append(evaluation_case(case, recipe, data, mesh, evaluated_steps))
        if num_seeds:
            grid = parallel.seeds_mesh(mesh, num_seeds)
            of_seeds = itertools.cycle(
                itertools.islice(
                    fed_batches(data, setting, grid, num_seeds=num_seeds), BATCHES_ON_DEVICE
                )
            )
            label = f'{method}, {num_seeds} seeds'
            other = make_case(label, recipe, setting, grid, of_seeds, case, num_seeds)
            other.facts['num_seeds'] = num_seeds
            cases.append(other)
    plain = next((case for case in cases if case.label == 'plain'), None)
    for case in cases:
        if case.ours is None:
            case.plain = plain
    return cases


def make_torch_cases(ours: Sequence[Case], setting: Setting, modes: Sequence[str]) -> list[Case]:
    """PyTorch's cases of a table, warm; those that do not work say so.

    Args:
      ours: the project's own cases, with which they are compared.
      setting: of the table.
      modes: of `TORCH_MODES`.
    """
    # Imported where it is wanted: it takes seconds, and the project does without it.
    from benchmarks import torch_step

    data, cases = None, []
    for mode in modes:
        plain = None
        for mine in ours:
            if mine.label not in TORCH_METHODS or mine.advance is None:
                continue
            recipe, data = load_recipe(mine.label, setting, data)
            batches = itertools.islice(
                data.train_batches(setting.batch_size, recipe.config.seed).iterate(0),
                BATCHES_ON_DEVICE,
            )
            case = Case(f'{mine.label}, torch {mode}', None, plain, mine)
            plain = case if mine.label == 'plain' else plain
            cases.append(case)
            try:
                training = torch_step.Training(recipe, list(batches), compiled=mode == 'compile')
                training.advance(WARM_UP_CALLS)
            except Exception as error:  # whatever the compiler of PyTorch does not manage
                case.facts['failed'] = type(error).__name__
                continue
            case.advance = training.advance
    return cases


def measure(
    setting: Setting, mesh: Mesh, chip: timing.Chip | None, rounds: int, steps: int
) -> list[dict[str, Any]]:
    """The numbers of one table, which is printed too.

    Args:
      setting: of the table.
      mesh: of one device.
      chip: what the device can do, or None.
      rounds: in which the cases are timed.
      steps: of a case, in all rounds together.
    """
    evaluated_steps = steps // rounds if EVALUATION.value else 0
    cases = make_cases(METHOD_NAMES.value, setting, mesh, INPUT.value, SEEDS.value, evaluated_steps)
    if TORCH.value:
        cases += make_torch_cases(cases, setting, TORCH_MODES.value)
    load = os.getloadavg()[0]
    timing.time_in_turns(cases, rounds, steps // rounds, timing.CLOCKS[CLOCK.value])
    rows = [{**timing.measured_row(case, setting, chip), 'clock': CLOCK.value} for case in cases]
    lines = [timing.shown(row) for row in rows]
    columns = [name for name in lines[0] if any(line[name] for line in lines)]
    load_after = os.getloadavg()[0]
    print(
        f'{setting.network}, {setting.dtype}, batch {setting.batch_size}: {steps} steps in '
        f'{rounds} rounds, {CLOCK.value} time, load {load:.1f} before and {load_after:.1f} after'
    )
    print(f'\n{markdown_table(lines, columns)}\n', flush=True)
    return rows


def _check_flags() -> None:
    for name in METHOD_NAMES.value:
        if name not in METHODS:
            raise UserError(f'--methods={name!r} is not one of {", ".join(METHODS)}')
    for place in INPUT.value:
        if place not in INPUTS:
            raise UserError(f'--input={place!r} is not one of {", ".join(INPUTS)}')
    if STEPS.value % (ROUNDS.value * STEPS_PER_CALL.value):
        raise UserError(
            f'--steps={STEPS.value} is not allowed: a multiple of --rounds={ROUNDS.value} times '
            f'--steps_per_call={STEPS_PER_CALL.value}'
        )
    if TORCH.value and not importlib.util.find_spec('torch'):
        raise UserError("--torch wants PyTorch: pip install --editable '.[torch]'")


def main() -> None:
    """Measures and prints a table for each combination, and writes all numbers."""
    _check_flags()
    # A compile time is of a compilation.
    jax.config.update('jax_enable_compilation_cache', False)
    if TORCH.value:
        # JAX would take most of a GPU's memory at once.
        os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'
    device = jax.local_devices()[0]
    mesh = parallel.make_mesh([device])
    chip = timing.known_chip(device, PEAK.value, BANDWIDTH.value)
    versions = workdir.versions()
    if TORCH.value:
        versions['torch'] = importlib.metadata.version('torch')
    print(f'{workdir.device_name()}, ', ', '.join(f'{k} {v}' for k, v in versions.items()), '\n')
    result = {'device': workdir.device_name(), 'versions': versions, 'rows': []}
    combinations = itertools.product(NETWORKS.value, DTYPES.value, map(int, BATCH_SIZES.value))
    for network, dtype, batch_size in combinations:
        setting = Setting(network, dtype, batch_size, STEPS_PER_CALL.value)
        result['rows'] += measure(setting, mesh, chip, ROUNDS.value, STEPS.value)
        if OUTPUT.value:
            workdir.write_json(Path(OUTPUT.value), result)


if __name__ == '__main__':
    command.run(main)
