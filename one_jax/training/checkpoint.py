"""Checkpoints: the train state and the progress beside it. The only file that knows Orbax.

A checkpoint is the directory `<directory>/<step>`. It holds `state`, the arrays in nested dicts
named after the pytree's keys, which Orbax alone can read; `record`, in JSON the step, the progress
and the shape and dtype of every array; and `SHA256SUMS`, see `checksums`.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from one_jax.errors import UserError, explain, require
from one_jax.runtime import files, processes
from one_jax.training import checksums

# Orbax renames expired checkpoints into this folder before it deletes their files, so a kill never
# leaves half a checkpoint under the name of a whole one.
_DELETED = 'deleted'
# In the names of checkpoints that are not complete.
_UNFINISHED = '.orbax-checkpoint-tmp'


class Restored(NamedTuple):
    """A checkpoint's state, the progress saved with it, and its step."""

    state: Any
    progress: dict[str, Any]
    step: int


class Checkpoints:
    """The newest few checkpoints of a run; a context manager.

    With several processes all make the same calls, on a directory that all of them see. It is
    created by the first save. `read_only`, for a run that may be training in another process, moves
    nothing. `check` is called with the progress of a checkpoint before its arrays are read, and
    raises `UserError` if it belongs to another run.
    """

    def __init__(
        self,
        directory: str | Path,
        keep_latest: int = 2,
        *,
        read_only: bool = False,
        check: Callable[[dict[str, Any]], None] | None = None,
    ):
        self.directory = Path(directory).absolute()
        self._keep_latest, self._read_only, self._check = keep_latest, read_only, check
        self._manager: ocp.CheckpointManager | None = None
        self._saving, self._read_back = 0, False

    def __enter__(self) -> Self:
        if not self._read_only:
            allowed = 'a folder, or not there: move it away'
            is_folder = self.directory.is_dir() or not os.path.lexists(self.directory)
            require(is_folder, 'checkpoints', str(self.directory), allowed)
            self._delete_litter(_DELETED, f'*{_UNFINISHED}*')
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Lists the steps with a complete checkpoint; an unfinished one has another name."""
        found = self.directory.iterdir() if self.directory.is_dir() else ()
        return sorted(int(path.name) for path in found if path.name.isdecimal())

    def save(self, step: int, state: Any, progress: Mapping[str, Any]) -> None:
        """Starts saving; the caller may donate the arrays and change `progress` at once.

        Args:
          step: completed steps.
          state: pytree of arrays.
          progress: JSON values; floats are restored exactly.

        Raises:
          UserError: this save, or the one before it in the background, could not write its files.
        """
        self.wait()
        self._saving, arrays = (step := int(step)), _named_leaves(state)
        forms = {name: _form(array) for name, array in arrays.items()}
        # A copy, because a background thread writes it.
        record = json.loads(json.dumps({'step': step, 'progress': progress, 'arrays': forms}))
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(traverse_util.unflatten_dict(arrays, sep='/')),
            record=ocp.args.JsonSave(record),
        )
        with self._reporting_failed_writes():
            if self._manager is None:
                self._manager = self._open()
            # On a disk that fills up during a save, Orbax's threads print hundreds of lines.
            files.require_room(self.directory, sum(array.nbytes for array in arrays.values()))
            # Forced, because Orbax silently skips a step below the latest one.
            self._manager.save(self._saving, args=items, force=True)

    def restore_latest(self, template: Any) -> Restored | None:
        """Restores the newest undamaged checkpoint, if any.

        Damaged ones are reported and, unless read-only, moved to `damaged_checkpoints` beside the
        directory.

        Args:
          template: pytree of `jax.ShapeDtypeStruct` with shardings, or None for nested dicts of
            NumPy arrays.

        Raises:
          UserError: all checkpoints are damaged; the newest other one is a copy of the checkpoint
            of another step, or has other arrays than `template`; or `check` raises it.
        """
        self.wait()
        restored, damaged = None, {}
        for step in reversed(self.steps()):
            try:
                checksums.verify(self.directory / str(step))
                restored = self._restore(step, template)
                break
            except checksums.DamagedError as error:
                damaged[step] = error
        if damaged and restored is None:
            raise UserError(
                f'all {len(damaged)} checkpoints in {self.directory} are damaged (the newest: '
                f'{next(iter(damaged.values()))}); to train from scratch, move that folder away'
            )
        for step, error in damaged.items():
            checksums.set_aside(self.directory / str(step), error, only_warn=self._read_only)
        return restored

    def read(self) -> Restored:
        """`restore_latest` without a template.

        Raises:
          UserError: there is no undamaged checkpoint.
        """
        restored = self.restore_latest(None)
        if restored is None:
            raise UserError(f'no checkpoint in {self.directory}')
        return restored

    def wait(self) -> None:
        """Waits for the save in progress.

        Raises:
          UserError: its files could not be written; or, of the first one, not be read back.
        """
        if self._manager is not None:
            with self._reporting_failed_writes():
                self._manager.wait_until_finished()
            self._delete_litter(_DELETED)
            if self._saving in self.steps() and not self._read_back and processes.is_first():
                # On paths that it takes for patterns, Orbax writes what it cannot read.
                folder = self.directory / str(self._saving)
                with explain(f'checkpoint {str(folder)!r} cannot be read back', ValueError):
                    ocp.PyTreeCheckpointHandler().metadata(folder / 'state')
                self._read_back = True

    def close(self) -> None:
        """Waits for the save in progress and ends Orbax's threads."""
        try:
            self.wait()
        finally:
            if self._manager is not None:
                manager, self._manager = self._manager, None
                manager.close()

    def _open(self) -> ocp.CheckpointManager:
        """Opens Orbax's manager, which creates the directory."""
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep_latest,
            cleanup_tmp_directories=True,
            todelete_subdir=_DELETED,
            async_options=ocp.AsyncOptions(
                post_finalization_callback=self._write_checksums,
                # A failure in a thread would keep the others waiting for five minutes.
                create_directories_asynchronously=False,
            ),
        )
        return ocp.CheckpointManager(self.directory, options=options)

    def _write_checksums(self) -> None:
        """Called in Orbax's thread when all files are written, before they get their final name."""
        name = str(self._saving)
        (folder,) = (p for p in self.directory.iterdir() if p.name.partition('.')[0] == name)
        checksums.write(folder)

    def _delete_litter(self, *patterns: str) -> None:
        if processes.is_first():
            for pattern in patterns:
                for folder in self.directory.glob(pattern):
                    shutil.rmtree(folder, ignore_errors=True)

    def _reporting_failed_writes(self) -> contextlib.AbstractContextManager[None]:
        failed = f'could not save checkpoint {self._saving} in {self.directory} ({{reason}})'
        return files.reporting_failed_writes(f'{failed}; earlier checkpoints are untouched')

    def _restore(self, step: int, template: Any) -> Restored:
        folder = self.directory / str(step)
        record = ocp.JsonCheckpointHandler().restore(folder / 'record')
        found = record['arrays']
        if self._check is not None:
            self._check(record['progress'])
        if template is not None:
            expected = {name: _form(leaf) for name, leaf in _named_leaves(template).items()}
            self._require_equal_forms(step, found, expected)
        # Every process reads all of every array, so the devices may differ from the saving run's.
        as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in found}
        restore_args = traverse_util.unflatten_dict(as_numpy, sep='/')
        with explain(f'checkpoint {str(folder)!r} cannot be read', ValueError):
            state = ocp.PyTreeCheckpointHandler().restore(
                folder / 'state', args=ocp.args.PyTreeRestore(restore_args=restore_args)
            )
        # Earlier versions have the step among the arrays only.
        saved = record.get('step', state.get('step', step))
        if saved != step:
            raise UserError(
                f'checkpoint {str(folder)!r} is a copy of checkpoint {saved}: move it away, or '
                'give it back its name'
            )
        if template is not None:
            arrays = _named_leaves(state)
            placed = [_place(arrays[name], like) for name, like in _named_leaves(template).items()]
            state = jax.tree.unflatten(jax.tree.structure(template), placed)
        return Restored(state, record['progress'], step)

    def _require_equal_forms(
        self, step: int, found: Mapping[str, Any], expected: Mapping[str, Any]
    ) -> None:
        """Raises a UserError that names the first arrays that differ."""

        def form(forms: Mapping[str, Any], name: str) -> str:
            return f'{forms[name][1]}{forms[name][0]}' if name in forms else 'absent'

        differing = [
            f'{name} is {form(found, name)} there and {form(expected, name)} here'
            for name in dict.fromkeys([*expected, *found])
            if expected.get(name) != found.get(name)
        ]
        if differing:
            more = f'; and {len(differing) - 3} more' if len(differing) > 3 else ''
            raise UserError(
                f'checkpoint {step} in {self.directory} is from another network, optimizer or '
                f'version of one_jax: {"; ".join(differing[:3])}{more}. Use its own config and '
                'version, or a new workdir'
            )


def _named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves by their path, such as `opt_state/0/trace/fc/kernel`, in the tree's order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}


def _form(array: Any) -> list[Any]:
    """Shape and dtype as JSON values."""
    return [list(array.shape), str(array.dtype)]


def _place(values: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Puts values on the devices of `like`."""
    return jax.make_array_from_callback(
        values.shape, like.sharding, lambda index: np.asarray(values[index])
    )
