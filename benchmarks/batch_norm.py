"""Compares forms of batch normalisation's variance: accuracy, time on this machine, TPU cycles.

    taskset -c 0 python -m benchmarks.batch_norm [--networks=resnet8,resnet20,resnet32]
        [--methods=plain,one] [--dtypes=float32] [--steps=40] [--rounds=20] [--clock=processor]
    TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python -m benchmarks.batch_norm --topology=v5e:2x2

With `--topology` it compiles the train steps, batch 128, for one chip and prints the sum of the
compiler's `estimated_cycles`; that requires `pip install 'jax[tpu]'`, but no TPU. The forms:

- one pass: E[x^2] - E[x]^2, Flax's default.
- two passes: E[(x - E[x])^2].
- shifted: one pass over x minus the running mean, `layers.BatchNorm`.

The accuracy is that of the normalised output, largest absolute difference from float64, for 128 x
1,024 normal values in each of 16 channels; 'at the start' with a running mean of 0, 'later' with
one that is a standard deviation from the mean.
"""

import functools
import itertools
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import linen as nn
from jax.experimental import topologies

from benchmarks import timing, train_step
from benchmarks.timing import Setting
from one_jax.models import layers
from one_jax.reporting.tables import markdown_table
from one_jax.runtime import cli, environment, parallel
from one_jax.training import step as step_lib
from one_jax.training.experiment import Experiment

BATCH_SIZE = 128
RATIOS = (1, 30, 100, 300, 1000, 3000)
TOPOLOGY = flags.DEFINE_string('topology', '', 'Count cycles for a chip of it, e.g. v5e:2x2.')


def make_norm(
    module: Callable[..., nn.Module], dtype: Any, axis_name: str | None, train: bool
) -> Callable[..., nn.Module]:
    """Does what `layers.make_norm` does, with another module."""
    return functools.partial(module, **LIBRARY(dtype, axis_name, train).keywords)


LIBRARY = layers.make_norm
FORMS = {
    'one pass': nn.BatchNorm,
    'two passes': functools.partial(nn.BatchNorm, use_fast_variance=False),
    'shifted': layers.BatchNorm,
}


def errors(form: str, at_the_start: bool) -> list[float]:
    """Returns the largest error of the output for each ratio of mean and deviation."""
    norm = make_norm(FORMS[form], jnp.float32, None, True)()
    values = np.random.default_rng(0).normal(size=(BATCH_SIZE, 32, 32, 16))
    found = []
    for ratio in RATIOS:
        x = (values + ratio).astype(np.float32)
        exact = x.astype(np.float64)
        mean, variance = exact.mean((0, 1, 2)), exact.var((0, 1, 2))
        variables = norm.init(jax.random.key(0), x[:1])
        running = {**variables['batch_stats'], 'mean': jnp.zeros(16) if at_the_start else mean + 1}
        variables = {**variables, 'batch_stats': jax.tree.map(jnp.float32, running)}
        y, _ = jax.jit(lambda v, x: norm.apply(v, x, mutable=['batch_stats']))(variables, x)
        found.append(np.abs(y - (exact - mean) / np.sqrt(variance + norm.epsilon)).max())
    return found


def cycles(experiment: Experiment, mesh: jax.sharding.Mesh) -> int:
    """Compiles a train step for the mesh; returns the sum of the compiler's estimates."""
    state = jax.eval_shape(
        step_lib.make_initial_state(experiment, mesh), jax.ShapeDtypeStruct((), 'uint32')
    )
    arguments = step_lib.abstract_arguments(experiment, mesh, state, 1, 0)
    compiled = step_lib.make_train_step(experiment, mesh).lower(*arguments).compile()
    return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', compiled.as_text())))


def measure(method: str, setting: Setting, mesh: jax.sharding.Mesh) -> dict[str, str]:
    """Returns a line of the table."""
    numbers, cases, source, batches = {}, [], None, None
    for form, module in FORMS.items():
        with mock.patch.object(layers, 'make_norm', functools.partial(make_norm, module)):
            experiment, source = train_step.load_experiment(method, setting, source)
            if TOPOLOGY.value:
                numbers[form] = cycles(experiment, mesh) / 1e6
                continue
            batches = batches or list(
                itertools.islice(train_step.fed_batches(experiment, source, mesh), 2)
            )
            case = train_step.make_case(
                form, experiment, setting, mesh, itertools.cycle(batches), cases and cases[0]
            )
            cases.append(case)
    shown = {'network': setting.network, 'method': method, 'dtype': setting.dtype}
    if TOPOLOGY.value:
        first = numbers['one pass']
        return shown | {
            form: f'{number:.2f} M ({number / first:.3f})' for form, number in numbers.items()
        }
    rounds = train_step.ROUNDS.value
    timing.time_in_turns(
        cases, rounds, train_step.STEPS.value // rounds, timing.CLOCKS[train_step.CLOCK.value]
    )
    return shown | {
        case.label: f'{np.median(case.milliseconds):.1f} ms '
        f'({timing.paired_ratio(case, cases[0]):.3f})'
        for case in cases
    }


def main() -> None:
    """Prints the accuracy, and the time or the cycles."""
    jax.config.update('jax_enable_compilation_cache', False)
    if TOPOLOGY.value:
        devices = topologies.get_topology_desc(
            platform='tpu', topology_name=TOPOLOGY.value
        ).devices[:1]
        print(f'One chip of {TOPOLOGY.value}, JAX {jax.__version__}\n')
    else:
        devices = jax.local_devices()[:1]
        print(f'{environment.device_name()}, JAX {jax.__version__}\n')
        lines = [
            {
                'form': f'{form}, {when}',
                **{f'{r:,}': f'{e:.1e}' for r, e in zip(RATIOS, row, strict=True)},
            }
            for form in FORMS
            for when, row in (('at the start', errors(form, True)), ('later', errors(form, False)))
        ]
        print(f'{markdown_table(lines, list(lines[0]))}\n', flush=True)
    mesh = parallel.make_mesh(devices)
    lines = []
    for network, dtype, method in itertools.product(
        train_step.NETWORKS.value, train_step.DTYPES.value, train_step.METHOD_NAMES.value
    ):
        lines.append(measure(method, Setting(network, dtype, BATCH_SIZE), mesh))
        print(lines[-1], flush=True)
    print(f'\n{markdown_table(lines, list(lines[0]))}')


if __name__ == '__main__':
    flags.FLAGS.set_default('networks', ['resnet8', 'resnet20', 'resnet32'])
    flags.FLAGS.set_default('methods', ['plain', 'one'])
    flags.FLAGS.set_default('dtypes', ['float32'])
    cli.run(main)
