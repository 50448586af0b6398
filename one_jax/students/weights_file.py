"""Reading files of weights, without ever running code that a file holds."""

import hashlib
import io
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from one_jax.errors import UserError, explain, require

# The authors of ONE save theirs as .pth.tar.
_SAFETENSORS = '.safetensors'
_ENDINGS = (_SAFETENSORS, '.pth', '.pt', '.pth.tar', '.th', '.ckpt', '.bin')
# Earlier versions of `torch.load(weights_only=True)` could be made to run code (CVE-2025-32434).
_SAFE_TORCH = (2, 6)
# No network has larger weights; a flipped bit may make some.
_LARGEST = 1e20
# Before PyTorch 1.6: a magic number, the version, sizes of types, the content, names of storages.
_LEGACY_PICKLES = 5
# Where checkpoints keep the state dict, beside the epoch, the optimiser and so on.
_WRAPPERS = ('state_dict', 'model', 'net', 'model_state_dict')
# What DataParallel, Lightning, distillation code and `torch.compile` put before all names.
_PREFIXES = ('module.', 'model.', 'student.', '_orig_mod.')


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Reads the weights of a network trained elsewhere.

    Unwraps a state dict under one of `_WRAPPERS`, strips `_PREFIXES` that all names have, and
    converts floats of less than 32 bits to float32. Files other than .safetensors need PyTorch.

    Raises:
      UserError: the file is missing, damaged, of another kind, or holds more than weights; or
        PyTorch is missing or too old.
    """
    path = Path(path)
    where = f'weights={str(path)!r}'
    require(os.path.isfile(path), 'weights', str(path), 'there is no such file')
    allowed = f'a file that ends in one of {", ".join(_ENDINGS)}'
    require(path.name.endswith(_ENDINGS), 'weights', str(path), allowed)
    pickled = not path.name.endswith(_SAFETENSORS)
    content = _read_pickled(path, where) if pickled else read_safetensors(path)
    state_dict = {}
    for name, array in _unwrap(content, where).items():
        # What PyTorch raises for sparse, quantised and meta tensors.
        with explain(f'{where}: {name} is no dense tensor', TypeError, RuntimeError):
            state_dict[name] = _to_numpy(array)
    return state_dict


def digest(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Reads a .safetensors file; raises `UserError` for damage, or a dtype that NumPy lacks."""
    # NumPy's lack of a dtype shows as one of the last three.
    damage = (safetensors.SafetensorError, OSError, TypeError, AttributeError, KeyError)
    # `safetensors.numpy.load_file` cannot read bfloat16.
    with explain(f'{str(path)!r} is damaged', *damage), safetensors.safe_open(path, 'np') as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def check_values(state_dict: Mapping[str, np.ndarray]) -> None:
    """Raises `UserError` for values that no network has, such as NaN or above 1e20."""
    problems = []
    for name, array in state_dict.items():
        with np.errstate(over='ignore'):
            # Batches are usually counted in integers.
            kinds = 'fiu' if name.endswith('.num_batches_tracked') else 'f'
            rounded = array.astype(np.float32) if array.dtype.kind in kinds else None
        if rounded is None:
            problems.append(f'{array.dtype} in place of floating-point numbers in {name}')
        elif not (np.abs(rounded) < _LARGEST).all():
            problems.append(f'NaN, infinity or numbers above 1e20 in {name}')
        elif name.endswith('.running_var') and (rounded < 0).any():
            problems.append(f'negative variances in {name}')
    if problems:
        more = [f'and {len(problems) - 5} more'] if len(problems) > 5 else []
        raise UserError('; '.join(problems[:5] + more))


def _read_pickled(path: Path, where: str) -> Any:
    advice = f'(pip install torch, or save it as {_SAFETENSORS})'
    with explain(f'{where} needs PyTorch {advice}', ImportError):
        import torch
    safe = tuple(map(int, torch.__version__.split('.')[:2])) >= _SAFE_TORCH
    allowed = f"with PyTorch {torch.__version__} code in it could run: pip install 'torch>=2.6'"
    require(safe, 'weights', str(path), allowed)
    try:
        if zipfile.is_zipfile(path) and (part := zipfile.ZipFile(path).testzip()):
            raise ValueError(f'{part} differs from its CRC-32')
        # It warns of pickle protocols that it does not expect, and may succeed all the same.
        with warnings.catch_warnings(action='ignore'):
            # Only Python 2 pickles strings that need an encoding.
            options = {'map_location': 'cpu', 'weights_only': True, 'encoding': 'latin-1'}
            try:
                return torch.load(path, **options)
            except pickle.UnpicklingError as error:
                if 'Unsupported operand' not in str(error):
                    raise
                return torch.load(io.BytesIO(_without_text(path.read_bytes())), **options)
    except Exception as error:  # whatever the parsers of damaged files raise
        first = str(error).partition('\n')[0][:100]
        reason = f'is damaged, or not a PyTorch file ({type(error).__name__}: {first})'
        if found := re.search(r'GLOBAL (\S+)', str(error)):
            reason = (
                f'holds more than weights ({found[1]}), and code in a file is never run: save '
                'network.state_dict() alone'
            )
        raise UserError(f'{where} {reason}') from None


def _without_text(content: bytes) -> bytes:
    """Rewrites what `torch.load(weights_only=True)` cannot read of PyTorch's files of Python 2.

    Python 2 pickles integers of more than 32 bits, which name the parameters in an optimiser's
    state, as text, and strings of more than 255 bytes as such. Nothing is unpickled.
    """
    stream, parts = io.BytesIO(content), []
    for _ in range(_LEGACY_PICKLES):
        # Of the operation before, which ends where the next one begins.
        replaced, begin = b'', stream.tell()
        for operation, value, position in pickletools.genops(stream):
            parts.append(replaced or content[begin:position])
            replaced, begin = b'', position
            if operation.name == 'INT' and type(value) is int:
                data = pickle.encode_long(value)
                replaced = pickle.LONG1 + bytes([len(data)]) + data
            elif operation.name == 'BINSTRING':
                data = value.encode()
                replaced = pickle.BINUNICODE + len(data).to_bytes(4, 'little') + data
        parts.append(content[begin : stream.tell()])
    return b''.join(parts) + content[stream.tell() :]


def _unwrap(content: Any, where: str) -> dict[str, Any]:
    """Finds the state dict in what a file holds."""
    for _ in _WRAPPERS:
        if not isinstance(content, Mapping):
            break
        found = [name for name in _WRAPPERS if _may_hold_weights(content.get(name))]
        if len(found) > 1:
            raise UserError(f'{where} holds {" and ".join(found)}: save one of them alone')
        content = content[found[0]] if found else content
    entries = dict(content) if isinstance(content, Mapping) else {0: content}
    others = [
        f'{name!r} ({type(value).__name__})'
        for name, value in entries.items()
        if not (isinstance(name, str) and hasattr(value, 'shape'))
    ]
    if others or not entries:
        raise UserError(
            f'{where} holds no state dict, at the top or under '
            f'{" or ".join(map(repr, _WRAPPERS))}: {", ".join(others[:3]) or "it is empty"}'
        )
    while prefix := next((p for p in _PREFIXES if all(n.startswith(p) for n in entries)), ''):
        entries = {name.removeprefix(prefix): value for name, value in entries.items()}
    return entries


def _may_hold_weights(value: Any) -> bool:
    """Whether there are arrays or more dictionaries in it; settings may be called 'model' too."""
    values = value.values() if isinstance(value, Mapping) else ()
    return any(hasattr(entry, 'shape') or isinstance(entry, Mapping) for entry in values)


def _to_numpy(array: Any) -> np.ndarray:
    if not isinstance(array, np.ndarray):
        # PyTorch cannot convert bfloat16 to NumPy.
        array = array.float() if array.is_floating_point() and array.itemsize < 4 else array
        array = array.detach().numpy()
    return array.astype(np.float32) if array.dtype in (np.float16, jnp.bfloat16) else array
