"""Tables as plain text and as Markdown, and the tables of runs."""

import itertools
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from one_jax.reporting.runs import ReportedRun

Row = Mapping[str, Any]

WIDTH = 120
SHORTEST_NAME = 16
COLUMNS = ('run', 'method', 'params', 'MFLOPs', 'branches')
COLUMNS += ('teacher', 'ensemble', 'deployed', 'seed', 'time')
LEGEND = """\
Test top-1 accuracy in %. branches: mean ± standard deviation over the branches, then each branch.
params, MFLOPs (one image forward, 2 per multiply-add): the training graph, then what is deployed.
n: runs that differ only in the seed, mean ± sample standard deviation over the n seeds."""
# Measures in the table of one run: their names in a result, and decimals.
MEASURES = {'top-1 %': ('top1', 2), 'top-5 %': ('top5', 2), 'NLL': ('nll', 4), 'ECE %': ('ece', 2)}


def format_cell(value: Any, digits: int = 2) -> str:
    """Formats a cell; floats get `digits` decimals, None becomes an empty cell."""
    if value is None:
        return ''
    return f'{value:.{digits}f}' if isinstance(value, float) else str(value)


def format_table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Formats a table as plain text, words to the left and numbers to the right.

    Floats get two decimals, None and missing cells stay empty, and a string may have several lines.
    """
    cells = [[format_cell(row.get(column)).split('\n') for row in rows] for column in columns]
    widths = [
        max(map(len, [name, *itertools.chain(*column)]))
        for name, column in zip(columns, cells, strict=True)
    ]
    numeric = [all(re.match(r'[-\d]|$', cell[0]) for cell in column) for column in cells]

    def join(entries: Iterable[str]) -> str:
        aligned = (
            entry.rjust(width) if right else entry.ljust(width)
            for entry, width, right in zip(entries, widths, numeric, strict=True)
        )
        return '  '.join(aligned).rstrip()

    lines = [columns, ['-' * width for width in widths]]
    for row in zip(*cells, strict=True):
        lines += itertools.zip_longest(*row, fillvalue='')
    return '\n'.join(map(join, lines))


def markdown_table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Formats the table of `format_table` as Markdown."""
    lines = [columns, ['---'] * len(columns)]
    for row in rows:
        cells = [format_cell(row.get(column)) for column in columns]
        lines.append([cell.replace('|', '\\|').replace('\n', '<br>') for cell in cells])
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def mean_and_deviation(
    values: Iterable[float | None], separator: str = ' ', digits: int = 2, sign: str = ''
) -> str:
    """Formats '71.20 ± 0.15' with the sample standard deviation, or a single value alone."""
    known = [value for value in values if value is not None]
    if not known:
        return ''
    mean = f'{statistics.mean(known):{sign}.{digits}f}'
    if len(known) == 1:
        return mean
    return f'{mean}{separator}± {statistics.stdev(known):.{digits}f}'


def run_table(result: Mapping[str, Any]) -> str:
    """Formats the table of one run: a row for each branch, the teacher and the mean ensemble.

    The result is the content of result.json or any evaluation record; missing entries are left out.
    Heterogeneous branches have columns for their networks, parameters and FLOPs.
    """
    num_branches = len(result.get('branch_top1') or [])
    networks = result.get('branch_network')

    def row(label: str, name: str, form: Callable[[Any, int], str] = format_cell) -> dict[str, str]:
        deployed = label.removeprefix('mean ') == result.get('deployed')
        cells = {'output': f'{label} (deployed)' if deployed else label}
        for heading, (measure, digits) in MEASURES.items():
            value = result.get(f'{name}_{measure}')
            cells[heading] = '' if value is None else form(value, digits)
        return cells

    rows = []
    for k in range(num_branches):
        rows.append(row(f'branch {k}', 'branch', lambda values, d, k=k: format_cell(values[k], d)))
        if networks:
            rows[-1]['network'] = networks[k]
            rows[-1]['params'] = _count(result['branch_parameters'][k])
            rows[-1]['MFLOPs'] = f'{result["branch_flops"][k] / 1e6:.1f}'
    if num_branches > 1:
        rows.append(row('branch mean', 'branch', lambda x, d: mean_and_deviation(x, digits=d)))
    if result.get('teacher_top1') is not None:
        rows.append(row('teacher', 'teacher'))
    # The mean of one branch is that branch.
    if num_branches != 1:
        rows.append(row('mean ensemble', 'ensemble'))
    facts = ('name', 'method', 'network', 'dataset', 'split', 'seed', 'step')
    heading = ', '.join(f'{fact} {result[fact]}' for fact in facts if result.get(fact) is not None)
    columns = ['output', *(['network', 'params', 'MFLOPs'] if networks else []), *MEASURES]
    lines = [heading, format_table(rows, columns)]
    if None not in (result.get('pairwise_l2'), result.get('disagreement')):
        lines.append(
            f'diversity: mean L2 distance between two branches {result["pairwise_l2"]:.4f}, '
            f'disagreement {result["disagreement"]:.2f} %'
        )
    return '\n'.join(lines)


def runs_table(runs: Sequence[ReportedRun]) -> str:
    """Formats a table for each data set, with the legend of their columns."""
    groups = map(table_of, grouped(runs, 'data'))
    return '\n\n'.join([*(f'{heading}\n{_fit(rows)}' for heading, rows in groups), LEGEND])


def grouped(runs: Iterable[ReportedRun], attribute: str) -> list[list[ReportedRun]]:
    """Groups runs by the value of an attribute, in order of appearance."""
    groups: dict[str, list[ReportedRun]] = {}
    for run in runs:
        groups.setdefault(getattr(run, attribute), []).append(run)
    return list(groups.values())


def table_of(runs: Sequence[ReportedRun]) -> tuple[str, list[dict[str, Any]]]:
    """Returns the heading and the rows for runs on one data set.

    Runs that differ only in the seed are together, above the row of their mean. The network is in
    the heading; if there are several, it is below the name of each run.
    """
    networks = list(dict.fromkeys(run.network for run in runs))
    rows = []
    for group in grouped(runs, 'settings'):
        group_rows = [*map(_run_row, group), *_seeds_row(group)]
        if len(networks) > 1:
            for row in group_rows:
                row['run'] += f'\n  {group[0].network}'
        rows += group_rows
    return f'{runs[0].data}, {networks[0]}' if len(networks) == 1 else runs[0].data, rows


def _run_row(run: ReportedRun) -> dict[str, Any]:
    row = {'run': run.name, 'method': run.method, 'seed': run.seed}
    result = run.result
    if not result:
        step = max((record['step'] for record in run.records), default=0)
        return row | {'time': f'unfinished\nstep {step}'}
    branches = [format_cell(value) for value in result.get('branch_top1') or []]
    lines = [mean_and_deviation(result.get('branch_top1') or [])]
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


def _seeds_row(runs: Sequence[ReportedRun]) -> list[dict[str, Any]]:
    """Returns the row of the mean over seeds, or no row if fewer than two seeds are finished."""
    finished = [run for run in runs if run.result]
    # The first of several runs with one seed counts.
    results = list({run.seed: run.result for run in reversed(finished)}.values())
    if len(results) < 2:
        return []
    row = _run_row(finished[0])
    for column in ('teacher', 'ensemble', 'deployed'):
        if row[column] is not None:
            values = [result.get(f'{column}_top1') for result in results]
            row[column] = mean_and_deviation(values, '\n')
    branches = [result.get('branch_top1') or [] for result in results]
    branches = [values for values in branches if values and None not in values]
    row |= {
        'run': 'mean over seeds',
        'branches': mean_and_deviation(map(statistics.mean, branches)),
        'seed': f'n={len(results)}',
        'time': _duration(statistics.mean(result.get('seconds') or 0 for result in results)),
    }
    return [row]


def _fit(rows: Sequence[Row]) -> str:
    """Formats a table in `WIDTH` columns; long names lose their middle: they differ at the ends."""
    table = format_table(rows, COLUMNS)
    longest = max(len(line) for row in rows for line in row['run'].split('\n'))
    excess = max(map(len, table.splitlines())) - WIDTH
    if excess <= 0:
        return table
    tail = max(longest - excess, SHORTEST_NAME) // 2
    long_middle = rf'(?m)^(.{{{tail - 1}}}).{{2,}}(.{{{tail}}})$'
    rows = [{**row, 'run': re.sub(long_middle, r'\1…\2', row['run'])} for row in rows]
    return format_table(rows, COLUMNS)


def _training_and_deployed(result: Row, name: str, form: Callable[[float], str]) -> str:
    """Formats the cost of the training graph above that of the deployed one, if they differ."""
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
