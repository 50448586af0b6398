"""Records: the lines of metrics.jsonl, which TensorBoard gets too."""

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from one_jax.errors import UserError, explain
from one_jax.fields import number
from one_jax.runtime import files

FILE_NAME = 'metrics.jsonl'
# What every record has beside its measures.
_PLACE = ('step', 'epoch', 'split')
_SPLITS = ('train', 'validation', 'test')
_is_number = number()
# The names of our event files, which earlier versions ended in nanoseconds; other programs may
# write their own to a workdir.
_EVENTS = re.compile(r'events\.out\.tfevents\.\d+\..*\.(one_jax|\d{19})')


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Reads the records of a metrics.jsonl, in order; `path` is the file or its workdir.

    Skips lines that are not a record: a killed process leaves half a line behind.

    Raises:
      UserError: there is no such file.
    """
    path = Path(path)
    with explain(f'{str(path)!r} cannot be read', OSError):
        path = path / FILE_NAME if path.is_dir() else path
        if path.exists() and not path.is_file():
            raise UserError(f'{str(path)!r} is not a regular file')
        lines = path.read_bytes().split(b'\n')
    return [record for line in lines if (record := _parse_record(line)) is not None]


def _parse_record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get('step')) is not int:
        return None
    measures = [value for name, value in record.items() if name != 'split']
    is_record = record.get('split', 'train') in _SPLITS and all(map(_is_measure, measures))
    return record if is_record else None


def _is_measure(value: Any) -> bool:
    """Whether it is a number or None, or a list of them."""
    entries = value if isinstance(value, list) else [value]
    return all(entry is None or _is_number(entry) for entry in entries)


class RecordWriter:
    """Writes records to metrics.jsonl and TensorBoard events; a context manager.

    A line of metrics.jsonl is a JSON object: 'step', 'epoch', 'split' and the measures, numbers or
    lists of numbers. Nothing in it depends on the clock, so a resumed run writes the same file as
    an uninterrupted one. NaN and infinity become null there; TensorBoard gets them as they are.

    Args:
      workdir: created if it does not exist.
      resume_step: the step to resume after. Later records are deleted, because the run makes them
        again, and so is half a line that a killed process left. What is kept replaces the event
        files of earlier starts.
    """

    def __init__(self, workdir: str | Path, resume_step: int = 0):
        # Not at the top: reading records needs none of it.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        workdir = Path(workdir).absolute()
        workdir.mkdir(parents=True, exist_ok=True)
        kept = _delete_records_after(resume_step, workdir / FILE_NAME)
        old = [path for path in workdir.iterdir() if _EVENTS.fullmatch(path.name)]
        self._file = (workdir / FILE_NAME).open('ab')
        # Unlike `SummaryWriter`, this one has no thread, whose queue would be lost on a kill. The
        # default name only has seconds: a quick resume would overwrite the file.
        self._events = EventsWriter(str(workdir / 'events'), f'.{time.time_ns()}.one_jax')
        # A TensorBoard that is open drops what it has.
        self._events.write_event(Event(session_log=SessionLog(status=SessionLog.START)))
        for record in kept:
            self._events.write_event(_event(record))
        self._events.flush()
        # Without any record the events are all that is left of a lost metrics.jsonl.
        for path in old if kept or not resume_step else ():
            path.unlink()

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
          timing: what depends on the clock, such as images per second; only for TensorBoard, and
            only until the run resumes.
        """
        arrays = {
            name: np.asarray(values, np.float64)
            for name, values in metrics.items()
            if values is not None
        }
        place = {'step': int(step), 'epoch': float(epoch), 'split': split}
        record = place | {name: files.jsonable(values.tolist()) for name, values in arrays.items()}
        self._file.write(json.dumps(record, allow_nan=False).encode() + b'\n')
        self._file.flush()
        self._events.write_event(_event(place | arrays | dict(timing or {})))
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


def _event(record: Mapping[str, Any]) -> Any:
    """Returns the TensorBoard event of a record; null becomes NaN."""
    from tensorboardX.proto import event_pb2, summary_pb2

    values = [
        summary_pb2.Summary.Value(
            tag='/'.join([record.get('split', 'train'), name, *map(str, index)]),
            simple_value=float(value),
        )
        for name, entry in record.items()
        if name not in _PLACE
        for index, value in np.ndenumerate(np.asarray(entry, np.float64))
    ]
    summary = summary_pb2.Summary(value=values)
    return event_pb2.Event(step=record['step'], wall_time=time.time(), summary=summary)


def _delete_records_after(step: int, path: Path) -> list[dict[str, Any]]:
    """Keeps the records up to `step`, byte for byte, and returns them.

    The file changes completely or not at all.
    """
    before = path.read_bytes() if path.exists() else b''
    found = ((line, _parse_record(line)) for line in before.split(b'\n'))
    kept = [(line, record) for line, record in found if record and record['step'] <= step]
    # Joined at once: adding line by line copies all before it.
    after = b''.join(line + b'\n' for line, _ in kept)
    if after != before:
        files.write(path, after)
    return [record for _, record in kept]
