"""Data sets in the format of TFDS, streamed from TFRecord files and read into memory."""

import dataclasses
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from benchmarks.bad_inputs import bases
from benchmarks.bad_inputs.bases import edit, edit_json, remove, remove_field, set_field
from benchmarks.bad_inputs.runner import COMPILES, Case, shows

SET = 'tiny/1.0.0'
SHARD = f'{SET}/tiny-train.tfrecord-00000-of-00002'
INFO, FEATURES = f'{SET}/dataset_info.json', f'{SET}/features.json'
# Of a record: its length, the checksum of that; behind it its own checksum.
_HEADER = 12


def _label(content: bytes) -> bytes:
    """Changes the label of the first record."""
    return _changed(content, content.index(b'label') + 5 + 6)


def _changed(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def _length(value: int) -> Callable[[bytes], bytes]:
    return lambda content: struct.pack('<Q', value) + content[8:]


def _first(content: bytes) -> int:
    """Returns the size of the first record with its frame."""
    return struct.unpack('<Q', content[:8])[0] + _HEADER + 4


SHARDS = {
    'label changed': _label,
    'pixel changed': lambda content: _changed(content, 60),
    'checksum changed': lambda content: _changed(content, _first(content) - 4),
    'checksum of a length changed': lambda content: _changed(content, 8),
    'last byte changed': bases.flip(1.0),
    'length 0': _length(0),
    'length 2^40': _length(2**40),
    'length 2^64 - 1': _length(2**64 - 1),
    'emptied': bases.cut(0),
    'cut to a half': bases.cut(0.5),
    'cut by a byte': lambda content: content[:-1],
    'cut by a record': lambda content: content[_first(content) :],
    'a record twice': lambda content: content[: _first(content)] + content,
    'a byte more': lambda content: content + b'\0',
    'text': lambda content: b'records\n' * 100,
    'zeros': lambda content: bytes(len(content)),
}
FOLDERS = {
    'shard missing': remove(SHARD),
    'shard a folder': bases.replace_by_folder(SHARD),
    'description missing': remove(INFO),
    'features missing': remove(FEATURES),
    'description no JSON': edit(INFO, bases.cut(0.5)),
    'features no JSON': edit(FEATURES, bases.cut(0.5)),
    'description empty': edit(INFO, bases.cut(0)),
    'features empty': edit(FEATURES, bases.cut(0)),
    'description a list': edit(INFO, lambda _: b'[]'),
    'no splits': edit_json(INFO, set_field('splits', [])),
    'splits of text': edit_json(INFO, set_field('splits', 'x')),
    'no name': edit_json(INFO, remove_field('name')),
    'too few examples': edit_json(INFO, lambda c: c['splits'][0].update(shardLengths=['4', '4'])),
    'too many examples': edit_json(INFO, lambda c: c['splits'][0].update(shardLengths=['60', '6'])),
    'other features': edit(FEATURES, lambda content: content.replace(b'"label"', b'"lapel"')),
    'other class of features': edit(FEATURES, lambda c: c.replace(b'Image', b'Imago')),
    'version missing': remove(SET),
    'set empty': remove(f'{SET}/*'),
}


def record_cases(places: Mapping[str, Path]) -> Iterator[Case]:
    """Damaged sets, read into memory and streamed."""
    command = (
        *bases.RECIPE,
        '--config.data.name=tiny',
        '--config.data.data_dir={input}',
        bases.WORKDIR,
    )
    readers = {
        'memory': (*command, '--config.data.image_size=0'),
        'stream': (*command, bases.STREAM),
    }
    damages = {f'shard: {name}': edit(SHARD, change) for name, change in SHARDS.items()}
    for reader, arguments in readers.items():
        for name, change in (damages | FOLDERS).items():
            make = bases.copy(places['records'], change)
            # A stream opens its files when it makes the first batch.
            compiles = reader == 'stream' and (name in damages or 'examples' in name)
            case = Case('records', f'{reader}: {name}', arguments, make, names='tiny')
            yield dataclasses.replace(case, compiles=compiles)
        make = bases.copy(places['records'], lambda folder: None)
        yield Case('records', f'{reader}: undamaged', arguments, make, shows(COMPILES))
        for name in ('absent', 'tiny/other', 'tiny:9.9.9', 'tiny:x', ''):
            wrong = (*arguments, f'--config.data.name={name}')
            yield Case('records', f'{reader}: data.name={name!r}', wrong, make)
        wrong = (*arguments, '--config.data.data_dir={images}')
        yield Case('records', f'{reader}: folder of images for data_dir', wrong)
