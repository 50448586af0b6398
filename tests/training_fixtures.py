"""Small experiments: ResNet-8 with two branches on generated 8x8 images, and their runs."""

import contextlib
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from one_jax import config as config_lib
from one_jax import data
from one_jax.runtime import parallel, processes
from one_jax.training.checkpoint import Checkpoints
from one_jax.training.experiment import make_experiment
from one_jax.training.state import TrainState
from one_jax.training.step import make_initial_state, make_train_step

# Five steps per epoch, two epochs, and records that do not end where epochs do.
SMALL = {
    'model.name': 'resnet8',
    'model.num_branches': 2,
    'data.name': 'image_folder',
    'data.image_size': 8,
    'data.generated_examples': 40,
    'data.batch_size': 8,
    'data.eval_batch_size': 16,
    'optimizer.schedule': 'constant',
    'train.steps': 10,
    'train.log_every': 3,
    'train.compilation_cache_dir': '',
}


def small_config(**fields: Any) -> Any:
    """Returns a config of `SMALL` and `fields`, by dotted name."""
    config = config_lib.default_config()
    if fields.get('data.name', SMALL['data.name']) != SMALL['data.name']:
        # Other sets have their own size.
        fields = {'data.image_size': 0, **fields}
    config.update_from_flattened_dict({**SMALL, **fields})
    return config


class Setting:
    """An experiment of `small_config`, with its compiled step and its batches.

    Args:
      num_devices: of the mesh.
      **fields: of the config, by dotted name.
    """

    def __init__(self, num_devices: int = 1, **fields: Any):
        config = small_config(**fields)
        config_lib.validate(config, num_devices)
        self.source = data.open(config.data)
        self.batches = self.source.train_batches(
            config.data.batch_size, config.seed, config.data.drop_last
        )
        self.experiment = make_experiment(
            config_lib.resolve(config),
            self.source.spec,
            self.source.label_names,
            self.batches.steps_per_epoch,
        )
        self.mesh = parallel.make_mesh(jax.devices()[:num_devices])
        self.train_step = make_train_step(self.experiment, self.mesh)
        self.initial_state = make_initial_state(self.experiment, self.mesh)
        variables = [teacher.variables for teacher in self.experiment.teachers]
        self.teacher_variables = parallel.replicate(variables, self.mesh)
        self._start_anew = jax.jit(lambda state: state.replace(metrics=state.metrics.start_anew()))

    def host_batch(self, step: int) -> dict[str, np.ndarray]:
        """Returns the batch of the step after `step` completed ones."""
        return next(iter(self.batches.iterate(step)))

    def call(self, state: TrainState, *batches: dict[str, np.ndarray]) -> TrainState:
        """Makes one step per batch, in one call; takes over the buffers of `state`."""
        stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *batches)
        placed = parallel.shard_batch(stacked, self.mesh, parallel.STEPS_AND_BATCH)
        return self.train_step(state, placed, *self.teacher_variables)[0]

    def run(
        self, steps: Any, state: TrainState | None = None
    ) -> tuple[TrainState, list[dict[str, Any]]]:
        """Makes steps, one per call.

        Args:
          steps: an iterable of numbers for `host_batch`, or of host batches.
          state: to start from; by default the initial one of seed 0.

        Returns:
          The state on the host, and the metrics of each step.
        """
        state = self.initial_state(np.uint32(0)) if state is None else state
        metrics = []
        for batch in steps:
            batch = self.host_batch(batch) if isinstance(batch, int) else batch
            state = self.call(state, batch)
            metrics.append(jax.device_get(state.metrics).means())
            state = self._start_anew(state)
        return jax.device_get(state), metrics


def saved_state(workdir: Path) -> tuple[dict[str, np.ndarray], int]:
    """Returns every array of the newest checkpoint by its dotted name, and its step."""
    with Checkpoints(workdir / 'checkpoints', read_only=True) as checkpoints:
        state, _, step = checkpoints.read()
    leaves = jax.tree_util.tree_leaves_with_path(state)
    name = functools.partial(jax.tree_util.keystr, simple=True, separator='.')
    return {name(path): np.asarray(leaf) for path, leaf in leaves}, step


def assert_same_run(workdir: Path, reference: Path) -> None:
    """Compares the newest checkpoints bit for bit, and the records byte for byte."""
    (state, step), (expected, expected_step) = saved_state(workdir), saved_state(reference)
    assert step == expected_step
    assert state.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(state[name], values, err_msg=name, strict=True)
    records = (workdir / 'metrics.jsonl').read_bytes()
    assert records == (reference / 'metrics.jsonl').read_bytes()


def cut_back(workdir: Path, step: int, target: Path) -> Path:
    """Copies a finished run as if it had been killed after the checkpoint of `step`."""
    shutil.copytree(workdir, target)
    (target / 'result.json').unlink()
    for folder in (target / 'checkpoints').iterdir():
        if folder.name != str(step):
            shutil.rmtree(folder)
    return target


@contextlib.contextmanager
def stopping_after(step: int) -> Iterator[None]:
    """A block in which runs stop after `step` as if they had received SIGTERM."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, 'stop_agreed', lambda completed, _: completed == step)
        yield


def snapshot(directory: Path) -> dict[str, bytes]:
    """Returns the content of every file under a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob('*'))
        if path.is_file()
    }
