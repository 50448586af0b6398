"""Compiles train steps for a TPU without having one; prints the compiler's estimates.

    python -m benchmarks.tpu_compile [--topology=v5e:1x1] [--networks=resnet32,resnet110,resnet18]
        [--methods=plain,one,dml,okddip] [--batch_sizes=128] [--forms=auto,dense,grouped]
        [--dtype=bfloat16] [--sync_batch_norm] [--text=FOLDER]

This requires `pip install 'one_jax[tpu]'`, but no TPU. A network's cases are compiled one after the
other, a minute or two each. 'form' is `model.branch_conv`; the plain network has one form. Columns:

- M cycles: the sum of the compiler's `estimated_cycles` over a step on one chip, in millions; then
  the same by part of the step, forward + backward. Communication is not in it.
- ratio: to the plain network with the same batch.
- MB: of one chip's memory, by the compiler.
- all-reduces: in a step, with the kilobytes that they sum.
- s: to compile, on this machine.
"""

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any

import jax
from absl import flags

from benchmarks import train_step
from one_jax import config as config_lib
from one_jax.data.table import DATASETS
from one_jax.models import layers, resnet_imagenet
from one_jax.reporting.tables import markdown_table
from one_jax.runtime import cli, compiled_program, memory, parallel, topology
from one_jax.training import step as step_lib
from one_jax.training.experiment import Experiment, make_experiment

PLAIN, STEPS_PER_EPOCH = 'plain', 1000

TOPOLOGY = flags.DEFINE_string('topology', 'v5e:1x1', 'Of the slice to compile for.')
FORMS = flags.DEFINE_list('forms', ['auto'], f'Some of {", ".join(layers.BRANCH_CONVOLUTIONS)}.')
DTYPE = flags.DEFINE_enum('dtype', 'bfloat16', ('bfloat16', 'float32'), 'Of the computation.')
SYNC = flags.DEFINE_boolean('sync_batch_norm', False, 'Statistics over all chips.')
TEXT = flags.DEFINE_string('text', '', 'A folder for the text of the compiled programs.')


def make(network: str, method: str, form: str, batch_size: int) -> Experiment:
    """Builds an experiment that reads no data; `batch_size` is the global one."""
    config = config_lib.default_config()
    config.data.name = 'imagenet2012' if network in resnet_imagenet.NETWORKS else 'cifar100'
    config.data.batch_size = config.data.eval_batch_size = batch_size
    config.model.update(name=network, dtype=DTYPE.value, branch_conv=form)
    config.method.name = train_step.METHODS[method]
    config.sync_batch_norm = SYNC.value
    spec = dataclasses.replace(DATASETS[config.data.name], mean=(0.5,) * 3, std=(0.25,) * 3)
    return make_experiment(config_lib.resolve(config), spec, (), STEPS_PER_EPOCH)


def compile_step(experiment: Experiment, mesh: jax.sharding.Mesh) -> jax.stages.Compiled:
    """Compiles one train step, with a batch of images as its argument."""
    initial_state = step_lib.make_initial_state(experiment, mesh)
    state = jax.eval_shape(initial_state, jax.ShapeDtypeStruct((), 'uint32'))
    arguments = step_lib.abstract_arguments(experiment, mesh, state)
    return step_lib.make_train_step(experiment, mesh).lower(*arguments).compile()


def measure(
    network: str, method: str, form: str, batch_size: int, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    """Returns a row of the table, without the ratio."""
    started = time.perf_counter()
    compiled = compile_step(make(network, method, form, batch_size * mesh.size), mesh)
    seconds, text = time.perf_counter() - started, compiled.as_text()
    if TEXT.value:
        Path(TEXT.value, f'{network}_{method}_{form}_{batch_size}.txt').write_text(text)
    cycles = compiled_program.estimated_cycles(text)
    number, size = compiled_program.all_reduces(text)
    case = {'network': network, 'batch': batch_size, 'method': method, 'form': form}
    return (
        case
        | {'M cycles': sum(cycles.values()) / 1e6, 'ratio': None}
        | {part: _by_direction(cycles, part) for part in PARTS}
        | {
            'MB': round(memory.program_bytes(compiled) / 1e6),
            'all-reduces': f'{number} ({round(size / 1e3)})',
            's': round(seconds),
        }
    )


PARTS = [*compiled_program.PARTS, compiled_program.OTHER]


def _by_direction(cycles: dict[tuple[str, str], int], part: str) -> str:
    numbers = [cycles.get((part, way), 0) / 1e6 for way in ('forward', 'backward')]
    return ' + '.join(f'{number:.2f}' for number in numbers if number)


def main() -> None:
    """Compiles every case and prints a table."""
    jax.config.update('jax_enable_compilation_cache', False)
    mesh, rows = parallel.make_mesh(topology.devices(TOPOLOGY.value)), []
    flag_values = train_step.NETWORKS, train_step.BATCH_SIZES, train_step.METHOD_NAMES
    for network, size, method in itertools.product(*(flag.value for flag in flag_values)):
        for form in FORMS.value[:1] if method == PLAIN else FORMS.value:
            row = measure(network, method, form, int(size), mesh)
            same = [x for x in rows if (x['network'], x['batch']) == (network, int(size))]
            plain = next((x['M cycles'] for x in same if x['method'] == PLAIN), None)
            row['ratio'] = 1.0 if method == PLAIN else plain and row['M cycles'] / plain
            rows.append(row)
            print(row, flush=True)
    columns = [name for name in rows[0] if any(row[name] not in ('', None) for row in rows)]
    print(f'\n{TOPOLOGY.value}, {DTYPE.value}, JAX {jax.__version__}\n')
    print(markdown_table(rows, columns))


if __name__ == '__main__':
    flags.FLAGS.set_default('methods', ['plain', 'one', 'dml', 'okddip'])
    cli.run(main)
