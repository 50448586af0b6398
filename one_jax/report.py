"""Prints tables of runs.

    python -m one_jax.report DIR... [--output=DIR]

Prints a table for each data set, with a row for every run. Runs that differ only in the seed are
followed by a row with their mean and standard deviation. --output also writes the tables to
report.md and draws the accuracy over the epochs to curves.png.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from one_jax.errors import explain
from one_jax.reporting import runs as runs_lib
from one_jax.reporting import tables
from one_jax.runtime import cli


def write_report(runs: Sequence[runs_lib.ReportedRun], directory: str | Path) -> None:
    """Writes report.md, and for each data set with evaluated runs their curves as PNG."""
    from one_jax.reporting import curves  # matplotlib: the tables alone start without it

    directory, text = Path(directory), ['# Runs']
    groups = tables.grouped(runs, 'data')
    with explain(f'--output={str(directory)!r} cannot be written, give another one', OSError):
        directory.mkdir(parents=True, exist_ok=True)
        for group in groups:
            heading, rows = tables.table_of(group)
            text += [f'## {heading}', tables.markdown_table(rows, tables.COLUMNS)]
            name = 'curves.png'
            if len(groups) > 1:
                name = f'curves_{re.sub(r"[^a-z0-9]+", "_", group[0].data.lower()).strip("_")}.png'
            evaluated = {run.name: run.records for run in group if curves.evaluated(run.records)}
            if evaluated:
                curves.compare_runs(evaluated, directory / name)
                text.append(f'![Test accuracy over the epochs]({name})')
        text.append(tables.LEGEND)
        (directory / 'report.md').write_text('\n\n'.join(text) + '\n')


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables of the workdirs that the arguments name."""
    parser = argparse.ArgumentParser(
        prog='python -m one_jax.report', description='Print tables of runs, finished or not.'
    )
    parser.add_argument('workdirs', nargs='+', metavar='DIR', help='the --workdir of a run')
    parser.add_argument('--output', metavar='DIR', help='also write report.md and curves.png here')
    options = parser.parse_args(arguments)
    runs = runs_lib.read_runs(options.workdirs)
    print(tables.runs_table(runs))
    if options.output:
        write_report(runs, options.output)
        print(f'written to {options.output}')


if __name__ == '__main__':
    with cli.reporting_errors():
        main()
