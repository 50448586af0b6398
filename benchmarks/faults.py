"""Kills a training command at random moments, again and again: is anything lost?

    python -m benchmarks.faults [--kills=30] [--seed=0]

A tiny run (ResNet-8 on generated 8x8 images) is killed, restarted by the same command, killed
again, and at last left to end. Compared with an undisturbed run, the arrays of its last checkpoint
must be equal bit for bit, and its metrics.jsonl byte for byte. Otherwise, or if a process ends in
an error, the benchmark exits with status 1.

Each strike draws a signal, the phase to strike in, how often to let that phase pass before, and a
delay. The output and the files of the process show its phase: after a SIGKILL as they stay, before
a SIGTERM as they are.
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

import jax
import numpy as np
from absl import flags

from one_jax.reporting.tables import markdown_table
from one_jax.runtime import cli, records
from one_jax.training import checkpoint, workdir

KILLS = flags.DEFINE_integer('kills', 30, 'Signals that must end a process.', 1)
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
# The longest delay of a strike in each phase, in seconds.
LONGEST_DELAY = {'start-up': 4.0, 'steps': 0.05, 'save': 0.05, 'evaluation': 0.01, 'end': 1.0}
# After as many kills a run is left alone.
MOST_KILLS_A_RUN = 8


class Run:
    """A workdir and the processes that train in it one after the other.

    Args:
      folder: for the workdir and the output of the newest process.
      cache: for compiled programs.
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
        """Starts or resumes the run."""
        environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONUNBUFFERED': '1'}
        with self._log.open('w') as log:
            return subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, env=environment
            )

    def output(self) -> str:
        """Returns what the newest process has printed."""
        return self._log.read_text(errors='replace')

    def phase(self) -> str:
        """Returns the phase of the newest process, or in which it ended."""
        if not any(line.startswith(('step ', 'epoch ')) for line in self.output().splitlines()):
            return 'start-up'
        checkpoints = self.workdir / workdir.CHECKPOINTS
        if checkpoints.is_dir() and any(not name.isdigit() for name in os.listdir(checkpoints)):
            return 'save'
        found = records.read_records(self.workdir)
        step, split = (found[-1]['step'], found[-1]['split']) if found else (0, 'train')
        if split == 'train' and step and step % STEPS_PER_EPOCH == 0:
            return 'evaluation'
        return 'end' if step == STEPS else 'steps'

    def differences(self, other: 'Run') -> list[str]:
        """Names the arrays of the newest checkpoint, and the files, that differ from `other`'s."""
        own, others = self._final_arrays(), other._final_arrays()
        found = [
            name
            for name in sorted(own.keys() | others.keys())
            if name not in own
            or name not in others
            or own[name].dtype != others[name].dtype
            or not np.array_equal(own[name], others[name])
        ]
        contents = [(run.workdir / records.FILE_NAME).read_bytes() for run in (self, other)]
        return found + ([records.FILE_NAME] if contents[0] != contents[1] else [])

    def _final_arrays(self) -> dict[str, np.ndarray]:
        directory = self.workdir / workdir.CHECKPOINTS
        with checkpoint.Checkpoints(directory, read_only=True) as checkpoints:
            state, _, step = checkpoints.read()
        leaves = jax.tree_util.tree_leaves_with_path({**state, 'step of the checkpoint': step})
        return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def strike(run: Run, generator: random.Random) -> tuple[str, str] | None:
    """Starts a process and sends it a signal at a random moment.

    Returns:
      The name of the signal and the phase in which it came; None if the process ended before.

    Raises:
      AssertionError: the process ended in an error.
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
    """Strikes until `kills` have landed, and lets every run end.

    Returns:
      The number of kills by signal and phase, the number of runs, and the differences.
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
        raise AssertionError(f'the run did not end:\n{run.output()}')


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
    cli.run(main)
