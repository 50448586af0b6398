"""Prepares a data set: `python -m one_jax.prepare NAME [--data_dir=DIR]`, or `--list`."""

import argparse
import logging as python_logging
from collections.abc import Sequence

from absl import logging

from one_jax.data import preparation, prepared
from one_jax.reporting.tables import format_table
from one_jax.runtime import cli


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepares the data set that the arguments name, or prints the table."""
    parser = argparse.ArgumentParser(
        prog='python -m one_jax.prepare',
        description='Downloads and builds a data set, or explains what to download by hand.',
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('name', nargs='?', metavar='NAME', help='as in --config.data.name')
    what.add_argument('--list', action='store_true', help='print the known data sets')
    parser.add_argument('--data_dir', default='', metavar='DIR', help="default: TFDS's own")
    options = parser.parse_args(arguments)
    logging.set_verbosity(logging.ERROR)
    python_logging.getLogger('urllib3').setLevel(python_logging.ERROR)
    if options.list:
        rows = preparation.table_rows(options.data_dir)
        print(f'in {prepared.resolve_data_dir(options.data_dir)}:')
        print(format_table(rows, list(rows[0])))
    else:
        preparation.prepare(options.name, options.data_dir)


if __name__ == '__main__':
    with cli.reporting_errors():
        main()
