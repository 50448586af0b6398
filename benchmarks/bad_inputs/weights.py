"""Files of weights for import_weights; those of PyTorch only if it is installed."""

import importlib.util
import io
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from benchmarks.bad_inputs import bases, students
from benchmarks.bad_inputs.runner import CANARY, Case, shows

COMMAND = (
    'import_weights',
    '--network=resnet8',
    '--config=configs/image_folder.py',
    '--config.data.root={images}',
    '--config.data.image_size=8',
    '--output={output}',
)


class Code:
    """An object whose pickle touches the canary when it is read."""

    def __reduce__(self) -> tuple:
        return os.system, (f'touch {CANARY}',)


def _saved(content: Any, **options: Any) -> bytes:
    import torch

    data = io.BytesIO()
    torch.save(content, data, **options)
    return data.getvalue()


def _zip(**members: bytes) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, 'w', zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return data.getvalue()


def plain_files() -> dict[str, bytes]:
    """Returns malformed .pth files that need no PyTorch to make."""
    pickles = {f'code, protocol {p}': pickle.dumps(Code(), p) for p in range(6)}
    return pickles | {
        'empty': b'',
        'a byte': b'\x80',
        'text': b'weights',
        'HTML': b'<!doctype html>',
        'zeros': bytes(1000),
        'protocol 255': b'\x80\xff.',
        'pickle cut': pickle.dumps({'fc.weight': [1.0] * 100})[:-50],
        'pickled lists': pickle.dumps({'fc.weight': [1.0]}),
        'pickle deep': b'\x80\x02' + b']' * 100_000 + b'.',
        'pickle of 2^31 bytes': b'\x80\x04\x8e' + (2**31).to_bytes(8, 'little') + b'x.',
        'pickle of 2^62 bytes': b'\x80\x04\x8e' + (2**62).to_bytes(8, 'little') + b'x.',
        'empty zip': _zip(),
        'zip of others': _zip(readme=b'x'),
        'zip with code': _zip(
            **{'archive/data.pkl': pickle.dumps(Code()), 'archive/version': b'3'}
        ),
        'zip of 64 MB': _zip(**{'archive/data.pkl': bytes(2**26), 'archive/version': b'3'}),
        'zip out of its folder': _zip(**{'../../data.pkl': b'x'}),
        'gzip': b'\x1f\x8b\x08' + bytes(100),
        'tar': b'x' + bytes(256) + b'ustar' + bytes(300),
        'HDF5': b'\x89HDF\r\n\x1a\n' + bytes(500),
        'NumPy': b'\x93NUMPY\x01\x00' + bytes(100),
    }


def _tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}


def _content(change: Callable[[dict], Any], **options: Any) -> Callable[[dict], bytes]:
    """Returns a function from the right weights to the file of what `change` makes of them."""
    return lambda good: _saved(change(good), **options)


def _weight(change: Callable[[Any], Any]) -> Callable[[dict], bytes]:
    """The same for one of the weights."""
    return _content(lambda good: good | {'fc.weight': change(good['fc.weight'])})


def malformed_contents() -> dict[str, Callable[[dict], bytes]]:
    """Returns functions from the right weights to the malformed .pth files that PyTorch writes."""
    import torch

    return {
        # PyTorch reads no other protocol than 2 without running code.
        'protocol 4': _content(lambda good: good, pickle_protocol=4),
        'sparse': _weight(lambda x: x.to_sparse()),
        'compressed sparse': _weight(lambda x: x.to_sparse_csr()),
        'meta': _weight(lambda x: x.to('meta')),
        'quantised': _weight(lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)),
        'complex': _weight(lambda x: x.to(torch.complex64)),
        'booleans': _weight(lambda x: x > 0),
        'NaN': _weight(lambda x: x * float('nan')),
        'weights of 3e38': _weight(lambda x: 0 * x + 3e38),
        'scalar': _content(lambda good: good | {'fc.bias': good['fc.bias'].sum()}),
        'other shape': _weight(lambda x: x[:, :-1]),
        'name missing': _content(lambda good: {k: v for k, v in good.items() if k != 'fc.bias'}),
        'name too many': _content(lambda good: good | {'fc2.bias': good['fc.bias']}),
        'names numbers': _content(lambda good: {1: good['fc.weight']}),
        'text among arrays': _content(lambda good: good | {'comment': 'x'}),
        'a tensor': _content(lambda good: good['fc.weight']),
        'a list': _content(lambda good: [good['fc.weight']]),
        'nothing': _content(lambda good: {}),
        'None': _content(lambda good: None),
        'no arrays below state_dict': _content(lambda good: {'state_dict': {}}),
        'two state dicts': _content(lambda good: {'model': good, 'net': good}),
        'wrapped three times': _content(lambda good: {'a': {'b': {'c': good}}}),
        'in an unknown wrapper': _content(lambda good: {'weights_of_mine': good}),
        'with code': _content(lambda good: good | {'x': Code()}),
        'with code in an old file': _content(
            lambda good: good | {'x': Code()}, _use_new_zipfile_serialization=False
        ),
        'a network': _content(lambda good: torch.nn.Linear(2, 2)),
        'wrapped, with code': _content(lambda good: {'state_dict': good, 'args': Code()}),
        **{
            f'cut at {share}': lambda good, share=share: bases.cut(share)(_saved(good))
            for share in (0.1, 0.5, 0.99)
        },
        **{
            f'flipped at {share}': lambda good, share=share: bases.flip(share, 3)(_saved(good))
            for share in (0.0, 0.5, 0.999)
        },
    }


def sound_contents() -> dict[str, Callable[[dict], bytes]]:
    """Returns functions from the right weights to .pth files that can be used."""
    import torch

    return {
        'state dict': _content(lambda good: good),
        'old file': _content(lambda good: good, _use_new_zipfile_serialization=False),
        'checkpoint': _content(
            lambda good: {
                'state_dict': {f'module.{k}': v for k, v in good.items()},
                'epoch': 3,
                'optimizer': {},
            }
        ),
        'doubles': _content(lambda good: {name: array.double() for name, array in good.items()}),
        'strided': _content(
            lambda good: good | {'fc.weight': good['fc.weight'].t().contiguous().t()}
        ),
        'parameters': _content(
            lambda good: {k: torch.nn.Parameter(v, False) for k, v in good.items()}
        ),
    }


def weights_cases(places: Mapping[str, Path]) -> Iterator[Case]:
    """Malformed files of weights; code in them must not run."""

    def case(name: str, make: Callable, ending: str = '.pth', **rest: Any) -> Case:
        command = (*COMMAND, f'--weights={{input}}/weights{ending}')

        def write(folder: Path) -> None:
            (folder / f'weights{ending}').write_bytes(make())

        rest = rest or {'names': '{input}/weights'}
        return Case('weights', f'{name}{ending}', command, write, **rest)

    base = places['student'] / students.WEIGHTS

    def arrays() -> dict[str, Any]:
        return safetensors.numpy.load_file(base)

    for name, change in students.WEIGHT_FILES.items():
        # A flipped bit makes other weights, which nothing tells from the right ones.
        if 'bit flipped' not in name or '0.0' in name:
            yield case(name, lambda change=change: change(base.read_bytes()), '.safetensors')
    for name, change in students.ARRAYS.items():

        def changed(change: Callable = change) -> bytes:
            values = arrays()
            change(values)
            return safetensors.numpy.save(values)

        yield case(f'arrays: {name}', changed, '.safetensors')
    for name, data in plain_files().items():
        yield case(name, lambda data=data: data)
    for ending in ('.npz', '.h5', '', '.safetensors.bak'):
        yield case('unknown ending', base.read_bytes, ending)
    for name, path in {
        'absent': '{input}/absent.pth',
        'a folder': '{student}',
        'a folder of that ending': '{input}/x.pth',
        'a pipe': '{input}/pipe.pth',
        'linked to itself': '{input}/loop.pth',
        'with read errors': '{input}/memory.pth',
        'with read errors, safetensors': '{input}/memory.safetensors',
        'too long': 'x' * 5000 + '.pth',
    }.items():
        yield Case('weights', name, (*COMMAND, f'--weights={path}'), _special)
    right = ('--weights={student}/student.safetensors', *COMMAND[1:])
    for override in (
        '--network=resnet33',
        '--network=',
        '--network=resnet20',
        '--layout=two',
        '--branch=1',
        '--layout=one',
    ):
        yield Case('weights', override, ('import_weights', *right, override))
    if importlib.util.find_spec('torch') is None:
        return
    for name, content in malformed_contents().items():
        yield case(name, lambda content=content: content(_tensors(arrays())))
    for name, content in sound_contents().items():
        make = lambda content=content: content(_tensors(arrays()))  # noqa: E731
        yield case(name, make, accepts=shows('77,587 parameters'), compiles=True)


def _special(folder: Path) -> None:
    (folder / 'x.pth').mkdir()
    os.mkfifo(folder / 'pipe.pth')
    (folder / 'loop.pth').symlink_to('loop.pth')
    for ending in ('pth', 'safetensors'):
        (folder / f'memory.{ending}').symlink_to('/proc/self/mem')
