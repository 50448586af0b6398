"""Reads runs back from the files in their workdirs, of this and of earlier versions."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from one_jax import fields
from one_jax.errors import UserError
from one_jax.runtime import files, records

CONFIG, RESULT = 'config.json', 'result.json'


@dataclasses.dataclass(frozen=True)
class ReportedRun:
    """A run, finished or not, as its workdir describes it.

    Attributes:
      name: the run's name; the path of its workdir if several runs share the name.
      config: the config fields by dotted name, {} without a config.json.
      result: the content of result.json, {} for an unfinished run.
      records: the lines of metrics.jsonl.
    """

    name: str
    config: Mapping[str, Any]
    result: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]

    def fact(self, name: str, field: str, default: Any = None) -> Any:
        """Returns an entry of the result, or else a field of the config, or else `default`."""
        return self.result.get(name, self.config.get(field)) or default

    @property
    def seed(self) -> int | None:
        return self.result.get('seed', self.config.get('seed'))

    @property
    def method(self) -> str | None:
        return self.fact('method', 'method.name')

    @property
    def network(self) -> str:
        return self.fact('network', 'model.name', 'unknown network')

    @property
    def data(self) -> str:
        """The data set; runs on different ones are not compared."""
        generated = ' (generated images)' if self.config.get('data.generated_examples') else ''
        return self.fact('dataset', 'data.name', 'unknown data set') + generated

    @property
    def settings(self) -> str:
        """A text equal for runs that differ only in their seeds and those of their teachers."""
        ignored = {'seed', *fields.MACHINE_FIELDS}
        config = {name: value for name, value in self.config.items() if name not in ignored}
        teachers = self.result.get('teachers') or []
        kinds = [[teacher.get('network'), teacher.get('method')] for teacher in teachers]
        return json.dumps([config, kinds], sort_keys=True)


def read_run(directory: str | Path) -> ReportedRun:
    """Reads a workdir; raises `UserError` if it holds no run or a damaged file."""
    directory = Path(directory)
    config, result = (_read_object(directory / name) for name in (CONFIG, RESULT))
    config = {
        fields.RENAMED.get(name, name): value
        for name, value in fields.flatten(config).items()
        if name not in fields.REMOVED
    }
    lines = []
    if (directory / records.FILE_NAME).is_file():
        lines = records.read_records(directory / records.FILE_NAME)
    elif not result:
        raise UserError(
            f'{str(directory)!r} is not a workdir: it holds neither {RESULT} nor '
            f'{records.FILE_NAME}; give the --workdir of a run'
        )
    return ReportedRun(result.get('name') or directory.resolve().name, config, result, lines)


def read_runs(directories: Iterable[str | Path]) -> list[ReportedRun]:
    """Reads several workdirs, each once; runs with equal names are named by their paths."""
    paths = {Path(directory).resolve(): Path(directory) for directory in directories}
    runs = {path: read_run(path) for path in paths.values()}
    names = Counter(run.name for run in runs.values())
    return [
        dataclasses.replace(run, name=str(path)) if names[run.name] > 1 else run
        for path, run in runs.items()
    ]


def _read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file, {} if there is no file."""
    content = files.read_json(path) if path.is_file() else {}
    if not isinstance(content, dict):
        raise UserError(f'{str(path)!r} is damaged: not a JSON object')
    return content
