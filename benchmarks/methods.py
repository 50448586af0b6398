"""Every method on real digits, over several seeds: the table of docs/methods.md.

    python -m benchmarks.methods [--seeds=0,1,2] [--rows=one,dml] [--output=docs/methods.md]
        [--only_finished]

ResNet-8 on 5,000 MNIST digits, `configs/mnist5k_resnet8.py:few`: 50 training images of each class,
300 steps. Every row differs from that in the fields that it names. Each run is exported, and the
exported student must evaluate to the accuracy of the run. Runs are kept in `--runs` (one folder
each, `config.json` and all): what is finished is not trained again.

A second table has networks taught by three frozen ones that saw all 4,000 digits (EKD's case:
little data for the student), with 50 and with 100 images a class, the same number of steps.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from configs import mnist5k_resnet8
from one_jax import evaluate, export, train, workdir
from one_jax.analysis.tables import markdown_table

SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'Seeds of the runs.')
ROWS = flags.DEFINE_list('rows', [], 'Only these rows; all by default.')
RUNS = flags.DEFINE_string('runs', 'runs/methods', 'Where the runs are kept.')
FINISHED = flags.DEFINE_boolean('only_finished', False, 'Train nothing: "not run" what is missing.')
OUTPUT = flags.DEFINE_string('output', '', 'The Markdown file to write.')

# Seeds of the other members of a seed ensemble lie this far apart.
ENSEMBLE_SEED = 100
TEACHERS = ('resnet20', 'wrn10_1', 'densenet16_4')
COLUMNS = ('method', 'deployed', 'member mean', 'ensemble', 'params', 'MFLOPs', 'seconds')


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
      name: of its runs.
      label: what the table says.
      fields: what differs from the recipe.
      teachers: whose exported students are the frozen teachers: (row, seed, follows), where a seed
        that follows is added to the student's own.
    """

    name: str
    label: str
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    teachers: tuple[tuple[str, int, bool], ...] = ()


def _method(name: str, label: str, method: str, **fields: Any) -> Row:
    dotted = {
        field if '.' in field else f'method.{field}': value for field, value in fields.items()
    }
    return Row(name, label, {'method.name': method, **dotted})


_PLAIN = _method('plain', 'plain network', 'plain')
_TEACHER_ROWS = tuple(
    _method(
        f'{network}_{data}',
        f'plain {network}, teacher',
        'plain',
        **{'model.name': network, **fields},
    )
    for data, fields in (
        ('few', {}),
        ('all', {'data.examples_per_class': 0, 'train.epochs': 12}),
    )
    for network in TEACHERS
)
_ENSEMBLE = tuple(('plain', ENSEMBLE_SEED * (1 + index), True) for index in range(3))
_FEW_TEACHERS = tuple((f'{network}_few', 0, False) for network in TEACHERS)
_ALL_TEACHERS = tuple((f'{network}_all', 0, False) for network in TEACHERS)


def _taught(row: Row, teachers: tuple[tuple[str, int, bool], ...]) -> Row:
    return dataclasses.replace(row, teachers=teachers)


METHODS = (
    _PLAIN,
    _method('smoothed', 'plain, label smoothing 0.1', 'plain', **{'train.label_smoothing': 0.1}),
    _method('independent', 'branches, CE only', 'independent'),
    _method('joint_average', 'joint average', 'joint_average'),
    _method('one', 'ONE', 'one'),
    _method('one_undistilled', 'ONE, no distillation', 'one', distill_weight=0.0),
    _method('one_unshared', 'ONE, no sharing', 'one', **{'model.share_stages': 0}),
    _method('one_ungated', 'ONE, no gate (uniform mean)', 'one', teacher='mean'),
    _method('one_attached', 'ONE, teacher not detached', 'one', detach_teacher=False),
    _method('one_no_ramp', 'ONE, no ramp', 'one', rampup_fraction=0.0),
    _method('cl_ilr', 'CL-ILR', 'cl_ilr'),
    _method('dml', 'DML, K = 2', 'dml'),
    _method('kdcl_naive', 'KDCL-naive, K = 2', 'kdcl', teacher='naive'),
    _method('kdcl_linear', 'KDCL-linear, K = 2', 'kdcl', teacher='linear'),
    _method('kdcl_min_logit', 'KDCL-min-logit, K = 2', 'kdcl', teacher='min_logit'),
    _method(
        'kdcl_general',
        'KDCL-general, K = 2, a fifth of the images held out',
        'kdcl',
        teacher='general',
        **{'data.validation_fraction': 0.2, 'train.steps': 300},
    ),
    _method('okddip', 'OKDDip, K = 4', 'okddip'),
    _method('okddip_whole', 'OKDDip, K = 4 whole networks', 'okddip', **{'model.share_stages': 0}),
    _method('okddip_no_leader', 'OKDDip, K = 4, no leader', 'okddip', leader=False),
    _method('mde', 'MDE as reconstructed, K = 4', 'mde'),
    _method('mde_selective', 'MDE as reconstructed, selective fusion', 'mde', fusion='selective'),
    _method('boc_kd', 'BOC-KD as reconstructed, K = 5 of falling width', 'boc_kd'),
    _taught(_method('self_kd', 'self-KD: one seed teaches', 'kd'), _ENSEMBLE[:1]),
    _taught(_method('ensemble_kd', 'KD of the mean of three seeds', 'kd'), _ENSEMBLE),
    _taught(_method('kd', 'KD of the mean of three networks', 'kd'), _FEW_TEACHERS),
    _taught(_method('meal', 'MEAL V2 of three networks, no discriminator', 'meal'), _FEW_TEACHERS),
    _taught(_method('ekd', 'EKD as reconstructed, three networks', 'ekd'), _FEW_TEACHERS),
)
_STUDENTS = (
    (_PLAIN, 'plain network'),
    (_method('kd', '', 'kd'), 'KD of the mean of the teachers'),
    (_method('ekd', '', 'ekd'), 'EKD as reconstructed, one to one'),
    (_method('ekd_all_to_all', '', 'ekd', pairing='all_to_all'), 'EKD, all to all'),
    (_method('ekd_ensemble', '', 'ekd', pairing='ensemble_to_all'), 'EKD, ensemble to all'),
)
LIMITED = tuple(
    Row(
        f'{row.name}_{images}_per_class',
        f'{label}, {images} images a class',
        {**row.fields, 'data.examples_per_class': images, 'train.steps': 300},
        () if row is _PLAIN else _ALL_TEACHERS,
    )
    for images, students in ((50, _STUDENTS[1:]), (100, _STUDENTS[:3]))
    for row, label in students
)
BY_NAME = {row.name: row for row in (*_TEACHER_ROWS, *METHODS, *LIMITED)}


def run(row: Row, seed: int, runs: Path) -> dict[str, Any]:
    """Trains a row's run unless it is finished, exports it, and evaluates the exported student.

    Raises:
      AssertionError: the student does not evaluate to the accuracy of its run.
    """
    directory, student = runs / f'{row.name}-{seed}', runs / 'students' / f'{row.name}-{seed}'
    config = mnist5k_resnet8.get_config('few')
    config.update_from_flattened_dict(
        {'train.eval_every_epochs': 60, 'train.checkpoint_every_epochs': 60, 'seed': seed}
    )
    config.update_from_flattened_dict(row.fields)
    if row.teachers:
        folders = []
        for name, offset, follows in row.teachers:
            teacher_seed = offset + seed if follows else offset
            run(BY_NAME[name], teacher_seed, runs)
            folders.append(str(runs / 'students' / f'{name}-{teacher_seed}'))
        config.method.teachers = ','.join(folders)
    result = train.train_and_evaluate(config, directory)
    if not student.exists():
        export.export_student(directory, student)
        record = evaluate.evaluate_students([student])
        same = (record['deployed_top1'], round(record['deployed_nll'], 4))
        expected = (result['deployed_top1'], round(result['deployed_nll'], 4))
        if abs(same[0] - expected[0]) > 1e-9 or abs(same[1] - expected[1]) > 2e-4:
            raise AssertionError(f'{student}: {same} and not {expected}')
    return result


def seed_ensemble(seed: int, runs: Path) -> dict[str, Any]:
    """The mean of three plain networks of different seeds, in the form of a result."""
    results = [run(_PLAIN, offset + seed, runs) for _, offset, _ in _ENSEMBLE]
    students = [runs / 'students' / f'plain-{offset + seed}' for _, offset, _ in _ENSEMBLE]
    costs = ('parameters', 'flops', 'seconds')
    sums = {name: sum(result[name] for result in results) for name in costs}
    return {
        **evaluate.evaluate_students(students),
        **sums,
        'deployed_parameters': sums['parameters'],
        'deployed_flops': sums['flops'],
    }


def _mean_and_deviation(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f'{values[0]:.2f}'
    return f'{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}'


def table_row(label: str, results: Sequence[dict[str, Any]]) -> dict[str, str]:
    """One line: accuracies in percent, mean and sample standard deviation over the seeds."""
    first = results[0]
    costs = [
        ' / '.join(
            dict.fromkeys(f'{first[name] / unit:.1f}' for name in (cost, f'deployed_{cost}'))
        )
        for cost, unit in (('parameters', 1e3), ('flops', 1e6))
    ]
    branches = len(first['branch_top1']) > 1
    return {
        'method': label,
        'deployed': _mean_and_deviation([result['deployed_top1'] for result in results]),
        'member mean': _mean_and_deviation([statistics.mean(r['branch_top1']) for r in results]),
        'ensemble': _mean_and_deviation([r['ensemble_top1'] for r in results]) if branches else '',
        'params': costs[0],
        'MFLOPs': costs[1],
        # The machine is shared: the others waited more.
        'seconds': f'{min(result["seconds"] for result in results):.0f}',
    }


def main(arguments: Sequence[str]) -> None:
    """Runs what is not there yet, and prints and writes the tables."""
    seeds, runs = [int(seed) for seed in SEEDS.value], Path(RUNS.value)

    def table(rows: Sequence[Row], ensemble: bool = False) -> str:
        lines = []
        for row in rows:
            if ROWS.value and row.name not in ROWS.value:
                continue
            missing = [s for s in seeds if not (runs / f'{row.name}-{s}' / workdir.RESULT).exists()]
            if FINISHED.value and missing:
                lines.append({'method': row.label, 'deployed': 'not run'})
                continue
            lines.append(table_row(row.label, [run(row, seed, runs) for seed in seeds]))
            print(lines[-1], flush=True)
            if ensemble and row is _PLAIN:
                results = [seed_ensemble(seed, runs) for seed in seeds]
                lines.append(table_row('seed ensemble, three plain networks', results))
        return markdown_table(lines, COLUMNS) if lines else ''

    teachers = [run(BY_NAME[name], 0, runs) for name, _, _ in _ALL_TEACHERS]
    scores = ', '.join(
        f'{name} {result["deployed_top1"]:.2f} %'
        for name, result in zip(TEACHERS, teachers, strict=True)
    )
    versions = workdir.versions()
    names = ', '.join(map(str, seeds))
    finished = ' --only_finished' if FINISHED.value else ''
    command = f'python -m benchmarks.methods --seeds={names.replace(" ", "")}{finished}'
    text = f"""# The methods on real digits

Made by `{command} --output=docs/methods.md`;
`make methods` runs what is not run here, too.
{workdir.device_name()}, JAX {versions['jax']}, Python {versions['python']}, cores shared.

ResNet-8 on MNIST's sample of 5,000 digits, 50 training images of each class, 300 steps
(`configs/mnist5k_resnet8.py:few`), seeds {names}; test top-1 in %, mean ± sample standard
deviation over the seeds. 1,000 test images: one is 0.1 %. This shows that every method trains, is
exported and evaluates the same from its folder; on digits that nearly all get right, it does not
rank the methods.

deployed: what the method takes away (a branch, the leader, or the ensemble). params (thousands),
MFLOPs (one image, 2 per multiply-add): of the training graph / of what is deployed. seconds: of the
fastest seed's training, on cores shared with other work and in part before the step became
faster: no guide to what a method costs, which benchmarks/README.md has.

{table(METHODS, ensemble=True)}

## Little data, teachers that saw more

Three networks trained on all 4,000 digits ({scores})
teach students that see 50 or 100 images a class, 300 steps each. EKD deploys its ensemble of three
branches above one shared stage. Plain with 50 images a class is the first row above.

{table(LIMITED)}
"""
    print(text)
    if OUTPUT.value:
        Path(OUTPUT.value).write_text(text)


if __name__ == '__main__':
    app.run(main)
