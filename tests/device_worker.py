"""Runs in processes of any number of CPU devices, for the tests; and the script of each process.

    python tests/device_worker.py CASES.json [PORT NUM_PROCESSES PROCESS_ID]

CASES.json lists the runs that each process makes, one after the other:
    workdir: of the run.
    fields: of the config, by dotted name.
    own_fields: the fields that differ in one process, by its number.
    own_versions: the version of one_jax that one process has, by its number.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Seconds until a process counts as stuck, on a busy machine.
TIMEOUT = 600
# Four steps per epoch on 8x8 images; 14 test images in batches of 8.
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
    """Returns a port of this machine on which nobody listens."""
    with socket.socket() as listener:
        listener.bind(('localhost', 0))
        return listener.getsockname()[1]


def environment(num_devices: int) -> dict[str, str]:
    """Returns the environment of the tests with other CPU devices and float64."""
    kept = [
        flag
        for flag in os.environ.get('XLA_FLAGS', '').split()
        if 'host_platform_device_count' not in flag
    ]
    flags = ' '.join([*kept, f'--xla_force_host_platform_device_count={num_devices}'])
    variables = {'JAX_PLATFORMS': 'cpu', 'JAX_ENABLE_X64': '1', 'XLA_FLAGS': flags}
    return {**os.environ, **variables, 'PYTHONPATH': str(Path(__file__).parent.parent)}


class Job:
    """One or several processes that make the same runs; a context that ends them all.

    Args:
      folder: for the files between the tests and the processes; created.
      num_devices: of each process.
      cases: the runs.
      num_processes: how many processes there are.
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
        """Waits for the end and returns, by process and case, what `train` returns."""
        for process in self.processes:
            _, errors = process.communicate(timeout=TIMEOUT)
            assert process.returncode == 0, errors
        return [
            json.loads(_report_file(self._file, index).read_text())
            for index in range(len(self.processes))
        ]


def _report_file(cases: Path, process: int) -> Path:
    return cases.with_name(f'report{process}.json')


def train(case: Mapping[str, Any], process: int) -> dict[str, Any]:
    """Makes a run.

    Returns:
      `error`: the message of a UserError; otherwise `indices`: for each step, which examples this
      process reads; `batch_shape`: of the images that it reads for a step; `written`: the files in
      the workdir that Python opened for writing in this process.
    """
    import one_jax
    from one_jax import config as config_lib
    from one_jax import data
    from one_jax import train as train_lib
    from one_jax.errors import UserError

    config = config_lib.default_config()
    config.update_from_flattened_dict(case['fields'])
    config.update_from_flattened_dict(case.get('own_fields', {}).get(str(process), {}))
    workdir, version = case['workdir'], one_jax.__version__
    one_jax.__version__ = case.get('own_versions', {}).get(str(process), version)
    written.clear()
    try:
        train_lib.train_and_evaluate(config, workdir)
    except UserError as error:
        return {'error': str(error)}
    finally:
        one_jax.__version__ = version
    # `workdir.check` opens a nameless file in the folder.
    files = sorted({path for path in written if path.startswith(workdir) and path != workdir})
    batches = data.open(config.data).train_batches(config.data.batch_size, config.seed)
    return {
        'indices': [batches.indices(step).tolist() for step in range(config.train.steps)],
        'batch_shape': next(iter(batches.iterate(0)))['image'].shape,
        'written': [str(Path(path).relative_to(workdir)) for path in files],
    }


# The files that Python opened for writing, noted by an audit hook.
written: list[str] = []


def _note_written(event: str, arguments: tuple) -> None:
    if event == 'open' and isinstance(arguments[0], str) and arguments[2] & os.O_ACCMODE:
        written.append(arguments[0])


def main(file: str, port: str = '', num_processes: str = '1', process_id: str = '0') -> None:
    """Makes all runs, and writes a report of each."""
    from one_jax.runtime import processes

    sys.addaudithook(_note_written)
    if port:
        processes.initialize(f'localhost:{port}', int(num_processes), int(process_id))
    cases = json.loads(Path(file).read_text())
    reports = [train(case, int(process_id)) for case in cases]
    _report_file(Path(file), int(process_id)).write_text(json.dumps(reports))


if __name__ == '__main__':
    main(*sys.argv[1:])
