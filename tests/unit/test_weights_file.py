"""Files of weights trained elsewhere: what is read, what is an error, and that no code runs."""

import io
import os
import pickle
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
    'complex64 in place of real numbers in w': {'w': np.array([1j], np.complex64)},
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
