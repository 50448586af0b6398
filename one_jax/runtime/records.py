"""Records: the lines of metrics.jsonl, which TensorBoard gets too."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from one_jax.errors import UserError
from one_jax.runtime.files import jsonable

FILE_NAME = 'metrics.jsonl'


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Reads the records of a metrics.jsonl, in order; `path` is the file or its workdir.

    Skips lines that are not a record: a killed process leaves half a line behind.

    Raises:
      UserError: there is no such file.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    try:
        lines = path.read_bytes().split(b'\n')
    except OSError as error:
        raise UserError(f'{str(path)!r} cannot be read: {error.strerror}') from None
    return [record for line in lines if (record := _parse_record(line)) is not None]


def _parse_record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode())
    except ValueError:
        return None
    is_record = isinstance(record, dict) and isinstance(record.get('step'), int)
    return record if is_record else None


class RecordWriter:
    """Writes records to metrics.jsonl and TensorBoard events; a context manager.

    A line of metrics.jsonl is a JSON object: 'step', 'epoch', 'split' and the measures, numbers or
    lists of numbers. Nothing in it depends on the clock, so a resumed run writes the same file as
    an uninterrupted one. NaN and infinity become null there; TensorBoard gets them as they are.

    Args:
      workdir: created if it does not exist.
      resume_step: the step to resume after. Later records are deleted, because the run makes them
        again, and so is half a line that a killed process left.
    """

    def __init__(self, workdir: str | Path, resume_step: int = 0):
        # Not at the top: reading records needs none of it.
        import tensorboardX

        path = Path(workdir) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        _delete_records_after(resume_step, path)
        self._file = path.open('ab')
        self._events = tensorboardX.SummaryWriter(
            str(workdir),
            purge_step=resume_step + 1 if resume_step else 0,
            # Unbounded: the writer's thread ends on a full disk, and a full queue would block.
            max_queue=0,
            flush_secs=10,
            # The default name only has seconds: a quick resume would overwrite the file.
            filename_suffix=f'.{time.time_ns()}',
        )

    def write(
        self,
        step: int,
        epoch: float,
        split: str,
        metrics: Mapping[str, Any],
        timing: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes one record, so that it outlives the process.

        Args:
          step: completed steps.
          epoch: completed epochs.
          split: 'train', 'validation' or 'test'.
          metrics: scalars and [K] arrays by name; TensorBoard gets the entries of `branch_top1` as
            `test/branch_top1/0`, `test/branch_top1/1`, ... None is left out.
          timing: what depends on the clock, such as images per second; only for TensorBoard.
        """
        arrays = {
            name: np.asarray(values, np.float64)
            for name, values in metrics.items()
            if values is not None
        }
        record = {'step': int(step), 'epoch': float(epoch), 'split': split}
        record |= {name: jsonable(values.tolist()) for name, values in arrays.items()}
        self._file.write(json.dumps(record, allow_nan=False).encode() + b'\n')
        self._file.flush()
        for name, values in (arrays | dict(timing or {})).items():
            for index, value in np.ndenumerate(values):
                tag = '/'.join([split, name, *map(str, index)])
                self._events.add_scalar(tag, float(value), int(step))
        # Raises what the writer's thread could not write.
        self._events.flush()

    def close(self) -> None:
        try:
            self._file.close()
        finally:
            self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _delete_records_after(step: int, path: Path) -> None:
    """Keeps the records up to `step`, byte for byte; the file changes completely or not at all."""
    before = path.read_bytes() if path.exists() else b''
    lines = before.split(b'\n')
    found = ((line, _parse_record(line)) for line in lines)
    # Joined at once: adding line by line copies all before it.
    kept = b''.join(line + b'\n' for line, record in found if record and record['step'] <= step)
    if kept == before:
        return
    temporary = path.with_name(f'.{path.name}.{os.getpid()}')
    with temporary.open('wb') as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
