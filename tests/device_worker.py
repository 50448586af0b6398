"""Runs in processes of any number of CPU devices, for the tests; and the script of each process.

    python tests/device_worker.py CASES.json [PORT NUM_PROCESSES PROCESS_ID]

CASES.json is a list of cases that the process takes one after the other. A whole run:
    workdir: of the run.
    fields: of the config, by dotted name.
    own_fields: for each process by its number, what differs in it.
    own_versions: the same of the version of one_jax.
    num_devices: of the first devices alone; all by default.
    copied_from: a finished run and a step: the workdir is first made from them, see `cut_back`.
Or only the train steps:
    arrays: for each number of devices, a file (.npz) for the state after `steps` steps and the
        scalars of each.
    fields: as above.
What each process saw is written beside it, see `Job.reports`.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Seconds until a process counts as stuck, on a machine with much else to do.
TIMEOUT = 900
# Four steps an epoch on 8x8 images; 14 test images in batches of 8.
SMALL = {
    'seed': 0,
    'model.name': 'resnet8',
    'model.num_branches': 2,
    'model.dtype': 'float64',
    'sync_batch_norm': True,
    'data.name': 'image_folder',
    'data.image_size': 8,
    'data.generated_examples': 70,
    'data.batch_size': 16,
    'data.eval_batch_size': 8,
    'optimizer.learning_rate': 0.05,
    'train.steps': 10,
    'train.log_every': 1,
    'train.keep_checkpoints': 3,
    'train.compilation_cache_dir': '',
}


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(('localhost', 0))
        return listener.getsockname()[1]


def environment(num_devices: int) -> dict[str, str]:
    """That of the tests, with so many CPU devices and float64."""
    kept = [
        flag
        for flag in os.environ.get('XLA_FLAGS', '').split()
        if 'host_platform_device_count' not in flag
    ]
    flags = ' '.join([*kept, f'--xla_force_host_platform_device_count={num_devices}'])
    return {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_ENABLE_X64': '1', 'XLA_FLAGS': flags}


class Job:
    """One or several processes that take the same cases; a context that ends them all.

    Args:
      folder: of the files between the tests and the processes; made.
      num_devices: of each process.
      cases: what they do.
      num_processes: how many they are.
    """

    def __init__(
        self,
        folder: Path,
        num_devices: int,
        cases: Sequence[Mapping[str, Any]],
        num_processes: int = 1,
    ):
        folder.mkdir(parents=True)
        self._file = folder / 'cases.json'
        self._file.write_text(json.dumps(list(cases)))
        port = free_port()
        self.processes = []
        for index in range(num_processes):
            several = [str(port), str(num_processes), str(index)] if num_processes > 1 else []
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, __file__, str(self._file), *several],
                    env=environment(num_devices),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def __enter__(self) -> 'Job':
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def reports(self) -> list[list[dict[str, Any]]]:
        """Waits for the end; of each process, and in it of each case: what `do` describes."""
        for process in self.processes:
            _, errors = process.communicate(timeout=TIMEOUT)
            assert process.returncode == 0, errors
        return [
            json.loads(_report_file(self._file, index).read_text())
            for index in range(len(self.processes))
        ]


def cut_back(workdir: str | Path, step: int, target: str | Path) -> Path:
    """A copy of a finished run as a kill leaves it that comes after the checkpoint of a step."""
    target = Path(shutil.copytree(workdir, target))
    (target / 'result.json').unlink()
    for folder in (target / 'checkpoints').iterdir():
        if folder.name != str(step):
            shutil.rmtree(folder)
    return target


def records(workdir: Path) -> list[dict[str, Any]]:
    """What `metrics.jsonl` holds."""
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def _report_file(cases: Path, process: int) -> Path:
    return cases.with_name(f'report{process}.json')


def do(given: Mapping[str, Any], process: int) -> dict[str, Any]:
    """Does a case.

    Returns:
      Of a run, `error`: the message if it was refused; or else `indices`: of each step, which
      examples this process reads; `batch_shape`: of the images that it reads for a step;
      `written`: the files below the workdir that this process itself opened for writing.
    """
    import jax

    import one_jax
    from one_jax import config as config_lib
    from one_jax import parallel, train
    from one_jax.data import datasets
    from one_jax.errors import UserError

    config = config_lib.default_config()
    config.update_from_flattened_dict(given['fields'])
    config.update_from_flattened_dict(given.get('own_fields', {}).get(str(process), {}))
    if 'arrays' in given:
        return take_steps(config, given)
    workdir, version, make_mesh = given['workdir'], one_jax.__version__, parallel.make_mesh
    if 'copied_from' in given:
        cut_back(*given['copied_from'], workdir)
    one_jax.__version__ = given.get('own_versions', {}).get(str(process), version)
    parallel.make_mesh = lambda: make_mesh(jax.devices()[: given.get('num_devices')])
    written.clear()
    try:
        train.train_and_evaluate(config, workdir)
    except UserError as error:
        return {'error': str(error)}
    finally:
        one_jax.__version__, parallel.make_mesh = version, make_mesh
    files = sorted({path for path in written if path.startswith(workdir)})
    batches = datasets.load(config.data).train_batches(config.data.batch_size, config.seed)
    return {
        'indices': [batches.indices(step).tolist() for step in range(config.train.steps)],
        'batch_shape': next(batches.iterate(0))['image'].shape,
        'written': [str(Path(path).relative_to(workdir)) for path in files],
    }


def take_steps(config: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The train step alone, as `train` makes and calls it."""
    import jax
    import numpy as np

    from one_jax import config as config_lib
    from one_jax import named_arrays, parallel
    from one_jax.data import datasets
    from one_jax.recipe import make_recipe
    from one_jax.state import init_state
    from one_jax.train_step import make_train_step

    config = config_lib.resolve(config)
    dataset = datasets.load(config.data)
    batches = dataset.train_batches(config.data.batch_size, config.seed)
    recipe = make_recipe(config, dataset.spec, batches.steps_per_epoch)
    shape = dataset.spec.image_shape
    initial = jax.jit(lambda: init_state(recipe.network, recipe.optimizer, shape, config.seed))()
    initial = jax.device_get(initial)
    for num_devices, file in given['arrays'].items():
        mesh = parallel.make_mesh(jax.devices()[: int(num_devices)])
        train_step = make_train_step(recipe, mesh)
        teachers = parallel.replicate([teacher.variables for teacher in recipe.teachers], mesh)
        state, arrays = parallel.replicate(initial, mesh), {}
        for step in range(given['steps']):
            batch = {name: values[None] for name, values in batches.batch(step).items()}
            batch = parallel.shard_batch(batch, mesh, parallel.STEPS_AND_BATCH)
            state, scalars = train_step(state, batch, *teachers)
            arrays |= {f'scalars.{step}.{name}': values for name, values in scalars.items()}
        np.savez(file, **named_arrays.named_leaves(state), **arrays)
    return {}


# By an audit hook: Python's own files that are opened for writing.
written: list[str] = []


def _note_written(event: str, arguments: tuple) -> None:
    if event == 'open' and isinstance(arguments[0], str) and arguments[2] & os.O_ACCMODE:
        written.append(arguments[0])


def main(file: str, port: str = '', num_processes: str = '1', process_id: str = '0') -> None:
    """Does all cases, and writes down what came of each."""
    from one_jax import processes

    sys.addaudithook(_note_written)
    if port:
        processes.initialize(f'localhost:{port}', int(num_processes), int(process_id))
    cases = json.loads(Path(file).read_text())
    reports = [do(given, int(process_id)) for given in cases]
    _report_file(Path(file), int(process_id)).write_text(json.dumps(reports))


if __name__ == '__main__':
    main(*sys.argv[1:])
