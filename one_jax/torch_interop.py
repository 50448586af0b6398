"""Our variables under PyTorch's names and in PyTorch's layout, and back; reading weights files."""

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from one_jax.errors import UserError
from one_jax.models import multibranch

_LEAVES = {
    ('params', 'kernel'): 'weight',
    ('params', 'scale'): 'weight',
    ('params', 'bias'): 'bias',
    ('batch_stats', 'mean'): 'running_mean',
    ('batch_stats', 'var'): 'running_var',
}
# PyTorch's axis order of a kernel, by its number of dimensions: HWIO -> OIHW, and in-out -> out-in.
_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0)}
_COUNTER = '.num_batches_tracked'
# Endings of weights files; the authors of ONE save theirs as .pth.tar.
_SAFETENSORS, _PICKLED = '.safetensors', ('.pth', '.pt', '.pth.tar')
# Before it, `torch.load(weights_only=True)` could be made to run code (CVE-2025-32434).
_SAFE_TORCH = (2, 6)
# Where checkpoints keep the state dict, beside the epoch, the optimiser and so on.
_WRAPPERS = ('state_dict', 'model')
_PARALLEL_PREFIX = 'module.'
# Names, spelt so, in the code of ONE's authors.
_ONE_CLASSIFIER = 'classfier3'
_ONE_GATE = {'linear': 'control_v1', 'bn': 'bn_v1'}


def torch_name(path: tuple[str, ...]) -> str:
    """PyTorch's name of a variable.

    Args:
      path: collection, modules, leaf, e.g. `('params', 'layer1_0', 'conv1', 'kernel')`, which is
        `'layer1.0.conv1.weight'`.
    """
    collection, *modules, leaf = path
    dotted = [re.sub(r'_(\d+)', r'.\1', module) for module in modules]
    return '.'.join([*dotted, _LEAVES[collection, leaf]])


def _axes(array: Any) -> tuple[int, ...]:
    return _TO_TORCH.get(len(array.shape), tuple(range(len(array.shape))))


def _named_leaves(variables: Mapping[str, Any]) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return [(torch_name(tuple(key.key for key in path)), leaf) for path, leaf in leaves]


def to_state_dict(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A plain network's variables as a PyTorch state dict of NumPy arrays.

    Args:
      variables: `{'params': ..., 'batch_stats': ...}`, arrays or NumPy arrays.
    """
    return {
        name: np.ascontiguousarray(np.transpose(np.asarray(leaf), _axes(leaf)))
        for name, leaf in _named_leaves(variables)
    }


def from_state_dict(state_dict: Mapping[str, np.ndarray], template: Mapping[str, Any]) -> Any:
    """The inverse of `to_state_dict`; `num_batches_tracked`, which we have not, is passed over.

    Args:
      state_dict: PyTorch's names and layout.
      template: the variables' tree, of arrays or `ShapeDtypeStruct`s.

    Returns:
      NumPy arrays in the structure and dtypes of `template`.

    Raises:
      UserError: names are missing or unknown, or shapes differ; all are listed.
    """
    given = _without_counters(state_dict)
    _check_fit({name: _torch_shape(leaf) for name, leaf in _named_leaves(template)}, given)

    def take(path, leaf):
        array = given[torch_name(tuple(key.key for key in path))]
        return np.transpose(array, np.argsort(_axes(leaf))).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(take, dict(template))


def _without_counters(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    return {name: array for name, array in state_dict.items() if not name.endswith(_COUNTER)}


def _torch_shape(leaf: Any) -> tuple[int, ...]:
    return tuple(leaf.shape[axis] for axis in _axes(leaf))


def _check_fit(wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, np.ndarray]) -> None:
    """Raises `UserError` with all names that are missing or unknown, or whose shapes differ."""
    problems = [f'missing {name}' for name in sorted(wanted.keys() - given.keys())]
    problems += [f'unknown {name}' for name in sorted(given.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & given.keys()):
        shape = tuple(given[name].shape)
        if shape != wanted[name]:
            problems.append(f'{name} has shape {shape} and not {wanted[name]}')
    if problems:
        raise UserError(f'the weights do not fit the network: {"; ".join(problems)}')


def ensemble_to_state_dict(variables: Mapping[str, Any], num_branches: int) -> dict[str, Any]:
    """An ensemble's variables as a state dict: the trunk's names as in the plain network, those of
    head i behind 'branches.i.'.

    Args:
      variables: of a `MultiBranch`; its aggregator is left out.
      num_branches: K.
    """
    state_dict = {}
    for part, tree in multibranch.split_ensemble(variables, num_branches).items():
        prefix = '' if part == 'trunk' else f'{part}.'
        state_dict |= {prefix + name: array for name, array in to_state_dict(tree).items()}
    return state_dict


def ensemble_from_state_dict(
    state_dict: Mapping[str, np.ndarray], template: Mapping[str, Any], num_branches: int
) -> Any:
    """The inverse of `ensemble_to_state_dict`; the arguments and errors are `from_state_dict`'s."""
    templates = jax.eval_shape(
        lambda variables: multibranch.split_ensemble(variables, num_branches), template
    )
    parts, taken = {}, set()
    # By number: `eval_shape` has sorted the names, 'branches.10' before 'branches.2'.
    for part in ('trunk', *(f'branches.{branch}' for branch in range(num_branches))):
        tree, prefix = templates[part], f'{part}.'
        own = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        if part == 'trunk':
            own = {k: v for k, v in state_dict.items() if not k.startswith('branches.')}
            prefix = ''
        taken |= {prefix + name for name in own}
        parts[part] = from_state_dict(own, tree)
    if unknown := sorted(state_dict.keys() - taken):
        raise UserError(f'the weights do not fit the network: unknown {"; unknown ".join(unknown)}')
    return multibranch.join_ensemble(parts, alike='head' in template['params'])


def to_one_checkpoint(variables: Mapping[str, Any], num_branches: int) -> dict[str, np.ndarray]:
    """ONE's network in training as a state dict of its authors' PyTorch code (`one_resnet`).

    The trunk has the plain network's names; stage 3 and the classifier of each branch are
    `layer3_1`, `classfier3_1`, and so on; the gate is `control_v1` and `bn_v1`.

    Args:
      variables: of a `MultiBranch` of CIFAR ResNets above two shared stages, with the gate.
      num_branches: K.
    """
    return {
        _one_name(part, name): array
        for part, tree in _one_parts(variables, num_branches).items()
        for name, array in to_state_dict(tree).items()
    }


def from_one_checkpoint(
    state_dict: Mapping[str, np.ndarray], template: Mapping[str, Any], num_branches: int
) -> Any:
    """The inverse of `to_one_checkpoint`; the arguments and errors are `from_state_dict`'s."""
    given = _without_counters(state_dict)
    templates = jax.eval_shape(lambda variables: _one_parts(variables, num_branches), template)
    wanted = {
        _one_name(part, name): leaf
        for part, tree in templates.items()
        for name, leaf in _named_leaves(tree)
    }
    _check_fit({name: _torch_shape(leaf) for name, leaf in wanted.items()}, given)

    def take(part):
        names = [name for name, _ in _named_leaves(templates[part])]
        own = {name: given[_one_name(part, name)] for name in names}
        return from_state_dict(own, templates[part])

    # By number: `eval_shape` has sorted the names, 'branches.10' before 'branches.2'.
    parts = {
        part: take(part) for part in ('trunk', *map('branches.{}'.format, range(num_branches)))
    }
    variables = multibranch.join_ensemble(parts, alike=True)
    gate = take('aggregator')
    return {name: {**tree, 'aggregator': gate[name]} for name, tree in variables.items()}


def _one_parts(variables: Mapping[str, Any], num_branches: int) -> dict[str, Any]:
    gate = {name: tree['aggregator'] for name, tree in variables.items()}
    return {**multibranch.split_ensemble(variables, num_branches), 'aggregator': gate}


def _one_name(part: str, name: str) -> str:
    """The authors' name of what is `name` in the trunk, in 'branches.i' or in the aggregator."""
    if part == 'trunk':
        return name
    module, rest = name.split('.', 1)
    if part == 'aggregator':
        return f'{_ONE_GATE[module]}.{rest}'
    number = int(part.removeprefix('branches.')) + 1
    return f'{_ONE_CLASSIFIER if module == "fc" else module}_{number}.{rest}'


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Reads the weights of a network trained elsewhere; never runs code that a file holds.

    A state dict under 'state_dict' or 'model' is taken out of its checkpoint, and the 'module.' of
    a DataParallel network off its names. Floats of less than 32 bits become float32.

    Args:
      path: of a .safetensors, .pth, .pt or .pth.tar file; all but the first need PyTorch.

    Raises:
      UserError: no such file, another kind of file, a damaged one, one that holds more than
        weights, or PyTorch is needed and missing or too old.
    """
    path = Path(path)
    where = f'weights={str(path)!r}'
    if not os.path.isfile(path):
        raise UserError(f'{where}: there is no such file')
    if path.name.endswith(_SAFETENSORS):
        content = read_safetensors(path, where)
    elif path.name.endswith(_PICKLED):
        content = _read_pickled(path, where)
    else:
        endings = ', '.join((_SAFETENSORS, *_PICKLED))
        raise UserError(f'{where} is not allowed: a file that ends in one of {endings}')
    return {name: _to_numpy(array) for name, array in _unwrap(content, where).items()}


def read_safetensors(path: Path, where: str) -> dict[str, np.ndarray]:
    """All tensors of a .safetensors file by name, in the types they have there.

    Args:
      path: of the file.
      where: what an error calls it.

    Raises:
      UserError: it is damaged, or has numbers of a type that NumPy has not.
    """
    # `safetensors.numpy.load_file` knows no bfloat16.
    try:
        with safetensors.safe_open(path, framework='numpy') as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # The last three tell of such a type.
    except (
        safetensors.SafetensorError,
        OSError,
        TypeError,
        AttributeError,
        KeyError,
    ) as error:
        raise UserError(f'{where} is damaged: {error}') from None


def _read_pickled(path: Path, where: str) -> Any:
    """What PyTorch's reader of bare weights finds in a file."""
    try:
        import torch
    except ImportError:
        raise UserError(
            f'{where} is a file that PyTorch reads: pip install torch, or save it as {_SAFETENSORS}'
        ) from None
    if tuple(map(int, torch.__version__.split('.')[:2])) < _SAFE_TORCH:
        raise UserError(
            f'{where} is not read with PyTorch {torch.__version__}, which code in it could fool: '
            "pip install 'torch>=2.6'"
        )
    try:
        # It warns of other versions of pickle, and then fails or does not.
        with warnings.catch_warnings(action='ignore'):
            return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # whatever the parsers of damaged files raise
        if found := re.search(r'GLOBAL (\S+)', str(error)):
            raise UserError(
                f'{where} holds more than weights ({found[1]}), and nothing in a file is ever run: '
                'save network.state_dict() alone'
            ) from None
        raise UserError(
            f'{where} is damaged, or not a file of PyTorch ({type(error).__name__})'
        ) from None


def _unwrap(content: Any, where: str) -> dict[str, Any]:
    """The state dict in what a file holds."""
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    entries = content.items() if isinstance(content, Mapping) else [('all of it', content)]
    strangers = [
        f'{name!r} ({type(value).__name__})'
        for name, value in entries
        if not (isinstance(content, Mapping) and isinstance(name, str) and hasattr(value, 'shape'))
    ]
    if strangers or not entries:
        raise UserError(
            f'{where} holds no state dict, at the top or under '
            f'{" or ".join(map(repr, _WRAPPERS))}: {", ".join(strangers[:3]) or "it is empty"}'
        )
    if all(name.startswith(_PARALLEL_PREFIX) for name, _ in entries):
        return {name.removeprefix(_PARALLEL_PREFIX): value for name, value in entries}
    return dict(entries)


def _to_numpy(array: Any) -> np.ndarray:
    if not isinstance(array, np.ndarray):
        # PyTorch makes no NumPy array of a bfloat16.
        array = array.float() if array.is_floating_point() and array.itemsize < 4 else array
        array = array.detach().numpy()
    return array.astype(np.float32) if array.dtype in (np.float16, jnp.bfloat16) else array
