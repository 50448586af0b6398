"""Folders of images."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.bad_inputs import bases
from benchmarks.bad_inputs.bases import in_turn, link, remove, write
from benchmarks.bad_inputs.runner import COMPILES, Case, shows

FIRST = bases.CLASSES[0]


def _add(path: str) -> Callable[[Path], None]:
    """Returns a function that adds an image under a path."""

    def change(folder: Path) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(bases.pixels()).save(folder / path, 'PNG')

    return change


def _lock(path: str) -> Callable[[Path], None]:
    return lambda folder: (folder / path).chmod(0)


def _keep_one_class(folder: Path) -> None:
    for name in bases.CLASSES[1:]:
        remove(f'*/{name}')(folder)


def _rename_class(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for split in ('train', 'test'):
            (folder / split / FIRST).rename(folder / split / name)

    return change


REFUSED = {
    'empty': remove('*'),
    'without train, with test': remove('train'),
    'train is a file': write('train'),
    'train is empty': remove('train/*'),
    'train is a link to itself': in_turn(remove('train'), link('train', 'train')),
    'one class': _keep_one_class,
    'empty class': remove(f'train/{FIRST}/*'),
    'class of hidden images': in_turn(remove(f'train/{FIRST}/*'), _add(f'train/{FIRST}/._0.png')),
    'class of texts': in_turn(remove(f'train/{FIRST}/*'), write(f'train/{FIRST}/a.txt')),
    'class of broken links': in_turn(
        remove(f'train/{FIRST}/*'), link(f'train/{FIRST}/0.png', 'absent')
    ),
    'class unknown in train': _add('test/wolf/0.png'),
    'class of train is a file': write(f'train/{FIRST}'),
    'test is empty': remove('test/*'),
    'test without images': remove('test/*/*'),
    'class not UTF-8': _rename_class('\udcff'),
    'one image a class, no test': in_turn(remove('test'), remove('train/*/[1-9].png')),
}
ACCEPTED = {
    'hidden entries': (_add('train/.ipynb_checkpoints/0.png'), ('.ipynb_checkpoints',)),
    'hidden files': (_add(f'train/{FIRST}/.DS_Store'), ('.DS_Store',)),
    'text among images': (write(f'train/{FIRST}/labels.csv'), ('labels.csv',)),
    'text beside classes': (write('train/README'), ('README',)),
    'class missing in test': (remove(f'test/{FIRST}'), (FIRST, 'without an image')),
    'no test': (remove('test'), ('held out',)),
    'class linked to itself': (link('train/loop', 'loop'), ('loop',)),
    'name not UTF-8': (_add(f'train/{FIRST}/\udcff.png'), ()),
    'name of 255 bytes': (_add(f'train/{FIRST}/{"x" * 251}.png'), ()),
    'class of 255 bytes': (_rename_class('x' * 255), ()),
    'class with a line break': (_rename_class('a\nb'), ()),
    'class named by a space': (_rename_class(' '), ()),
    'class named like a flag': (_rename_class('--help'), ()),
    'validation beside test': (_add(f'val/{FIRST}/0.png'), ()),
}


def _case(
    reader: str, name: str, change: Callable, arguments: Sequence[str] = (), **rest: Any
) -> Case:
    def make(folder: Path) -> None:
        bases.write_images(folder)
        change(folder)

    stream = (bases.STREAM,) if reader == 'stream' else ()
    root = '--config.data.root={input}'
    command = (*bases.RECIPE, root, *stream, *arguments, bases.WORKDIR)
    return Case('folders', f'{reader}: {name}', command, make, **rest)


def _add_another_size(folder: Path) -> None:
    Image.new('RGB', (9, 9)).save(folder / 'train' / FIRST / 'x.png')


ROOTS = {
    'absent': '{input}/absent',
    'a file': '{input}/train/cat/0.png',
    'not UTF-8': '{input}/\udcff',
    'too long': '{input}/' + 'x' * 5000,
    'with a zero byte': '{input}/\0',
    'not given': '',
}


def folder_cases(places: Mapping[str, Path]) -> Iterator[Case]:
    """Folders of images, in memory and streamed."""
    for reader in ('memory', 'stream'):
        for name, change in REFUSED.items():
            yield _case(reader, name, change, names='{input}')
        for name, (change, notes) in ACCEPTED.items():
            yield _case(reader, name, change, accepts=shows(*notes, COMPILES))
        for path in ('train', f'train/{FIRST}', f'train/{FIRST}/0.png'):
            unreadable = _lock(path)
            yield _case(
                reader, f'unreadable {path}', unreadable, names='{input}', unprivileged=True
            )
        for name, path in ROOTS.items():
            override = f'--config.data.root={path}'
            yield _case(reader, f'root {name}', in_turn(), (override,), names='data.root')
    sizes = ('--config.data.image_size=0',)
    yield _case('memory', 'several sizes', _add_another_size, sizes, names='data.image_size')
