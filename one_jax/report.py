"""Tables of runs.

    python -m one_jax.report DIR... [--output=DIR]

prints a table for each data set, with a row for every run and, below runs that differ in the seed
only, a row with their mean and standard deviation. With --output the tables are also written as
Markdown, report.md, and the runs' accuracy over the epochs is drawn, curves.png.
"""

import argparse
import dataclasses
import json
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from one_jax import config as config_lib
from one_jax import metrics, workdir
from one_jax.analysis import curves
from one_jax.analysis.tables import Row, format_cell, format_table, markdown_table
from one_jax.errors import UserError

WIDTH = 120
SHORTEST_NAME = 16
COLUMNS = ('run', 'method', 'params', 'MFLOPs', 'branches')
COLUMNS += ('teacher', 'ensemble', 'deployed', 'seed', 'time')
# Of one run: what to look up, and decimals.
MEASURES = {'top-1 %': ('top1', 2), 'top-5 %': ('top5', 2), 'NLL': ('nll', 4), 'ECE %': ('ece', 2)}
LEGEND = """\
Test top-1 accuracy in %. branches: mean ± standard deviation over a run's branches, then each one.
params, MFLOPs (one image forward, 2 per multiply-add): the training graph, then what is deployed.
n: runs that differ in the seed only, mean ± sample standard deviation over the n seeds."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a workdir says of its run.

    Attributes:
      name: of the run; the workdir's path, where several have one name.
      config: the content of config.json, {} without it.
      result: the content of result.json, None of an unfinished run.
      records: of metrics.jsonl.
    """

    name: str
    config: Mapping[str, Any]
    result: Mapping[str, Any] | None
    records: Sequence[Mapping[str, Any]]

    def field(self, name: str) -> Any:
        """A field of the config, by its dotted name; None where it is missing."""
        return config_lib.flatten(self.config).get(name)

    @property
    def seed(self) -> int | None:
        return (self.result or {}).get('seed', self.field('seed'))

    @property
    def network(self) -> str:
        name = (self.result or {}).get('network', self.field('model.name'))
        return name or 'unknown network'

    @property
    def data(self) -> str:
        """The data set and the split, which say what a run can be compared with."""
        name = (self.result or {}).get('dataset', self.field('data.name')) or 'unknown data set'
        generated = ' (generated images)' if self.field('data.generated_examples') else ''
        return name + generated

    @property
    def recipe(self) -> str:
        """Equal for runs that differ in nothing but the seed (their own and their teachers')."""
        fields = config_lib.flatten(self.config)
        ignored = {'seed', *config_lib.MACHINE_FIELDS}
        teachers = (self.result or {}).get('teachers') or []
        kinds = [[teacher.get('network'), teacher.get('method')] for teacher in teachers]
        return json.dumps([{name: fields[name] for name in sorted(fields.keys() - ignored)}, kinds])


def read_run(directory: str | Path) -> Run:
    """Reads a workdir, finished or not.

    Raises:
      UserError: it is none, or a file in it is damaged.
    """
    directory = Path(directory)
    contents = {}
    for name in (workdir.CONFIG, workdir.RESULT):
        contents[name] = None
        if (directory / name).is_file():
            contents[name] = workdir.read_json(directory / name)
            if not isinstance(contents[name], dict):
                raise UserError(f'{str(directory / name)!r} is damaged: not a JSON object')
    result, records = contents[workdir.RESULT], []
    if (directory / metrics.FILE_NAME).is_file():
        records = metrics.read_records(directory / metrics.FILE_NAME)
    elif result is None:
        raise UserError(
            f'{str(directory)!r} is no workdir: there is neither {workdir.RESULT} nor '
            f'{metrics.FILE_NAME} in it; give the --workdir of a run'
        )
    name = (result or {}).get('name') or directory.resolve().name
    return Run(name, contents[workdir.CONFIG] or {}, result, records)


def _mean_and_deviation(
    values: Iterable[float | None], separator: str = ' ', digits: int = 2
) -> str:
    """'71.20 ± 0.15' with the sample standard deviation; of one value, that value alone."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return f'{known[0]:.{digits}f}' if known else ''
    mean, deviation = statistics.mean(known), statistics.stdev(known)
    return f'{mean:.{digits}f}{separator}± {deviation:.{digits}f}'


def _training_and_deployed(result: Row, name: str, form: Callable[[float], str]) -> str:
    """A cost of the training graph, and below it that of what is deployed, if it is another."""
    costs = [result.get(name), result.get(f'deployed_{name}')]
    return '\n'.join(dict.fromkeys(form(cost) for cost in costs if cost is not None))


def _count(number: float) -> str:
    return f'{number / 1e6:.2f}M' if number >= 1e6 else f'{number / 1e3:.1f}k'


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ''
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f'{hours} h {minutes:02} m'
    return f'{minutes} m {seconds:02} s' if minutes else f'{seconds} s'


def _run_row(run: Run) -> dict[str, Any]:
    row = {
        'run': run.name,
        'method': (run.result or {}).get('method', run.field('method.name')),
        'seed': run.seed,
    }
    if run.result is None:
        step = max((record['step'] for record in run.records), default=0)
        return row | {'time': f'unfinished\nstep {step}'}
    result = run.result
    branches = [format_cell(value) for value in result.get('branch_top1') or []]
    lines = [_mean_and_deviation(result.get('branch_top1') or [])]
    if len(branches) > 1:
        lines += [' '.join(branches[start : start + 3]) for start in range(0, len(branches), 3)]
    return row | {
        'params': _training_and_deployed(result, 'parameters', _count),
        'MFLOPs': _training_and_deployed(result, 'flops', lambda flops: f'{flops / 1e6:.1f}'),
        'branches': '\n'.join(lines),
        'teacher': result.get('teacher_top1'),
        'ensemble': result.get('ensemble_top1') if len(branches) > 1 else None,
        'deployed': result.get('deployed_top1'),
        'time': _duration(result.get('seconds')),
    }


def _seeds_row(runs: Sequence[Run]) -> dict[str, Any] | None:
    """The row of finished runs of one recipe; None for a single seed, whose row says it all."""
    by_seed: dict[int | None, Run] = {}
    for run in runs:
        if run.result is not None:
            by_seed.setdefault(run.seed, run)
    if len(by_seed) < 2:
        return None
    results = [run.result for run in by_seed.values()]
    first = _run_row(next(iter(by_seed.values())))

    def over_seeds(column: str) -> str | None:
        if first[column] is None:
            return None
        return _mean_and_deviation([result.get(f'{column}_top1') for result in results], '\n')

    branches = [result['branch_top1'] for result in results if result.get('branch_top1')]
    return {
        'run': 'mean over seeds',
        **{column: first[column] for column in ('method', 'params', 'MFLOPs')},
        'branches': _mean_and_deviation(map(statistics.mean, branches)),
        **{column: over_seeds(column) for column in ('teacher', 'ensemble', 'deployed')},
        'seed': f'n={len(results)}',
        'time': _duration(statistics.mean(result.get('seconds') or 0 for result in results)),
    }


def _group(runs: Iterable[Run], attribute: str) -> list[list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(getattr(run, attribute), []).append(run)
    return list(groups.values())


def _table(runs: Sequence[Run]) -> tuple[str, list[dict[str, Any]]]:
    """The heading and the rows of the runs on one data set, the seeds of a recipe together.

    The network is in the heading; where there are several, it is below the name of each run.
    """
    networks = list(dict.fromkeys(run.network for run in runs))
    rows = []
    for group in _group(runs, 'recipe'):
        group_rows = [*map(_run_row, group), *filter(None, [_seeds_row(group)])]
        if len(networks) > 1:
            for row in group_rows:
                row['run'] += f'\n  {group[0].network}'
        rows += group_rows
    return f'{runs[0].data}, {networks[0]}' if len(networks) == 1 else runs[0].data, rows


def _fit(rows: Sequence[Row]) -> str:
    """The table in `WIDTH` columns; long names lose their middle, for runs differ at the ends."""
    table = format_table(rows, COLUMNS)
    longest = max(len(line) for row in rows for line in row['run'].split('\n'))
    excess = max(map(len, table.splitlines())) - WIDTH
    if excess <= 0:
        return table
    tail = max(longest - excess, SHORTEST_NAME) // 2
    long_middle = rf'(?m)^(.{{{tail - 1}}}).{{2,}}(.{{{tail}}})$'
    return format_table(
        [{**row, 'run': re.sub(long_middle, r'\1…\2', row['run'])} for row in rows], COLUMNS
    )


def run_table(result: Mapping[str, Any]) -> str:
    """The table of one run: a row for each branch, the teacher and the mean ensemble.

    Of unlike branches it has their networks, parameters and FLOPs too.

    Args:
      result: the content of result.json, or any evaluation record; what is missing is left out.
    """
    num_branches = len(result.get('branch_top1') or [])

    def row(label: str, name: str, form: Callable[[Any, int], str] = format_cell) -> dict[str, str]:
        cells = {'predictor': label}
        for heading, (measure, digits) in MEASURES.items():
            value = result.get(f'{name}_{measure}')
            cells[heading] = '' if value is None else form(value, digits)
        return cells

    unlike = result.get('branch_network')

    def branch_row(branch: int) -> dict[str, str]:
        cells = row(f'branch {branch}', 'branch', lambda values, d: format_cell(values[branch], d))
        if unlike:
            cells['network'] = unlike[branch]
            cells['params'] = _count(result['branch_parameters'][branch])
            cells['MFLOPs'] = f'{result["branch_flops"][branch] / 1e6:.1f}'
        return cells

    rows = [branch_row(branch) for branch in range(num_branches)]
    if num_branches > 1:
        rows.append(row('branch mean', 'branch', lambda x, d: _mean_and_deviation(x, digits=d)))
    if result.get('teacher_top1') is not None:
        rows.append(row('teacher', 'teacher'))
    # The mean of one branch is that branch.
    if num_branches != 1:
        rows.append(row('mean ensemble', 'ensemble'))
    for row in rows:
        if row['predictor'].removeprefix('mean ') == result.get('deployed'):
            row['predictor'] += ' (deployed)'
    facts = ('name', 'method', 'network', 'dataset', 'split', 'seed', 'step')
    heading = ', '.join(f'{fact} {result[fact]}' for fact in facts if result.get(fact) is not None)
    columns = ['predictor', *(['network', 'params', 'MFLOPs'] if unlike else []), *MEASURES]
    lines = [heading, format_table(rows, columns)]
    if result.get('pairwise_l2') is not None:
        lines.append(
            f'diversity: mean L2 distance between two branches {result["pairwise_l2"]:.4f}, '
            f'disagreement {result["disagreement"]:.2f} %'
        )
    return '\n'.join(lines)


def write_report(runs: Sequence[Run], directory: str | Path) -> None:
    """Writes report.md, and curves.png if a run was evaluated (one for each of several data sets).

    Raises:
      UserError: the directory cannot be written.
    """
    directory, text = Path(directory), ['# Runs']
    tables = _group(runs, 'data')
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for group in tables:
            heading, rows = _table(group)
            text += [f'## {heading}', markdown_table(rows, COLUMNS)]
            name = 'curves.png'
            if len(tables) > 1:
                name = f'curves_{re.sub(r"[^a-z0-9]+", "_", group[0].data.lower()).strip("_")}.png'
            evaluated = {run.name: run.records for run in group if curves.evaluated(run.records)}
            if evaluated:
                curves.compare_runs(evaluated, directory / name)
                text.append(f'![Test accuracy over the epochs]({name})')
        text.append(LEGEND)
        (directory / 'report.md').write_text('\n\n'.join(text) + '\n')
    except OSError as error:
        raise UserError(
            f'--output={str(directory)!r} cannot be written ({error.strerror}): give another one'
        ) from None


def read_runs(directories: Iterable[str | Path]) -> list[Run]:
    """Reads several workdirs, each once; runs of equal names are told apart by their paths."""
    paths = {Path(directory).resolve(): Path(directory) for directory in directories}
    runs = {path: read_run(path) for path in paths.values()}
    names = Counter(run.name for run in runs.values())
    return [
        dataclasses.replace(run, name=str(path)) if names[run.name] > 1 else run
        for path, run in runs.items()
    ]


def runs_table(runs: Sequence[Run]) -> str:
    """The tables of several runs, one for each data set, and what their columns are."""
    text = ''
    for group in _group(runs, 'data'):
        heading, rows = _table(group)
        text += f'{heading}\n{_fit(rows)}\n\n'
    return text + LEGEND


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables of the workdirs that the arguments name."""
    parser = argparse.ArgumentParser(
        prog='python -m one_jax.report', description='Tables of runs, finished or not.'
    )
    parser.add_argument('workdirs', nargs='+', metavar='DIR', help='the --workdir of a run')
    parser.add_argument('--output', metavar='DIR', help='write report.md and curves.png here too')
    options = parser.parse_args(arguments)
    runs = read_runs(options.workdirs)
    print(runs_table(runs))
    if options.output:
        write_report(runs, options.output)
        print(f'written to {options.output}')


if __name__ == '__main__':
    try:
        main()
    except UserError as error:
        sys.exit(f'error: {error}')
