"""bfloat16 beside float32 on real digits, over several seeds.

    python -m benchmarks.precision [--seeds=0,1,2] [--options=few] [--steps=0] [--runs=DIR]

ONE in ResNet-8 on 5,000 MNIST digits, `configs/mnist5k_resnet8.py`: all 4,000 training digits and
12 epochs, or with `--options=few` 50 of each class and 300 steps. Test top-1 in %, 1,000 images:
one is 0.1 %. Runs are kept in `--runs`; what is finished is not trained again.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from configs import mnist5k_resnet8
from one_jax import train, workdir
from one_jax.analysis.tables import markdown_table

SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'Seeds of the runs.')
OPTIONS = flags.DEFINE_string('options', '', 'Of the recipe, such as few.')
STEPS = flags.DEFINE_integer('steps', 0, 'So many steps only; 0: those of the recipe.')
RUNS = flags.DEFINE_string('runs', 'runs/precision', 'Where the runs are kept.')

DTYPES = ('float32', 'bfloat16')
PREDICTORS = {'a branch': 'deployed_top1', 'teacher': 'teacher_top1', 'ensemble': 'ensemble_top1'}
COLUMNS = ('top-1 %', *DTYPES, 'difference')


def run(dtype: str, seed: int) -> dict[str, float]:
    """The result of a run in one precision."""
    config = mnist5k_resnet8.get_config(OPTIONS.value)
    config.update_from_flattened_dict(
        {'model.dtype': dtype, 'seed': seed, 'train.steps': STEPS.value or config.train.steps}
    )
    names = filter(None, (dtype, OPTIONS.value, f'{STEPS.value}' if STEPS.value else '', f'{seed}'))
    return train.train_and_evaluate(config, Path(RUNS.value) / '-'.join(names))


def _mean_and_deviation(values: Sequence[float], sign: str = '') -> str:
    mean = f'{statistics.mean(values):{sign}.2f}'
    return mean if len(values) == 1 else f'{mean} ± {statistics.stdev(values):.2f}'


def main(arguments: Sequence[str]) -> None:
    """Runs what is not there yet, and prints the table."""
    seeds = [int(seed) for seed in SEEDS.value]
    results = {dtype: [run(dtype, seed) for seed in seeds] for dtype in DTYPES}
    lines = []
    for label, field in PREDICTORS.items():
        whole, half = ([result[field] for result in results[dtype]] for dtype in DTYPES)
        differences = [ours - theirs for theirs, ours in zip(whole, half, strict=True)]
        cells = (
            label,
            _mean_and_deviation(whole),
            _mean_and_deviation(half),
            _mean_and_deviation(differences, '+'),
        )
        lines.append(dict(zip(COLUMNS, cells, strict=True)))
    seconds = {
        dtype: statistics.mean(result['seconds'] for result in results[dtype]) for dtype in DTYPES
    }
    print(f'{workdir.device_name()}, seeds {", ".join(map(str, seeds))}; mean ± sample deviation\n')
    print(markdown_table(lines, COLUMNS))
    print('\nseconds a run:', ', '.join(f'{name} {value:.0f}' for name, value in seconds.items()))


if __name__ == '__main__':
    app.run(main)
