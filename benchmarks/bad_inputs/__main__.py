"""Runs the commands on hundreds of malformed inputs: tracebacks, hangs, silent acceptances?

    python -m benchmarks.bad_inputs [--kind=images] [--only=TEXT] [--sample=N] [--jobs=N]

Every case states what is due. *Refused*: one line of error, status 1 or 2, nothing written.
*Accepted*: status 0 and the right output, e.g. the prediction for the same image undamaged. The
input must stay as it is, code in it must not run, and two minutes are a hang. Prints every failure
with its command and a table by kind; exits with 1 if there is a failure. Linux only.

Cases run in forks of one process (`runner`), two and more at a time; `main` stops where it would
compile unless the case trains.
"""

import argparse
import collections
import gc
import multiprocessing
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SCRATCH = Path(tempfile.mkdtemp(prefix='one_jax_bad_inputs_'))
# Some cases run as another user.
SCRATCH.chmod(0o755)
# Set before JAX is imported: shared programs that compile quickly, and a home folder of our own.
os.environ |= {
    'HOME': str(SCRATCH),
    'JAX_PLATFORMS': 'cpu',
    'JAX_COMPILATION_CACHE_DIR': str(SCRATCH / 'programs'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
    'TF_CPP_MIN_LOG_LEVEL': '3',
    'XLA_FLAGS': '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true',
}

from benchmarks.bad_inputs import (  # noqa: E402
    bases,
    configs,
    folders,
    images,
    records,
    runner,
    students,
    weights,
    workdirs,
)
from one_jax.reporting.tables import markdown_table  # noqa: E402

KINDS = {
    'images': images.image_cases,
    'folders': folders.folder_cases,
    'configs': configs.config_cases,
    'students': students.student_cases,
    'workdirs': workdirs.workdir_cases,
    'weights': weights.weights_cases,
    'records': records.record_cases,
}
# How the reports of the runner begin.
FAULTS = ('traceback', 'hang', 'silent acceptance')
COLUMNS = ('kind', 'cases', 'refused', 'accepted', *FAULTS, 'other')


def _enter_worker(cases: Sequence[runner.Case], places: Mapping[str, Path]) -> None:
    """Gives a worker what a pool cannot send, because it was forked with it."""
    global run_one

    def run_one(index: int) -> tuple[int, str]:
        try:
            return index, runner.run_case(cases[index], SCRATCH / f'case_{index}', places)
        except Exception as error:  # One faulty case does not hide the others.
            return index, f'the case itself: {error!r}'


def _run_one(index: int) -> tuple[int, str]:
    return run_one(index)


def run_all(cases: Sequence[runner.Case], places: Mapping[str, Path], jobs: int) -> dict[int, str]:
    """Runs the cases, reports what is wrong as it is found, and returns it by index."""
    problems = {}
    # Forks copy less of what the garbage collector does not visit.
    gc.freeze()
    fork = multiprocessing.get_context('fork')
    with fork.Pool(jobs, _enter_worker, (cases, places)) as pool:
        for index, problem in pool.imap_unordered(_run_one, range(len(cases))):
            if problem:
                problems[index], case = problem, cases[index]
                own = SCRATCH / f'case_{index}'
                filled = {**places, 'input': own / 'input', 'output': own / 'output'}
                print(f'{case.kind}: {case.name}: {problem}')
                print(f'    {shlex.join(runner.fill(case.command, filled))}', flush=True)
            else:
                shutil.rmtree(SCRATCH / f'case_{index}', ignore_errors=True)
    return problems


def table(cases: Sequence[runner.Case], problems: Mapping[int, str]) -> str:
    """Returns the table: for each kind how many cases ended how."""
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for index, case in enumerate(cases):
        ended = 'refused' if case.accepts is None else 'accepted'
        if problem := problems.get(index, ''):
            ended = next((fault for fault in FAULTS if problem.startswith(fault)), 'other')
        for kind in (case.kind, 'all'):
            counts[kind].update(('cases', ended))
    rows: list[dict[str, Any]] = [
        {'kind': kind, **{name: str(counts[kind][name]) for name in COLUMNS[1:]}}
        for kind in sorted(counts, key='all'.__eq__)
    ]
    return markdown_table(rows, COLUMNS)


def main() -> int:
    """Runs the cases that the arguments choose; returns the exit status."""
    parser = argparse.ArgumentParser(prog='python -m benchmarks.bad_inputs')
    parser.add_argument('--kind', action='append', choices=KINDS, help='one of the kinds; again')
    parser.add_argument('--only', default='', help='a part of the names of the cases to run')
    parser.add_argument('--sample', type=int, default=1, help='runs every Nth case')
    parser.add_argument('--jobs', type=int, default=os.cpu_count(), help='cases at a time')
    parser.add_argument('--keep', action='store_true', help='keeps the files of failures')
    options = parser.parse_args()
    started = time.monotonic()
    places = {name: SCRATCH / 'bases' / name for name in bases.NAMES}
    cases = [case for kind in options.kind or KINDS for case in KINDS[kind](places)]
    cases = [case for case in cases if options.only in case.name][:: options.sample]
    runner.start()
    bases.make(places)
    print(f'{len(cases)} cases; undamaged inputs after {time.monotonic() - started:.0f} s')
    problems = run_all(cases, places, options.jobs)
    print(table(cases, problems))
    print(f'{len(cases)} cases, {len(problems)} failures, {time.monotonic() - started:.0f} s')
    if problems and options.keep:
        print(f'files: {SCRATCH}')
    else:
        shutil.rmtree(SCRATCH, ignore_errors=True)
    return int(bool(problems))


if __name__ == '__main__':
    sys.exit(main())
