"""Checkpoints of a run: the train state, and what the loop needs to go on.

The only file that knows Orbax. A checkpoint is the directory `<directory>/<step>` of an Orbax
`CheckpointManager`, and holds

- `state`: the arrays, in nested dicts named after the pytree's own keys. No class of ours or of
  Optax is in the file, so that Orbax alone can read it too.
- `record`: the loop's progress, the metrics, the shapes and dtypes of the arrays.
- `metrics`: the metrics once more, where Orbax looks for the best step.
- `SHA256SUMS`: the digests of the files of all three (`sha256sum -c` reads it). Orbax alone does
  not notice a changed byte in the values: its chunks carry no checksum.
"""

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from one_jax import processes
from one_jax.errors import ConfigError, UserError
from one_jax.named_arrays import form, in_words, named_leaves, nest, place

logger = logging.getLogger(__name__)

PyTree = Any

_CHECKSUMS = 'SHA256SUMS'
# Checkpoints past their time are renamed into this folder before their files are deleted: a rename
# is atomic, so a kill never leaves half a checkpoint under the name of a whole one.
_DELETED = 'deleted'
_DAMAGED = 'damaged_checkpoints'
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Restored(NamedTuple):
    """A checkpoint that was read: its state, the progress saved with it, and its step."""

    state: PyTree
    progress: dict[str, Any]
    step: int


class _DamagedError(Exception):
    """A checkpoint whose files are not what was saved."""


class Checkpoints:
    """The checkpoints of one run: the newest few, and the best one.

    With several processes all of them make the same calls, as Orbax requires; the directory is one
    that all of them see.

    Args:
      directory: where the checkpoints are. Made at the first save, not before.
      keep_latest: how many of the newest checkpoints are kept.
      best_metric: the metric whose largest value marks the one other checkpoint that is kept.
      read_only: never write, move or delete anything, for a run that is finished or still training
        in another process.

    Raises:
      ConfigError: `keep_latest` is below 1.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        keep_latest: int = 2,
        best_metric: str = 'deployed_top1',
        *,
        read_only: bool = False,
    ):
        if keep_latest < 1:
            raise ConfigError('keep_latest', keep_latest, 'at least 1')
        self.directory = Path(directory).absolute()
        self.best_metric = best_metric
        self._keep_latest = keep_latest
        self._read_only = read_only
        self._manager: ocp.CheckpointManager | None = None
        self._saving: int | None = None

    def __enter__(self) -> 'Checkpoints':
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def save(
        self,
        step: int,
        state: PyTree,
        progress: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> bool:
        """Starts saving a step and returns; `wait` waits for the end of it.

        The arrays may be donated, and the dicts changed, as soon as this returns: what Orbax writes
        in the background is a copy on the host. On the CPU that copy is a view, but the runtime
        does not reuse the buffer of a donated array while a view of it is held.

        Args:
          step: the number of steps that made this state.
          state: pytree of jax and numpy arrays.
          progress: what JSON can hold; floats come back exactly.
          metrics: numbers by name. A step without `best_metric` is never the best.

        Returns:
          False if this step is there already, and nothing was done.

        Raises:
          ValueError: a leaf is a typed PRNG key or has no elements, or this is read-only.
          UserError: this save, or the one before it in the background, could not write its files.
        """
        if self._read_only:
            raise ValueError(f'{self.directory} is open for reading only')
        self.wait()
        self._saving = int(step)
        with self._reporting_failed_writes():
            manager = self._writer()
        if step in self.steps():
            return False
        arrays = {
            name: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
            for name, leaf in named_leaves(state).items()
        }
        for name, array in arrays.items():
            if array.size == 0 or jax.dtypes.issubdtype(array.dtype, jax.dtypes.extended):
                raise ValueError(
                    f'{name} of shape {array.shape} and type {array.dtype} cannot be saved: only '
                    'arrays of numbers that have elements (jax.random.key_data of a typed key)'
                )
        metrics = {name: float(value) for name, value in (metrics or {}).items()}
        record = {
            'progress': progress,
            'metrics': metrics,
            'arrays': {name: form(array) for name, array in arrays.items()},
        }
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(nest(arrays)),
            # Through JSON and back, because the background thread writes it when the caller may
            # already have changed it.
            record=ocp.args.JsonSave(json.loads(json.dumps(record))),
        )
        with self._reporting_failed_writes():
            self._require_room(sum(array.nbytes for array in arrays.values()))
            # Forced, because Orbax otherwise skips a step below the latest one without a word.
            return manager.save(int(step), args=items, metrics=metrics, force=True)

    def restore_latest(self, template: PyTree) -> Restored | None:
        """Reads the newest checkpoint that is undamaged, into the form of `template`.

        A damaged one is named in a warning and, unless read-only, moved to `damaged_checkpoints`
        beside the directory, so that its step can be saved again.

        Args:
          template: pytree of arrays or `jax.ShapeDtypeStruct`. Each leaf comes back with the
            sharding it has there; one without a sharding comes back as a numpy array.

        Returns:
          None if there is no checkpoint.

        Raises:
          UserError: all checkpoints are damaged (all stay where they are), or the newest readable
            one holds other arrays than `template`.
        """
        self.wait()
        damaged: list[tuple[int, _DamagedError]] = []
        restored = None
        for step in reversed(self.steps()):
            try:
                restored = self._restore(step, template)
                break
            except _DamagedError as error:
                damaged.append((step, error))
        if damaged and restored is None:
            raise UserError(
                f'all {len(damaged)} checkpoints in {self.directory} are damaged '
                f'(the newest: {damaged[0][1]}); to start from the beginning, move that folder away'
            )
        for step, error in damaged:
            self._set_aside(step, error)
        return restored

    def restore(self, step: int, template: PyTree) -> Restored:
        """Reads one step into the form of `template`, as `restore_latest` does.

        Raises:
          UserError: the step is not there, is damaged, or holds other arrays than `template`.
        """
        self.wait()
        if step not in (steps := self.steps()):
            there = ', '.join(map(str, steps)) or 'none'
            raise UserError(f'no checkpoint {step} in {self.directory}; steps there: {there}')
        try:
            return self._restore(step, template)
        except _DamagedError as error:
            raise UserError(f'checkpoint {step} in {self.directory} is damaged: {error}') from error

    def read(self, step: int | None = None) -> Restored:
        """Reads a checkpoint without knowing its form; every array comes back as numpy's.

        Args:
          step: the step, or None for the newest one that is undamaged.

        Returns:
          The state as nested dicts, keyed by field names and by the indices of tuples as strings.

        Raises:
          UserError: there is no such checkpoint, or it is damaged.
        """
        if step is not None:
            return self.restore(step, None)
        restored = self.restore_latest(None)
        if restored is None:
            raise UserError(f'no checkpoint in {self.directory}')
        return restored

    def steps(self) -> list[int]:
        """The steps whose save is complete, ascending; a half-written one has another name."""
        if not self.directory.is_dir():
            return []
        found = ocp.path.step.standard_name_format().find_all(self.directory)
        return sorted(metadata.step for metadata in found)

    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The step with the largest `best_metric`, the newest of equals; None if none has it."""
        scores = []
        for step in self.steps():
            try:
                self._verify(step)
                scores.append((self._score(self._record(step)['metrics']), step))
            except _DamagedError as error:
                logger.warning(
                    'skipped the damaged checkpoint %s/%d (%s)', self.directory, step, error
                )
        best = max(scores, default=(-math.inf, None))
        return best[1] if best[0] > -math.inf else None

    def wait(self) -> None:
        """Waits until the save that is under way is complete.

        Raises:
          UserError: the files could not be written.
        """
        if self._manager is not None:
            with self._reporting_failed_writes():
                self._manager.wait_until_finished()
            self._delete_expired()

    def close(self) -> None:
        """Waits for the save under way and ends Orbax's threads."""
        if self._manager is not None:
            try:
                self.wait()
            finally:
                manager, self._manager = self._manager, None
                manager.close()

    def _writer(self) -> ocp.CheckpointManager:
        """Orbax's manager, made at the first save: it makes the directory and cleans up in it."""
        if self._manager is None:
            # The manager reads the metrics of every step and stops at one that it cannot read.
            for step in self.steps():
                try:
                    self._verify(step)
                except _DamagedError as error:
                    self._set_aside(step, error)
            best = ocp.checkpoint_managers.BestN(get_metric_fn=self._score, n=1)
            latest = ocp.checkpoint_managers.LatestN(self._keep_latest)
            options = ocp.CheckpointManagerOptions(
                # The policy decides; but without best_fn the metrics are neither saved nor read.
                best_fn=self._score,
                preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy([latest, best]),
                cleanup_tmp_directories=True,
                todelete_subdir=_DELETED,
                async_options=ocp.AsyncOptions(
                    post_finalization_callback=self._write_checksums,
                    # If it failed in a thread, others would wait for it, and the process with them,
                    # for five minutes.
                    create_directories_asynchronously=False,
                ),
            )
            self._delete_expired()
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        return self._manager

    def _score(self, metrics: Mapping[str, float]) -> float:
        """The value of `best_metric`; minus infinity, which is never the best, where it is not."""
        value = metrics.get(self.best_metric, -math.inf)
        return -math.inf if math.isnan(value) else value

    @contextlib.contextmanager
    def _reporting_failed_writes(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # TensorStore makes a ValueError of a full disk.
            # TensorStore has what the system said at the end of a long line.
            said = [text for text in map(os.strerror, _DISK_FULL) if text in str(error)]
            reason = said[0] if said else str(error).partition('\n')[0][:300]
            raise UserError(
                f'could not save checkpoint {self._saving} in {self.directory} ({reason}); '
                'the ones before it are untouched'
            ) from error

    def _require_room(self, size: int) -> None:
        """Raises OSError if the disk has less room than `size` bytes: of a disk that is full in the
        middle of a save, Orbax's threads tell in hundreds of lines.
        """
        disk = shutil.disk_usage(self.directory)
        # Some network file systems give no numbers.
        if disk.total and disk.free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _write_checksums(self) -> None:
        """Called by Orbax in its thread, when all is written and not yet under its final name."""
        path = self.directory / str(self._saving)
        unfinished = path.with_name(path.name + ocp.utils.TMP_DIR_SUFFIX)
        path = unfinished if unfinished.exists() else path
        (path / _CHECKSUMS).write_text(_checksums(path))

    def _verify(self, step: int) -> None:
        """Raises `_DamagedError` in all processes if process 0 finds a step damaged."""
        error = None
        if processes.is_first():
            try:
                self._verify_files(step)
            except Exception as raised:  # whatever it is, the other processes wait for the answer
                error = raised
        if processes.from_first(int(error is not None)):
            raise error or _DamagedError('process 0 cannot read it')

    def _verify_files(self, step: int) -> None:
        path = self.directory / str(step)
        try:
            saved = (path / _CHECKSUMS).read_text().splitlines()
            found = _checksums(path).splitlines()
        except PermissionError:
            raise  # Says nothing about the checkpoint.
        except (OSError, UnicodeDecodeError) as error:
            raise _DamagedError(f'cannot read {_CHECKSUMS}: {error}') from error
        if changed := sorted({line[66:] or _CHECKSUMS for line in set(saved) ^ set(found)}):
            raise _DamagedError(f'changed since it was saved: {", ".join(changed[:3])}')

    def _record(self, step: int) -> dict[str, Any]:
        return ocp.JsonCheckpointHandler().restore(self.directory / str(step) / 'record')

    def _restore(self, step: int, template: PyTree | None) -> Restored:
        self._verify(step)
        record = self._record(step)
        if template is not None:
            self._require_same_form(step, record['arrays'], template)
        # Every process reads the whole of every array, so that the devices need not be those of
        # the run that saved it.
        as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in record['arrays']}
        nested = ocp.PyTreeCheckpointHandler().restore(
            self.directory / str(step) / 'state',
            args=ocp.args.PyTreeRestore(restore_args=nest(as_numpy)),
        )
        if template is None:
            return Restored(nested, record['progress'], step)
        arrays = named_leaves(nested)
        placed = [place(arrays[name], like) for name, like in named_leaves(template).items()]
        state = jax.tree.unflatten(jax.tree.structure(template), placed)
        return Restored(state, record['progress'], step)

    def _require_same_form(self, step: int, found: Mapping[str, Any], template: PyTree) -> None:
        """Raises a UserError that names the first arrays that differ from the template's."""
        wanted = {name: form(leaf) for name, leaf in named_leaves(template).items()}
        differing = [
            f'{name} is {in_words(found.get(name))} there and {in_words(wanted.get(name))} here'
            for name in [*wanted, *(name for name in found if name not in wanted)]
            if wanted.get(name) != found.get(name)
        ]
        if differing:
            more = f'; and {len(differing) - 3} more' if len(differing) > 3 else ''
            raise UserError(
                f'checkpoint {step} in {self.directory} is of another network or optimizer: '
                f'{"; ".join(differing[:3])}{more}. Use its own config or a new workdir'
            )

    def _set_aside(self, step: int, error: _DamagedError) -> None:
        """Warns of a damaged checkpoint and moves it out of the way of the next save."""
        path = self.directory / str(step)
        if self._read_only:
            logger.warning('skipped the damaged checkpoint %s (%s)', path, error)
            return
        folder = self.directory.parent / _DAMAGED
        if processes.is_first():
            copies = sum(
                1 for old in folder.glob(f'{step}*') if old.name.split('-')[0] == str(step)
            )
            target = folder / (f'{step}-{copies + 1}' if copies else str(step))
            folder.mkdir(exist_ok=True)
            path.rename(target)
            logger.warning('moved the damaged checkpoint %s to %s (%s)', path, target, error)
        processes.wait_for_all('set_aside')
        if self._manager is not None:
            self._manager.reload()

    def _delete_expired(self) -> None:
        if processes.is_first():
            shutil.rmtree(self.directory / _DELETED, ignore_errors=True)


def _checksums(path: Path) -> str:
    """The digests of all files in the item folders, as `sha256sum` prints them."""
    lines = []
    for file in sorted(path.glob('*/**/*')):
        if file.is_file():
            with file.open('rb') as content:
                digest = hashlib.file_digest(content, 'sha256').hexdigest()
            lines.append(f'{digest}  {file.relative_to(path).as_posix()}\n')
    return ''.join(lines)
