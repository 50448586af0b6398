"""Files of weights trained elsewhere: what is read, what is an error, and that no code runs."""

import collections
import io
import os
import pickle
import struct
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from one_jax.errors import UserError
from one_jax.students import weights_file


def test_low_precision_becomes_float32_and_prefixes_come_off(tmp_path):
    path = tmp_path / 'weights.safetensors'
    values = np.array([0.5, -3.0])
    halves = {'module.a': values.astype(np.float16), 'module.b': values.astype(jnp.bfloat16)}
    safetensors.numpy.save_file({**halves, 'module.c': values}, path)
    read = weights_file.read_state_dict(path)
    dtypes = {name: array.dtype.name for name, array in read.items()}
    assert dtypes == {'a': 'float32', 'b': 'float32', 'c': 'float64'}
    for array in read.values():
        np.testing.assert_array_equal(array, values)
    # A prefix that not all names have is part of the names.
    safetensors.numpy.save_file({'module.a': values, 'b': values}, path)
    assert weights_file.read_state_dict(path).keys() == {'module.a', 'b'}


UNREADABLE = {
    'missing.safetensors': (None, 'there is no such file'),
    'truncated.safetensors': (safetensors.numpy.save({'a': np.ones(99)})[:200], 'is damaged'),
    'pickled.safetensors': (pickle.dumps({'a': np.ones(3)}), 'is damaged'),
    'empty.safetensors': (b'', 'is damaged'),
    'nothing.safetensors': (safetensors.numpy.save({}), 'holds no state dict'),
    'weights.h5': (
        b'\x89HDF',
        'a file that ends in one of .safetensors, .pth, .pt, .pth.tar, .th, .ckpt, .bin',
    ),
}


@pytest.mark.parametrize('name', UNREADABLE)
def test_unreadable_file_is_one_clear_line(tmp_path, name):
    content, words = UNREADABLE[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as raised:
        weights_file.read_state_dict(tmp_path / name)
    assert words in str(raised.value)
    assert name in str(raised.value)
    assert '\n' not in str(raised.value)


IMPOSSIBLE = {
    'NaN, infinity or numbers above 1e20 in bias': {'bias': np.array([1, np.nan])},
    # A number that only float64 can hold.
    'NaN, infinity or numbers above 1e20 in scale': {'scale': np.array([1e300])},
    'negative variances in bn.running_var': {'bn.running_var': np.array([-1e-3])},
    'complex64 in place of floating-point numbers in w': {'w': np.array([1j], np.complex64)},
}


@pytest.mark.parametrize('words', IMPOSSIBLE)
def test_impossible_values_are_an_error(words):
    with pytest.raises(UserError, match=words):
        weights_file.check_values({'good': np.ones(3), **IMPOSSIBLE[words]})


@pytest.mark.parametrize(
    ('module', 'words'),
    [
        # What `import torch` meets where it is not installed.
        (None, 'pip install torch, or save it as .safetensors'),
        (types.SimpleNamespace(__version__='2.5.1+cpu'), "pip install 'torch>=2.6'"),
    ],
)
def test_pickled_file_without_a_safe_pytorch_is_an_error(tmp_path, monkeypatch, module, words):
    monkeypatch.setitem(sys.modules, 'torch', module)
    (tmp_path / 'weights.pth').write_bytes(b'')
    with pytest.raises(UserError) as raised:
        weights_file.read_state_dict(tmp_path / 'weights.pth')
    assert words in str(raised.value)


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def saved(content, **options):
    """Returns the bytes that `torch.save` writes."""
    file = io.BytesIO()
    pytest.importorskip('torch').save(content, file, **options)
    return file.getvalue()


@pytest.mark.parametrize('wrap', [lambda x: x, lambda x: {'state_dict': x}])
@pytest.mark.parametrize('form', ['zip', 'legacy', 'pickle', 'pickle of protocol 4'])
def test_code_in_a_file_is_not_run(tmp_path, wrap, form):
    pytest.importorskip('torch')
    content = wrap(Evil(tmp_path / 'evil'))
    data = {
        'zip': lambda: saved(content),
        'legacy': lambda: saved(content, _use_new_zipfile_serialization=False),
        'pickle': lambda: pickle.dumps(content, 2),
        'pickle of protocol 4': lambda: pickle.dumps(content, 4),
    }[form]()
    (tmp_path / 'weights.pth').write_bytes(data)
    with pytest.raises(UserError) as raised:
        weights_file.read_state_dict(tmp_path / 'weights.pth')
    assert not (tmp_path / 'evil').exists()
    assert '\n' not in str(raised.value)
    if form in ('zip', 'legacy'):
        assert 'mkdir), and code in a file is never run' in str(raised.value)
    # The pickle is what it claims to be.
    pickle.loads(pickle.dumps(content))
    assert (tmp_path / 'evil').is_dir()


def test_state_dicts_are_found_in_pytorchs_checkpoints(tmp_path):
    torch = pytest.importorskip('torch')
    weights = {
        'module.conv.weight': torch.arange(6.0).reshape(2, 3).requires_grad_(),
        'module.bn.running_mean': torch.tensor([0.5, 2.0], dtype=torch.bfloat16),
        'module.bn.num_batches_tracked': torch.tensor(7),
    }
    for name, content in {
        'bare.pth': weights,
        'checkpoint.pth.tar': {'epoch': 3, 'state_dict': weights, 'optimizer': {'lr': 0.1}},
        'model.pt': {'model': weights, 'args': None},
        'ckpt.th': {'net': weights, 'acc': 93.1, 'model': {'depth': 20}},
        'last.ckpt': {'model_state_dict': {f'model.{name}': x for name, x in weights.items()}},
        'pytorch_model.bin': {f'_orig_mod.student.{name}': x for name, x in weights.items()},
    }.items():
        (tmp_path / name).write_bytes(saved(content))
        read = weights_file.read_state_dict(tmp_path / name)
        assert read.keys() == {'conv.weight', 'bn.running_mean', 'bn.num_batches_tracked'}
        np.testing.assert_array_equal(read['conv.weight'], [[0, 1, 2], [3, 4, 5]], strict=False)
        np.testing.assert_array_equal(read['bn.running_mean'], np.float32([0.5, 2.0]), strict=True)
        assert read['bn.num_batches_tracked'] == 7


@pytest.mark.filterwarnings('ignore:torch.quantize')
def test_pytorch_files_without_a_state_dict_are_one_clear_line(tmp_path):
    torch = pytest.importorskip('torch')
    whole = saved({'a': torch.ones(1000)})
    quantised = torch.quantize_per_tensor(torch.ones(2), 1, 0, torch.qint8)
    for content, words in (
        (saved(torch.nn.Linear(2, 2)), 'save network.state_dict() alone'),
        (saved(torch.ones(3)), '(Tensor)'),
        (saved({'epoch': 3, 'loss': 0.5}), "'epoch' (int), 'loss' (float)"),
        (saved({}), 'it is empty'),
        (
            saved({'net': {'a': torch.ones(1)}, 'model': {'a': torch.ones(1)}}),
            'model and net: save',
        ),
        (saved({'a': torch.eye(2).to_sparse()}), 'a is no dense tensor: '),
        (saved({'a': torch.eye(2, device='meta')}), 'a is no dense tensor: '),
        (saved({'a': quantised}), 'a is no dense tensor: '),
        (whole[: len(whole) // 2], 'is damaged, or not a PyTorch file'),
        (b'', 'is damaged, or not a PyTorch file'),
    ):
        (tmp_path / 'weights.pth').write_bytes(content)
        with pytest.raises(UserError) as raised:
            weights_file.read_state_dict(tmp_path / 'weights.pth')
        assert words in str(raised.value)
        assert '\n' not in str(raised.value)


class Python2Pickler(pickle._Pickler):
    """Pickles as Python 2.7 and PyTorch 0.3 do, by their sources: nothing here can run them.

    Strings are bytes, larger integers text, and an OrderedDict is made of a list of pairs. A
    FloatTensor on a GPU is `_rebuild_tensor` of its storage, whose numbers follow the pickles.
    """

    def __init__(self, file, storages):
        super().__init__(file, 2)
        self.storages = storages

    def save_string(self, value):
        data = value.encode('latin-1')
        short = len(data) < 256
        self.write(b'U' + bytes([len(data)]) if short else b'T' + struct.pack('<i', len(data)))
        self.write(data)
        self.memoize(value)

    def save_integer(self, value):
        if abs(value) < 2**31 or value > 2**63:
            self.save_long(value)
        else:
            self.write(b'I%d\n' % value)

    def save_ordered(self, value):
        pairs = [list(pair) for pair in value.items()]
        self.save_reduce(collections.OrderedDict, (pairs,), obj=value)

    def reducer_override(self, value):
        torch = sys.modules['torch']
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        strides, storage = value.stride(), Storage(value, f'{94870000000000 + len(self.storages)}')
        self.storages.append(storage)
        return torch._utils._rebuild_tensor, (storage, 0, tuple(value.shape), strides)

    def persistent_id(self, value):
        if not isinstance(value, Storage):
            return None
        return (
            'storage',
            Global('torch.cuda', 'FloatStorage'),
            value.key,
            'cuda:0',
            value.size,
            None,
        )


class Storage:
    """The numbers of a tensor."""

    def __init__(self, tensor, key):
        self.values, self.key, self.size = tensor.numpy(), key, tensor.numel()


class Global:
    """Is pickled as a class of another module."""

    def __init__(self, module, name):
        self.name = f'c{module}\n{name}\n'.encode()


Python2Pickler.dispatch = {
    **pickle._Pickler.dispatch,
    str: Python2Pickler.save_string,
    int: Python2Pickler.save_integer,
    collections.OrderedDict: Python2Pickler.save_ordered,
    Global: lambda pickler, value: pickler.write(value.name),
}


def saved_by_python2(content):
    """Returns what `torch.save` of PyTorch 0.3 writes with Python 2.7."""
    file, storages = io.BytesIO(), []
    types = {'short': 2, 'int': 4, 'long': 4}
    system = {'protocol_version': 1001, 'little_endian': True, 'type_sizes': types}
    for part in (0x1950A86A20F9469CFC6C, 1001, system, content):
        Python2Pickler(file, storages).dump(part)
    storages.sort(key=lambda storage: storage.key)
    Python2Pickler(file, []).dump([storage.key for storage in storages])
    for storage in storages:
        file.write(struct.pack('<q', storage.size) + storage.values.astype('<f4').tobytes())
    return file.getvalue()


def test_checkpoint_of_python2_with_its_optimiser_is_read(tmp_path):
    torch = pytest.importorskip('torch')
    weights = collections.OrderedDict(
        {'module.conv.weight': torch.arange(6.0).reshape(2, 3), 'module.bn.bias': torch.ones(2)}
    )
    # Each parameter is named by its address.
    addresses = [140_234_567_890_123, 140_234_567_890_456]
    content = {
        'epoch': 300,
        'arch': 'one_resnet32',
        'state_dict': weights,
        'best_prec1': 74.5,
        'optimizer': {
            'state': {address: {'momentum_buffer': torch.ones(2)} for address in addresses},
            'param_groups': [{'lr': 0.001, 'nesterov': False, 'params': addresses}],
        },
        'note': 300 * 'caf\u00e9 ',
    }
    path = tmp_path / 'model_best.pth.tar'
    path.write_bytes(saved_by_python2(content))
    read = weights_file.read_state_dict(path)
    assert read.keys() == {'conv.weight', 'bn.bias'}
    np.testing.assert_array_equal(read['conv.weight'], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(read['bn.bias'], [1, 1])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match='is damaged'):
        weights_file.read_state_dict(path)


def test_code_in_a_file_of_python2_is_not_run(tmp_path):
    pytest.importorskip('torch')
    content = {'optimizer': [140_234_567_890_123], 'state_dict': Evil(tmp_path / 'evil')}
    (tmp_path / 'weights.pth').write_bytes(saved_by_python2(content))
    with pytest.raises(UserError, match=r'mkdir\), and code in a file is never run'):
        weights_file.read_state_dict(tmp_path / 'weights.pth')
    assert not (tmp_path / 'evil').exists()
