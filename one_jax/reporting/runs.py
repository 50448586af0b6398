"""Reads runs back from the files in their workdirs, of this and of earlier versions."""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from one_jax import fields
from one_jax.errors import UserError, explain, printable, require, require_kinds
from one_jax.fields import KINDS, Kind, list_of, or_none
from one_jax.runtime import files, records

CONFIG, RESULT = 'config.json', 'result.json'
_TEXT, _NUMBER = KINDS[str], or_none(KINDS[float])
# A diverged run has measures that are not finite.
_NUMBERS = ('a list of numbers', list_of(_NUMBER[1]))
_TEXTS = ('name', 'method', 'network', 'dataset', 'split', 'deployed', 'device')
_RESULT: Mapping[str, Kind] = {
    **dict.fromkeys(_TEXTS, _TEXT),
    **dict.fromkeys(('seed', 'step', 'epochs', 'seconds', 'pairwise_l2', 'disagreement'), _NUMBER),
    **{
        f'{prefix}{cost}': _NUMBER
        for prefix in ('', 'deployed_')
        for cost in ('parameters', 'flops')
    },
    **{
        f'{output}_{measure}': _NUMBERS if output == 'branch' else _NUMBER
        for output in ('branch', 'teacher', 'ensemble', 'deployed')
        for measure in ('top1', 'top5', 'nll', 'ece')
    },
    'branch_network': ('a list of names', list_of(_TEXT[1])),
    'branch_parameters': ('a list of numbers', list_of(KINDS[float][1])),
    'branch_flops': ('a list of numbers', list_of(KINDS[float][1])),
    'teachers': ('a list of objects with fields', list_of(KINDS[dict][1])),
}
# The fields of a config.json that are read here.
_CONFIG: Mapping[str, Kind] = {
    **dict.fromkeys(('method.name', 'model.name', 'data.name'), _TEXT),
    'seed': KINDS[int],
}


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
    directory, config, result, lines = Path(directory), {}, {}, []
    # Unlike `Path.exists`, this returns False for a name that is too long.
    if os.path.exists(directory / CONFIG):
        flat = fields.flatten(files.read_json(directory / CONFIG))
        names = {name: fields.RENAMED.get(name, name) for name in flat.keys() - fields.REMOVED}
        config = {names[name]: value for name, value in flat.items() if name in names}
        with explain(f'{str(directory / CONFIG)!r} is damaged', UserError):
            require_kinds(config, _CONFIG)
    if os.path.exists(directory / RESULT):
        result = read_result(directory / RESULT)
    if os.path.exists(directory / records.FILE_NAME):
        lines = records.read_records(directory / records.FILE_NAME)
    elif not result:
        raise UserError(
            f'{str(directory)!r} is not a workdir: it holds neither {RESULT} nor '
            f'{records.FILE_NAME}; give the --workdir of a run'
        )
    name = printable(result.get('name') or directory.resolve().name)
    return ReportedRun(name, config, result, lines)


def read_runs(directories: Iterable[str | Path]) -> list[ReportedRun]:
    """Reads several workdirs, each once; runs with equal names are named by their paths."""
    paths = {Path(directory).resolve(): Path(directory) for directory in directories}
    runs = {path: read_run(path) for path in paths.values()}
    names = Counter(run.name for run in runs.values())
    return [
        dataclasses.replace(run, name=printable(str(path))) if names[run.name] > 1 else run
        for path, run in runs.items()
    ]


def read_result(path: Path) -> dict[str, Any]:
    """Reads a result.json; raises `UserError` if it is damaged."""
    result = files.read_json(path, _RESULT)
    branches = {name: result[name] for name in result if name.startswith('branch_')}
    with explain(f'{str(path)!r} is damaged', UserError):
        if 'branch_network' in result:
            branches = {'branch_parameters': [], 'branch_flops': [], **branches}
        lengths = {name: len(values) for name, values in branches.items()}
        require(len(set(lengths.values())) <= 1, 'branches', lengths, 'as many in each list')
    return result
