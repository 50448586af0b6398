"""Workdirs: damaged files of runs, for the commands that read them."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.bad_inputs import bases
from benchmarks.bad_inputs.bases import edit, edit_json, in_turn, remove, set_field, write
from benchmarks.bad_inputs.runner import COMPILES, Case, shows

# Values of fields of config.json that no run has.
CONFIG_FIELDS = {
    'seed': (None, 'x', -1, 1.5, [], 10**30),
    'data': (None, 5, 'x', []),
    'data.name': (None, 5, 'cifar11', []),
    'data.root': (5, [], {'a': 1}),
    'data.batch_size': (None, 0, 'x', -4, 2.5, {}),
    'data.stream': ('x', 5),
    'model': (None, 5, []),
    'model.name': (None, 5, 'resnet33'),
    'model.num_branches': ('x', 0, 10**10, [1]),
    'method': (None, 5, 'plain'),
    'method.name': (None, 5, 'nothing'),
    'optimizer.milestones': (5, 'x', ['a'], [2, 1]),
    'optimizer.momentum': ('x', 2, [0.9]),
    'train.steps': ('x', -1, 1e300, {}),
    'train.ema_decay': ('x', 2),
}
# Contents of result.json that no run writes; report must not believe them.
RESULT_FIELDS = {
    'branch_top1': (5, 'x', ['x'], [[1]], {}),
    'deployed_top1': ('x', [], {}, [1, 2]),
    'teachers': (5, 'x', [5], {'a': 1}),
    'parameters': ('x', [], {}),
    'seconds': ('x', [], {}),
    'epochs': ('x', [], {}),
    'seed': ('x', [], {}),
    'name': (5, [], {}),
    'dataset': (5, [], {}),
}
CONFIG, RESULT, DATA, RECORDS = 'config.json', 'result.json', 'data.json', 'metrics.jsonl'
MAIN = (*bases.TRAIN, '--workdir={input}/run')
EVALUATE = ('evaluate', '--workdir={input}/run')
EXPORT = ('export', '--workdir={input}/run', '--output={output}')
REPORT = ('report', '{input}/run')
READERS = {'main': MAIN, 'evaluate': EVALUATE, 'export': EXPORT, 'report': REPORT}


def _in_newest(change: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Applies a change to the newest checkpoint of a run."""
    return lambda folder: change(max(folder.glob('checkpoints/*'), key=lambda p: int(p.name)))


def _all(change: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Applies a change to all checkpoints of a run."""
    return lambda folder: [change(path) for path in folder.glob('checkpoints/*')]


def _rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: (folder / old).rename(folder / new)


FIRST, LAST = 3, 6
STATE = 'state/ocdbt.process_0/d/*'
CHECKPOINT_FILES = (
    'SHA256SUMS',
    'record/metadata',
    'state/_METADATA',
    'state/manifest.ocdbt',
    STATE,
)


def workdir_cases(places: Mapping[str, Path]) -> Iterator[Case]:
    """Damaged workdirs for main (resuming), evaluate, export and report."""

    def case(name: str, reader: str, change: Callable, base: str = 'run', **rest: Any) -> Case:
        make = bases.copy(places[base], change, 'run')
        rest.setdefault('names', '{input}')
        return Case('workdirs', f'{reader}: {name}', READERS[reader], make, **rest)

    for file in (CONFIG, RESULT, DATA):
        readers = {CONFIG: READERS, RESULT: ('main', 'report'), DATA: ('main',)}[file]
        contents = {f'{name} {file}': write(file, text) for name, text in bases.NOT_OBJECTS.items()}
        contents |= {f'{file} cut': edit(file, bases.cut(0.7))}
        contents |= {f'{file} a folder': bases.replace_by_folder(file)}
        for index, (name, change) in enumerate(contents.items()):
            # Not each with all: config.json has four readers.
            for reader in [*readers][:1] if index % 2 else readers:
                yield case(name, reader, change)
    for field, values in CONFIG_FIELDS.items():
        for index, value in enumerate(values):
            reader = ('main', 'evaluate', 'export')[index % 3]
            change = edit_json(CONFIG, set_field(field, value))
            named = field.rpartition('.')[2]
            yield case(f'config.json {field}={str(value)[:20]}', reader, change, names=named)
    for field, values in RESULT_FIELDS.items():
        for value in values:
            change = edit_json(RESULT, set_field(field, value))
            yield case(f'result.json {field}={value}', 'report', change)
    for name, change in {
        'other classes': set_field('label_names', ['cat', 'dog', 'cow']),
        'other images': set_field('train', '13 images (checksum f21b4142)'),
        'numbers for texts': set_field('train', 5),
        'classes a number': set_field('label_names', 5),
    }.items():
        yield case(f'data.json: {name}', 'main', edit_json(DATA, change))
        unfinished = f'data.json: {name}, unfinished'
        yield case(unfinished, 'main', edit_json(DATA, change), base='unfinished')
    yield from _checkpoint_cases(case)
    yield from _record_cases(case)
    for reader, command in READERS.items():
        for given in ('student', 'images', 'records'):
            wrong = [argument.replace('{input}/run', f'{{{given}}}') for argument in command]
            yield Case('workdirs', f'{reader}: {given} for a workdir', wrong, names=f'{{{given}}}')
        for name, path in {'a file': '{images}/test/cat/0.png', 'too long': 'x' * 300}.items():
            wrong = [argument.replace('{input}/run', path) for argument in command]
            yield Case('workdirs', f'{reader}: workdir {name}', wrong)
        if reader != 'main':
            wrong = [argument.replace('{input}/run', '{input}/absent') for argument in command]
            yield Case('workdirs', f'{reader}: workdir absent', wrong)
    for character in '[*?\\':
        wrong = [argument.replace('{input}/run', f'{{output}}/a{character}') for argument in MAIN]
        yield Case('workdirs', f'main: {character} in the path', wrong)
    wrong = [argument.replace('{output}', '{student}') for argument in EXPORT]
    unchanged = bases.copy(places['run'], in_turn(), 'run')
    yield Case('workdirs', 'export: output not empty', wrong, unchanged)


RESUMES = {'accepts': shows('resumes after step 3', COMPILES), 'writes': True}


def _checkpoint_cases(case: Callable[..., Case]) -> Iterator[Case]:
    damages = {
        'all checkpoints empty': _all(remove('*')),
        'checkpoint a file': in_turn(remove('checkpoints/*'), write('checkpoints/3')),
        'checkpoints a file': write('checkpoints'),
        'checkpoint renamed': in_turn(
            remove(f'checkpoints/{LAST}'), _rename(f'checkpoints/{FIRST}', 'checkpoints/4')
        ),
    }
    for file in CHECKPOINT_FILES:
        flipped = edit(file, bases.flip(0.5))
        damages[f'all checkpoints: {file} flipped'] = _all(flipped)
        damages[f'all checkpoints: {file} emptied'] = _all(edit(file, bases.cut(0)))
        damages[f'all checkpoints: {file} missing'] = _all(remove(file))
        # Of the other checkpoint.
        right = {'accepts': shows('branch 0'), 'compiles': True}
        yield case(f'newest checkpoint: {file} flipped', 'evaluate', _in_newest(flipped), **right)
    for name, damage in damages.items():
        yield case(name, 'evaluate', damage)
        yield case(name, 'main', damage, 'unfinished')
    for reader in ('evaluate', 'export'):
        yield case('no checkpoints', reader, remove('checkpoints'))
    copied = lambda folder: shutil.copytree(folder / 'checkpoints/3', folder / 'checkpoints/5')  # noqa: E731
    yield case('copied to a later step', 'main', copied, 'unfinished')
    unfinished = _rename('checkpoints/3', 'checkpoints/3.orbax-checkpoint-tmp')
    starts = {'accepts': shows(COMPILES), 'writes': True}
    yield case('half a checkpoint', 'main', unfinished, 'unfinished', **starts)
    yield case('undamaged', 'main', in_turn(), 'unfinished', **RESUMES)


def _record_cases(case: Callable[..., Case]) -> Iterator[Case]:
    for name, content in {
        'missing': None,
        'empty': b'',
        'binary': bytes(range(256)) * 10,
        'null lines': b'null\n' * 5,
        'huge numbers': b'{"step": 3, "epoch": 1e308, "split": "test", "branch_top1": [1e308]}\n'
        * 2,
        'huge integers': b'{"step": ' + b'9' * 5000 + b', "epoch": 1, "split": "test"}\n',
        'deep': b'[' * 100_000 + b'\n',
        'steps of text': b'{"step": "x"}\n',
        'measures of text': b'{"step": 3, "epoch": "x", "split": 5, "branch_top1": "x"}\n',
        'measures ragged': b'{"step": 3, "epoch": 1, "split": "test", "branch_top1": [[1], 2]}\n',
        'no measures': b'{"step": 3}\n{"step": 6}\n',
        'NaN': b'{"step": 3, "epoch": NaN, "split": "test", "branch_top1": [NaN]}\n',
    }.items():
        change = remove(RECORDS) if content is None else write(RECORDS, content)
        # A finished run has its result in another file; records that cannot be read are skipped.
        result = {'accepts': shows('83.33')}
        printed = case(f'{RECORDS}: {name}', 'report', change, **result)
        yield printed
        drawn = (*REPORT, '--output={output}')
        yield dataclasses.replace(printed, name=f'{printed.name}, drawn', command=drawn)
        yield case(f'{RECORDS}: {name}', 'main', change, 'unfinished', **RESUMES)
        yield case(f'{RECORDS}: {name}, finished', 'main', change, **result, writes=True)
    yield case(f'{RECORDS}: a folder', 'report', bases.replace_by_folder(RECORDS))
