"""Kills a training command at random moments, again and again: is anything lost?

    python -m benchmarks.faults [--kills=30] [--seed=0]

The recipe is tiny (ResNet-8, 8x8 generated images, a few minutes for 30 kills on two cores); the
command is the real one, in a process of its own. A run is killed, started again with the same
command, killed again, ..., and then left to end. It must leave the parameters, statistics and
optimiser state, bit for bit, and the metrics.jsonl, byte for byte, of a run that nobody disturbed.

Signal and moment are drawn: the phase in which to strike, how often to let it pass before, and how
long to wait once it has begun. In which phase the process was is read from its output and files:
after a SIGKILL, when they no longer change, otherwise just before the signal. It exits with 1 if
any run differs, or ends in an error.
"""

import collections
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import flags

from one_jax import checkpoint, command, metrics, workdir
from one_jax.analysis.tables import markdown_table
from one_jax.named_arrays import named_leaves

KILLS = flags.DEFINE_integer('kills', 30, 'How many signals must have ended a process.', 1)
SEED = flags.DEFINE_integer('seed', 0, 'Of the signals and moments.')

STEPS, STEPS_PER_EPOCH = 160, 8
RECIPE = (
    '--config=configs/image_folder.py:smoke',
    '--config.data.image_size=8',
    '--config.data.generated_examples=64',
    f'--config.data.batch_size={64 // STEPS_PER_EPOCH}',
    '--config.data.augment=pad_crop_flip',
    '--config.model.num_branches=2',
    f'--config.train.steps={STEPS}',
    '--config.train.log_every=3',
    '--config.train.ema_decay=0.9',
)
SIGNALS = (signal.SIGKILL, signal.SIGTERM)
PHASES = ('start-up', 'steps', 'save', 'evaluation', 'end')
# Seconds: the longest delay of a strike in each phase.
LONGEST_DELAY = {'start-up': 6.0, 'steps': 0.05, 'save': 0.05, 'evaluation': 0.01, 'end': 1.0}
# A run is left alone after so many kills.
MOST_KILLS_A_RUN = 8


class Run:
    """One workdir, and the processes that train in it one after the other.

    Args:
      folder: of this run: the workdir, and the output of its newest process.
      cache: of compiled programs.
    """

    def __init__(self, folder: Path, cache: Path):
        self.workdir, self._log = folder / 'run', folder / 'log'
        folder.mkdir()
        self._command = (
            *(sys.executable, '-m', 'one_jax.main', *RECIPE),
            f'--config.train.compilation_cache_dir={cache}',
            f'--workdir={self.workdir}',
        )

    def start(self) -> subprocess.Popen:
        """Starts the command, or goes on with it."""
        environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONUNBUFFERED': '1'}
        with self._log.open('w') as log:
            return subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, env=environment
            )

    def output(self) -> str:
        """What the newest process has printed."""
        return self._log.read_text(errors='replace')

    def phase(self) -> str:
        """What the newest process is doing, or was doing when it ended."""
        if not any(line.startswith(('step ', 'epoch ')) for line in self.output().splitlines()):
            return 'start-up'
        checkpoints = self.workdir / workdir.CHECKPOINTS
        if checkpoints.is_dir() and any(not name.isdigit() for name in os.listdir(checkpoints)):
            return 'save'
        records = metrics.read_records(self.workdir)
        step, split = (records[-1]['step'], records[-1]['split']) if records else (0, 'train')
        if split == 'train' and step and step % STEPS_PER_EPOCH == 0:
            return 'evaluation'
        return 'end' if step == STEPS else 'steps'

    def differences(self, other: 'Run') -> list[str]:
        """The arrays of the newest checkpoint, and the records, that are not those of `other`."""
        found = []
        own, others = self._final(), other._final()
        for name in sorted(own.keys() | others.keys()):
            pair = own.get(name), others.get(name)
            same = all(array is not None for array in pair) and pair[0].dtype == pair[1].dtype
            if not same or not np.array_equal(*pair):
                found.append(name)
        records = [(run.workdir / metrics.FILE_NAME).read_bytes() for run in (self, other)]
        return found + ([metrics.FILE_NAME] if records[0] != records[1] else [])

    def _final(self) -> dict[str, np.ndarray]:
        with checkpoint.Checkpoints(
            self.workdir / workdir.CHECKPOINTS, read_only=True
        ) as checkpoints:
            return {'step': np.asarray(checkpoints.latest_step()), **self._arrays(checkpoints)}

    def _arrays(self, checkpoints: checkpoint.Checkpoints) -> dict[str, np.ndarray]:
        leaves = named_leaves(checkpoints.read().state)
        return {f'state/{name}': np.asarray(leaf) for name, leaf in leaves.items()}


def strike(run: Run, generator: random.Random) -> tuple[str, str] | None:
    """Starts a process and sends it a signal at a random moment.

    Returns:
      The name of the signal and the phase it came in; None if the process was at its end before.

    Raises:
      AssertionError: the process ended in an error of its own.
    """
    number, wanted = generator.choice(SIGNALS), generator.choice(PHASES)
    passes, delay = generator.randrange(4), generator.uniform(0, LONGEST_DELAY[wanted])
    process = run.start()
    phase = 'start-up'
    while process.poll() is None:
        before, phase = phase, run.phase()
        if phase == wanted:
            if passes == 0 or wanted in ('start-up', 'end'):
                break
            passes -= before != wanted
        time.sleep(0.001)
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        phase = run.phase()
        process.send_signal(number)
    status = process.wait()
    if status == 0:
        return None
    if status not in (-number, 128 + number):
        raise AssertionError(f'exit status {status} after {number.name}:\n{run.output()}')
    return number.name, run.phase() if number == signal.SIGKILL else phase


def campaign(kills: int, seed: int, folder: Path) -> tuple[collections.Counter, int, list[str]]:
    """Kills until `kills` have landed, and lets every run come to its end.

    Returns:
      How many kills there were by signal and phase; the number of runs; what differed, in words.
    """
    generator = random.Random(seed)
    reference = Run(folder / 'reference', folder / 'cache')
    _finish(reference)
    landed: collections.Counter = collections.Counter()
    differing, runs = [], 0
    while landed.total() < kills:
        run = Run(folder / f'{runs}', folder / 'cache')
        runs += 1
        before = landed.total()
        while landed.total() < min(kills, before + MOST_KILLS_A_RUN):
            where = strike(run, generator)
            if where is None:
                break
            landed[where] += 1
            print(f'kill {landed.total()}: run {runs}, {where[0]} in {where[1]}', flush=True)
        _finish(run)
        differences = run.differences(reference)
        differing += [f'run {runs}: {name}' for name in differences]
        print(f'run {runs} ended, {len(differences)} differences', flush=True)
    return landed, runs, differing


def _finish(run: Run) -> None:
    if run.start().wait():
        raise AssertionError(f'the run did not come to its end:\n{run.output()}')


def main() -> None:
    """Runs the campaign, prints the table, and exits with 1 on any difference."""
    with tempfile.TemporaryDirectory(prefix='one_jax_faults_') as folder:
        try:
            landed, runs, differing = campaign(KILLS.value, SEED.value, Path(folder))
        except AssertionError as error:
            sys.exit(f'lost: {error}')
    names = [number.name for number in SIGNALS]
    rows = [
        {'phase': phase, **{name: str(landed[name, phase]) for name in names}} for phase in PHASES
    ]
    print(markdown_table(rows, ('phase', *names)))
    if differing:
        sys.exit(f'lost after {landed.total()} kills: {"; ".join(differing)}')
    print(f'{landed.total()} kills in {runs} runs: all survived, nothing lost')


if __name__ == '__main__':
    command.run(main)
