"""Exported students: damaged folders, given to every command that reads one."""

import json
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from benchmarks.bad_inputs import bases
from benchmarks.bad_inputs.bases import edit, edit_json, in_turn, link, remove, set_field
from benchmarks.bad_inputs.runner import COMPILES, Case, shows

CONFIG, WEIGHTS = 'config.json', 'student.safetensors'
# Values of fields of config.json that describe no student.
FIELDS = {
    'network': (None, 5, '', 'resnet33', ['resnet8'], 'resnet20', 'vgg16'),
    'num_classes': (None, 0, -3, 4, 3.0, '3', True, 10**20),
    'label_names': (None, [], ['cat', 'dog'], ['cat', 'dog', 5], 'cat', {'cat': 0}, 3 * ['cat']),
    'input_size': (None, 8, [8], [8, 8, 3], [0, 8], [-8, 8], [8.5, 8], ['8', '8'], [16384, 16384]),
    'crop': (None, 0, -1, 2, 'x', [1]),
    'mean': (
        None,
        0.5,
        [0.5],
        [0.5, 0.5, 'x'],
        [0.5, 0.5, None],
        [0, 0, 1e300],
        3 * [float('nan')],
    ),
    'std': (None, [0.2], [0, 0, 0], [-1, 1, 1], 3 * [1e-40], 3 * [float('inf')], '111'),
    'data': (None, 5, [], {'name': 5}, {'stream': 'x'}, {'nonsense': 1}),
    'batch_norm': ('none', 5, []),
    'ensemble': (None, 5, {}, {'members': []}, {'members': 'resnet8'}),
}
REQUIRED = ('network', 'num_classes', 'label_names', 'input_size', 'mean', 'std')


# Earlier versions wrote no SHA-256 to compare with.
OLD = edit_json(CONFIG, bases.remove_field('weights_sha256'))


def _copy_from(other: Path, file: str) -> Callable[[Path], None]:
    return lambda folder: shutil.copy(other / file, folder / file)


def _arrays(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    """Changes the weights of a student of an earlier version, without a SHA-256."""

    def apply(folder: Path) -> None:
        OLD(folder)
        arrays = safetensors.numpy.load_file(folder / WEIGHTS)
        change(arrays)
        safetensors.numpy.save_file(arrays, folder / WEIGHTS)

    return apply


def _values(name: str, value: float) -> Callable[[dict], None]:
    def change(arrays: dict) -> None:
        arrays[name] = arrays[name].copy()
        arrays[name].flat[0] = value

    return change


def _replace(name: str, make: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict], None]:
    return lambda arrays: arrays.update({name: np.ascontiguousarray(make(arrays[name]))})


def _header(change: Callable[[dict], Any]) -> Callable[[bytes], bytes]:
    """Changes the header of a safetensors file."""

    def apply(content: bytes) -> bytes:
        (size,) = struct.unpack('<Q', content[:8])
        header = json.loads(content[8 : 8 + size])
        header = json.dumps(change(header) or header).encode()
        return struct.pack('<Q', len(header)) + header + content[8 + size :]

    return apply


WEIGHT_FILES = {
    'empty': bases.cut(0),
    'seven bytes': lambda content: content[:7],
    'cut in the header': lambda content: content[:100],
    'cut in the values': bases.cut(0.5),
    'cut by a byte': lambda content: content[:-1],
    'a byte more': lambda content: content + b'\0',
    'header of 2^63': lambda content: b'\xff' * 7 + b'\x7f' + content[8:],
    'header of 2^32': lambda content: struct.pack('<Q', 2**32) + content[8:],
    'header of nothing': lambda content: struct.pack('<Q', 0) + content[8:],
    'header no JSON': lambda content: content[:8] + b'#' + content[9:],
    'header a list': _header(lambda header: [1]),
    'offsets out of the file': _header(
        lambda header: header['fc.weight'].update(data_offsets=[0, 10**12])
    ),
    'offsets negative': _header(lambda header: header['fc.weight'].update(data_offsets=[-4, 8])),
    'shape of another size': _header(lambda header: header['fc.weight'].update(shape=[9, 9])),
    'shape overflows': _header(lambda header: header['fc.weight'].update(shape=[2**62, 4, 2])),
    'unknown dtype': _header(lambda header: header['fc.weight'].update(dtype='F7')),
    'bfloat16 declared': _header(lambda header: header['fc.weight'].update(dtype='BF16')),
    'random': lambda content: np.random.default_rng(0).bytes(len(content)),
    'HTML': lambda content: b'<!doctype html>',
    **{f'bit flipped at {at}': bases.flip(at) for at in (0.0, 0.001, 0.3, 0.6, 1.0)},
    **{f'exponent flipped at {at}': bases.flip(at, 6) for at in (0.2, 0.9999)},
}
ARRAYS = {
    'NaN': _values('fc.weight', float('nan')),
    'infinity': _values('conv1.weight', float('inf')),
    'weight of 3e38': _values('fc.weight', 3e38),
    'negative variance': _values('bn1.running_var', -1.0),
    'name missing': lambda arrays: arrays.pop('fc.bias'),
    'name too many': lambda arrays: arrays.update(extra=np.zeros(3, np.float32)),
    'name changed': lambda arrays: arrays.update({'fc.offset': arrays.pop('fc.bias')}),
    'no arrays': lambda arrays: arrays.clear(),
    'other shape': _replace('fc.weight', lambda x: x[:, :-1]),
    'transposed': _replace('fc.weight', lambda x: x.T),
    'flat': _replace('fc.weight', np.ravel),
    'scalar': _replace('fc.bias', lambda x: x.sum()),
    'text': _replace('fc.bias', lambda x: x.astype(np.bool_)),
    'int8 without a scale': _replace('fc.weight', lambda x: x.astype(np.int8)),
    'classes of another': _replace('fc.bias', lambda x: np.zeros(5, np.float32)),
}


def changes(places: Mapping[str, Path]) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Yields what may be wrong with a student's folder: a name, and a function that does it."""
    for name, content in bases.NOT_OBJECTS.items():
        yield f'config.json: {name}', edit(CONFIG, lambda _, content=content: content)
    for share in (0.1, 0.9):
        yield f'config.json cut at {share}', edit(CONFIG, bases.cut(share))
    for field, values in FIELDS.items():
        for value in values:
            shown = json.dumps(value)[:40]
            yield f'config.json: {field}={shown}', edit_json(CONFIG, set_field(field, value))
    for field in REQUIRED:
        yield f'config.json without {field}', edit_json(CONFIG, bases.remove_field(field))
    for name, change in WEIGHT_FILES.items():
        yield f'weights: {name}', edit(WEIGHTS, change)
        if 'flipped' not in name:
            yield f'weights: {name}, no SHA-256', in_turn(OLD, edit(WEIGHTS, change))
    for name, arrays in ARRAYS.items():
        yield f'arrays: {name}', _arrays(arrays)
    for file in (CONFIG, WEIGHTS):
        yield f'{file} missing', remove(file)
        yield f'{file} a folder', bases.replace_by_folder(file)
        yield f'{file} of another student', _copy_from(places['folded'], file)
        yield f'{file} a link to itself', link(file, file)
        yield f'{file} gives read errors', link(file, '/proc/self/mem')
    yield 'empty folder', remove('*')


def student_cases(places: Mapping[str, Path]) -> Iterator[Case]:
    """Damaged students for predict; every sixth also for the other commands that read one."""
    image = '{images}/test/cat/0.png'
    predict = ('predict', '--student={input}', '--json', image)
    others = {
        'evaluate': ('evaluate', '--student={input}', '--data_root={images}'),
        'ensemble': ('evaluate', '--student={student},{input}', '--data_root={images}'),
        'start': (*bases.TRAIN, '--config.model.init_from={input}', bases.WORKDIR),
        'teacher': (
            *(argument.replace(':plain', ':kd') for argument in bases.TRAIN),
            '--config.method.teachers={input}',
            bases.WORKDIR,
        ),
    }
    for index, (name, change) in enumerate(changes(places)):
        make = bases.copy(places['student'], change)
        yield Case('students', f'predict: {name}', predict, make, names='{input}')
        if index % 6 == 0:
            reader = [*others][index // 6 % len(others)]
            yield Case('students', f'{reader}: {name}', others[reader], make, names='{input}')
    for name, command in {'predict': predict, **others}.items():
        for given in ('run', 'images', 'records'):
            wrong = [argument.replace('{input}', f'{{{given}}}') for argument in command]
            yield Case('students', f'{name}: {given} for a student', wrong, names=f'{{{given}}}')
        for label, path in {'absent': '{input}/absent', 'a file': image, 'long': 'x' * 300}.items():
            wrong = [argument.replace('{input}', path) for argument in command]
            yield Case('students', f'{name}: student {label}', wrong)
    harmless = {
        'no README.md': remove('README.md'),
        'no student.stablehlo': remove('student.stablehlo'),
        'unknown field': edit_json(CONFIG, set_field('unknown', 1)),
        'undamaged': in_turn(),
    }
    for name, change in harmless.items():
        make, right = bases.copy(places['student'], change), shows('"cat"')
        yield Case('students', f'predict: {name}', predict, make, right, compiles=True)
    for name in ('start', 'teacher'):
        yield Case('students', f'{name}: undamaged', others[name], make, shows(COMPILES))
