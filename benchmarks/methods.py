"""Trains every method on real digits over several seeds: the tables of docs/methods.md.

    python -m benchmarks.methods [--seeds=0,1,2] [--rows=one,dml] [--output=docs/methods.md]
        [--only_finished]

ResNet-8 on 5,000 MNIST digits, `configs/mnist5k_resnet8.py:few`: 50 training images of each class,
300 steps. Each row is a method and the fields in which it differs from the recipe. Each run is
exported, and the exported student must reproduce the accuracy of the run. Finished runs in `--runs`
are not trained again.

The second table is EKD's case, little data for the student: networks trained with 50 and with 100
images a class by three frozen teachers that saw all 4,000 digits.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from configs import mnist5k_resnet8
from one_jax import train
from one_jax.reporting.runs import RESULT
from one_jax.reporting.tables import markdown_table, mean_and_deviation
from one_jax.runtime import environment
from one_jax.students import evaluation
from one_jax.training import export

SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'Seeds of the runs.')
ROWS = flags.DEFINE_list('rows', [], 'Only these rows; all by default.')
RUNS = flags.DEFINE_string('runs', 'runs/methods', 'The folder of the runs.')
FINISHED = flags.DEFINE_boolean('only_finished', False, 'Train nothing; mark missing rows.')
OUTPUT = flags.DEFINE_string('output', '', 'The Markdown file to write.')

COLUMNS = ('method', 'deployed', 'branch mean', 'ensemble', 'params', 'MFLOPs', 'seconds')


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
      name: the name of its runs.
      label: the first cell.
      method: the name of the method.
      fields: the dotted config fields in which it differs from the recipe.
      teachers: the frozen teachers, (row, seed, follows) each; a seed that follows is added to the
        student's own.
    """

    name: str
    label: str
    method: str
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    teachers: tuple[tuple[str, int, bool], ...] = ()


NETWORKS = ('resnet20', 'wrn10_1', 'densenet16_4')
ALL_IMAGES = {'data.examples_per_class': 0, 'train.epochs': 12}
TEACHERS = tuple(
    Row(f'{name}_{data}', f'plain {name}, teacher', 'plain', {'model.name': name, **fields})
    for data, fields in (('few', {}), ('all', ALL_IMAGES))
    for name in NETWORKS
)
FEW_TEACHERS, ALL_TEACHERS = (
    tuple((f'{name}_{data}', 0, False) for name in NETWORKS) for data in ('few', 'all')
)
# The plain networks of a seed ensemble.
ENSEMBLE = tuple(('plain', seed, True) for seed in (100, 200, 300))
UNSHARED = {'model.share_stages': 0}
HELD_OUT = {'data.validation_fraction': 0.2, 'train.steps': 300}

METHODS = (
    Row('plain', 'plain network', 'plain'),
    Row('smoothed', 'plain, label smoothing 0.1', 'plain', {'train.label_smoothing': 0.1}),
    Row('independent', 'branches, CE only', 'independent'),
    Row('joint_average', 'joint average', 'joint_average'),
    Row('one', 'ONE', 'one'),
    Row('one_undistilled', 'ONE, no distillation', 'one', {'method.distill_weight': 0.0}),
    Row('one_unshared', 'ONE, no sharing', 'one', UNSHARED),
    Row('one_ungated', 'ONE, no gate (uniform mean)', 'one', {'method.teacher': 'mean'}),
    Row('one_attached', 'ONE, teacher not detached', 'one', {'method.detach_teacher': False}),
    Row('one_no_ramp', 'ONE, no ramp', 'one', {'method.rampup_fraction': 0.0}),
    Row('cl_ilr', 'CL-ILR', 'cl_ilr'),
    Row('dml', 'DML, K = 2', 'dml'),
    Row('kdcl_naive', 'KDCL-naive, K = 2', 'kdcl', {'method.teacher': 'naive'}),
    Row('kdcl_linear', 'KDCL-linear, K = 2', 'kdcl', {'method.teacher': 'linear'}),
    Row('kdcl_min_logit', 'KDCL-min-logit, K = 2', 'kdcl', {'method.teacher': 'min_logit'}),
    Row(
        'kdcl_general',
        'KDCL-general, K = 2, a fifth of the images held out',
        'kdcl',
        {'method.teacher': 'general', **HELD_OUT},
    ),
    Row('okddip', 'OKDDip, K = 4', 'okddip'),
    Row('okddip_whole', 'OKDDip, K = 4 whole networks', 'okddip', UNSHARED),
    Row('okddip_no_leader', 'OKDDip, K = 4, no leader', 'okddip', {'method.leader': False}),
    Row('mde', 'MDE as reconstructed, K = 4', 'mde'),
    Row(
        'mde_selective',
        'MDE as reconstructed, selective fusion',
        'mde',
        {'method.fusion': 'selective'},
    ),
    Row('boc_kd', 'BOC-KD as reconstructed, K = 5 of falling width', 'boc_kd'),
    Row('self_kd', 'self-KD: one seed teaches', 'kd', teachers=ENSEMBLE[:1]),
    Row('ensemble_kd', 'KD of the mean of three seeds', 'kd', teachers=ENSEMBLE),
    Row('kd', 'KD of the mean of three networks', 'kd', teachers=FEW_TEACHERS),
    Row('meal', 'MEAL V2 of three networks, no discriminator', 'meal', teachers=FEW_TEACHERS),
    Row('ekd', 'EKD as reconstructed, three networks', 'ekd', teachers=FEW_TEACHERS),
)
PLAIN = METHODS[0]
STUDENTS = (
    Row('plain', 'plain network', 'plain'),
    Row('kd', 'KD of the mean of the teachers', 'kd', teachers=ALL_TEACHERS),
    Row('ekd', 'EKD as reconstructed, one to one', 'ekd', teachers=ALL_TEACHERS),
    Row('ekd_all_to_all', 'EKD, all to all', 'ekd', {'method.pairing': 'all_to_all'}, ALL_TEACHERS),
    Row(
        'ekd_ensemble',
        'EKD, ensemble to all',
        'ekd',
        {'method.pairing': 'ensemble_to_all'},
        ALL_TEACHERS,
    ),
)
LIMITED = tuple(
    dataclasses.replace(
        row,
        name=f'{row.name}_{images}_per_class',
        label=f'{row.label}, {images} images a class',
        fields={**row.fields, 'data.examples_per_class': images, 'train.steps': 300},
    )
    for images, students in ((50, STUDENTS[1:]), (100, STUDENTS[:3]))
    for row in students
)
BY_NAME = {row.name: row for row in (*TEACHERS, *METHODS, *LIMITED)}


def run(row: Row, seed: int, runs: Path) -> dict[str, Any]:
    """Trains a run unless it is finished, exports it and evaluates the exported student.

    Raises:
      AssertionError: the student does not reproduce the accuracy of its run.
    """
    directory, student = runs / f'{row.name}-{seed}', runs / 'students' / f'{row.name}-{seed}'
    config = mnist5k_resnet8.get_config(f'few,{row.method}')
    config.update_from_flattened_dict(
        {'train.eval_every_epochs': 60, 'train.checkpoint_every_epochs': 60, 'seed': seed}
    )
    config.update_from_flattened_dict(row.fields)
    folders = []
    for name, offset, follows in row.teachers:
        teacher_seed = offset + seed if follows else offset
        run(BY_NAME[name], teacher_seed, runs)
        folders.append(str(runs / 'students' / f'{name}-{teacher_seed}'))
    if folders:
        config.method.teachers = ','.join(folders)
    result = train.train_and_evaluate(config, directory)
    if not student.exists():
        export.export_student(directory, student)
        record = evaluation.evaluate_students([student])
        for measure, tolerance in (('deployed_top1', 1e-9), ('deployed_nll', 2e-4)):
            if abs(record[measure] - result[measure]) > tolerance:
                raise AssertionError(f'{student}: {measure} {record[measure]}, {result[measure]}')
    return result


def seed_ensemble(seed: int, runs: Path) -> dict[str, Any]:
    """Returns the result of the mean of three plain networks with different seeds."""
    results = [run(PLAIN, offset + seed, runs) for _, offset, _ in ENSEMBLE]
    students = [runs / 'students' / f'plain-{offset + seed}' for _, offset, _ in ENSEMBLE]
    costs = ('parameters', 'flops', 'seconds')
    sums = {name: sum(result[name] for result in results) for name in costs}
    return {
        **evaluation.evaluate_students(students),
        **sums,
        'deployed_parameters': sums['parameters'],
        'deployed_flops': sums['flops'],
    }


def table_row(label: str, results: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Returns the cells of a row, accuracies as mean and sample deviation over the seeds."""
    first = results[0]

    def cost(name: str, unit: float) -> str:
        costs = (f'{first[field] / unit:.1f}' for field in (name, f'deployed_{name}'))
        return ' / '.join(dict.fromkeys(costs))

    branches = len(first['branch_top1']) > 1
    return {
        'method': label,
        'deployed': mean_and_deviation(result['deployed_top1'] for result in results),
        'branch mean': mean_and_deviation(statistics.mean(r['branch_top1']) for r in results),
        'ensemble': mean_and_deviation(r['ensemble_top1'] for r in results) if branches else '',
        'params': cost('parameters', 1e3),
        'MFLOPs': cost('flops', 1e6),
        # The fastest seed waited least for the other users of the machine.
        'seconds': f'{min(result["seconds"] for result in results):.0f}',
    }


def table(rows: Sequence[Row], seeds: Sequence[int], runs: Path) -> str:
    """Runs the rows and returns their table; under `PLAIN` it adds the seed ensemble."""
    lines = []
    for row in rows:
        if ROWS.value and row.name not in ROWS.value:
            continue
        finished = all((runs / f'{row.name}-{seed}' / RESULT).exists() for seed in seeds)
        if FINISHED.value and not finished:
            lines.append({'method': row.label, 'deployed': 'not run'})
            continue
        lines.append(table_row(row.label, [run(row, seed, runs) for seed in seeds]))
        print(lines[-1], flush=True)
        if row is PLAIN:
            results = [seed_ensemble(seed, runs) for seed in seeds]
            lines.append(table_row('seed ensemble, three plain networks', results))
    return markdown_table(lines, COLUMNS) if lines else ''


PAGE = """# The methods on real digits

Made by `{command} --output=docs/methods.md`;
`make methods` also trains the rows that this command leaves out.
{machine}, cores shared.

ResNet-8 on MNIST's sample of 5,000 digits, 50 training images of each class, 300 steps
(`configs/mnist5k_resnet8.py:few`), seeds {seeds}. Test top-1 in %, mean ± sample standard deviation
over the seeds; one of the 1,000 test images is 0.1 %. The table shows that every method trains, and
that its exported student reproduces its accuracy. It does not rank the methods: all of them
classify nearly all digits correctly.

deployed: what the method deploys (a branch, the leader or the ensemble). params (thousands) and
MFLOPs (one image, 2 per multiply-add): the training graph / what is deployed. seconds: the training
time of the fastest seed on shared cores, partly before the step became faster. For the cost of a
method see benchmarks/README.md.

{methods}

## Little data, teachers that saw more

Three networks trained on all 4,000 digits ({teachers})
teach students that see 50 or 100 images a class, for 300 steps. EKD deploys its ensemble of three
branches above one shared stage. The plain network with 50 images a class is in the first row above.

{limited}
"""


def main(arguments: Sequence[str]) -> None:
    """Trains the runs that are missing; prints and writes the page."""
    seeds, runs = [int(seed) for seed in SEEDS.value], Path(RUNS.value)
    teachers = {name: run(BY_NAME[f'{name}_all'], 0, runs) for name in NETWORKS}
    versions = environment.versions()
    finished = ' --only_finished' if FINISHED.value else ''
    text = PAGE.format(
        command=f'python -m benchmarks.methods --seeds={",".join(map(str, seeds))}{finished}',
        machine=(
            f'{environment.device_name()}, JAX {versions["jax"]}, Python {versions["python"]}'
        ),
        seeds=', '.join(map(str, seeds)),
        methods=table(METHODS, seeds, runs),
        teachers=', '.join(
            f'{name} {result["deployed_top1"]:.2f} %' for name, result in teachers.items()
        ),
        limited=table(LIMITED, seeds, runs),
    )
    print(text)
    if OUTPUT.value:
        Path(OUTPUT.value).write_text(text)


if __name__ == '__main__':
    app.run(main)
