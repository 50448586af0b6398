"""Compares bfloat16 with float32 on real digits over several seeds.

    python -m benchmarks.precision [--seeds=0,1,2] [--options=few] [--steps=0] [--runs=DIR]

ONE in ResNet-8 on 5,000 MNIST digits, `configs/mnist5k_resnet8.py`: all 4,000 training digits and
12 epochs, or with `--options=few` 50 of each class and 300 steps. Test top-1 in %; one of the 1,000
images is 0.1 %. Finished runs in `--runs` are not trained again.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from configs import mnist5k_resnet8
from one_jax import train
from one_jax.reporting.tables import markdown_table, mean_and_deviation
from one_jax.runtime import environment

SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'Seeds of the runs.')
OPTIONS = flags.DEFINE_string('options', '', 'Options of the recipe, such as few or okddip.')
STEPS = flags.DEFINE_integer('steps', 0, "The number of steps; 0: the recipe's.")
RUNS = flags.DEFINE_string('runs', 'runs/precision', 'The folder of the runs.')

DTYPES = ('float32', 'bfloat16')
OUTPUTS = {'a branch': 'deployed_top1', 'teacher': 'teacher_top1', 'ensemble': 'ensemble_top1'}
COLUMNS = ('top-1 %', *DTYPES, 'difference')


def run(dtype: str, seed: int) -> dict[str, Any]:
    """Returns the result of a run in one precision."""
    config = mnist5k_resnet8.get_config(OPTIONS.value)
    config.update_from_flattened_dict(
        {'model.dtype': dtype, 'seed': seed, 'train.steps': STEPS.value or config.train.steps}
    )
    names = filter(None, (dtype, OPTIONS.value, f'{STEPS.value}' if STEPS.value else '', f'{seed}'))
    return train.train_and_evaluate(config, Path(RUNS.value) / '-'.join(names))


def main(arguments: Sequence[str]) -> None:
    """Trains the runs that are missing and prints the table."""
    results = {dtype: [run(dtype, int(seed)) for seed in SEEDS.value] for dtype in DTYPES}
    lines = []
    for label, field in OUTPUTS.items():
        values = {dtype: [result[field] for result in results[dtype]] for dtype in DTYPES}
        differences = [half - whole for whole, half in zip(*values.values(), strict=True)]
        cells = {dtype: mean_and_deviation(values[dtype]) for dtype in DTYPES}
        cells['difference'] = mean_and_deviation(differences, sign='+')
        lines.append({'top-1 %': label, **cells})
    print(
        f'{environment.device_name()}, seeds {", ".join(SEEDS.value)}; '
        f'mean ± sample deviation\n\n{markdown_table(lines, COLUMNS)}\n'
    )
    for dtype in DTYPES:
        seconds = statistics.mean(result['seconds'] for result in results[dtype])
        print(f'{dtype}: {seconds:.0f} seconds a run')


if __name__ == '__main__':
    app.run(main)
