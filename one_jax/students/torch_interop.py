"""Variables under PyTorch's names and in PyTorch's layout, and back."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

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
_AGGREGATOR = 'aggregator'
# Linear layers that are 1x1 convolutions in timm: [out, in, 1, 1]. Ours were [out, in] once.
_POINTWISE = re.compile(r'\.se\.fc[12]\.weight$')
# Names, spelt so, in the code of ONE's authors.
_ONE_NAMES = {'fc': 'classfier3', 'linear': 'control_v1', 'bn': 'bn_v1'}

Variables = Mapping[str, Any]
StateDict = Mapping[str, np.ndarray]
# Maps 'trunk', 'branches.i' or 'aggregator', and a name in that part, to a name in the state dict.
Rename = Callable[[str, str], str]


def to_state_dict(variables: Variables, num_branches: int = 1) -> dict[str, np.ndarray]:
    """Converts a student's variables to a PyTorch state dict of NumPy arrays.

    A trunk has the names of the plain network, head i the same names behind 'branches.i.', and an
    aggregator its own behind 'aggregator.'.
    """
    return _write(variables, num_branches, _student_name)


def from_state_dict(
    state_dict: StateDict, template: Variables, num_branches: int = 1
) -> dict[str, Any]:
    """Inverts `to_state_dict`, ignoring `num_batches_tracked`.

    Returns arrays in the structure and dtypes of `template`, which may hold `ShapeDtypeStruct`s.
    Raises `UserError` with all names that are missing or unknown, and all shapes that differ.
    """
    return _read(state_dict, template, num_branches, _student_name)


def to_one_checkpoint(variables: Variables, num_branches: int) -> dict[str, np.ndarray]:
    """Converts ONE's network in training to a state dict of its authors' code (`one_resnet`).

    The network is a `MultiBranch` of CIFAR ResNets above two shared stages, with the gate. Its
    trunk has the names of the plain network; stage 3 and the classifier of each branch are
    `layer3_1`, `classfier3_1`, and so on; the gate is `control_v1` and `bn_v1`.
    """
    return _write(variables, num_branches, _one_name)


def from_one_checkpoint(
    state_dict: StateDict, template: Variables, num_branches: int
) -> dict[str, Any]:
    """Inverts `to_one_checkpoint`; see `from_state_dict`."""
    return _read(state_dict, template, num_branches, _one_name)


def _student_name(part: str, name: str) -> str:
    return name if part == 'trunk' else f'{part}.{name}'


def _one_name(part: str, name: str) -> str:
    if part == 'trunk':
        return name
    module, rest = name.split('.', 1)
    module = _ONE_NAMES.get(module, module)
    if part != _AGGREGATOR:
        module += f'_{int(part.removeprefix("branches.")) + 1}'
    return f'{module}.{rest}'


def _split(variables: Variables, num_branches: int) -> dict[str, Any]:
    """Splits variables into 'trunk', 'branches.i' and 'aggregator'; a plain network is a trunk."""
    if num_branches == 1:
        return {'trunk': variables}
    parts = multibranch.split_ensemble(variables, num_branches)
    return {**parts, _AGGREGATOR: multibranch.aggregator_variables(variables)}


def _write(variables: Variables, num_branches: int, rename: Rename) -> dict[str, np.ndarray]:
    arrays = {
        name: np.ascontiguousarray(np.transpose(np.asarray(leaf), _axes(leaf)))
        for name, leaf in _named_leaves(_split(variables, num_branches), rename).items()
    }
    return {
        name: array[..., None, None] if _POINTWISE.search(name) else array
        for name, array in arrays.items()
    }


def _read(state_dict: StateDict, template: Variables, num_branches: int, rename: Rename) -> Any:
    templates = jax.eval_shape(lambda variables: _split(variables, num_branches), dict(template))
    state_dict = {
        name: array[..., 0, 0] if _POINTWISE.search(name) and array.shape[2:] == (1, 1) else array
        for name, array in state_dict.items()
    }
    _check_fit(state_dict, templates, rename)

    def read(part: str) -> Any:
        def take(path, leaf):
            array = state_dict[rename(part, _torch_name(path))]
            return np.transpose(array, np.argsort(_axes(leaf))).astype(leaf.dtype)

        return jax.tree_util.tree_map_with_path(take, templates[part])

    if num_branches == 1:
        return read('trunk')
    # By number: `eval_shape` has sorted the names, 'branches.10' before 'branches.2'.
    parts = ('trunk', *(f'branches.{branch}' for branch in range(num_branches)))
    identical = 'head' in template['params']
    variables = multibranch.join_ensemble({part: read(part) for part in parts}, identical)
    for collection, tree in read(_AGGREGATOR).items():
        variables.setdefault(collection, {})[_AGGREGATOR] = tree
    return variables


def _check_fit(state_dict: StateDict, templates: Mapping[str, Variables], rename: Rename) -> None:
    given = {name: x.shape for name, x in state_dict.items() if not name.endswith(_COUNTER)}
    expected = {
        name: tuple(leaf.shape[axis] for axis in _axes(leaf))
        for name, leaf in _named_leaves(templates, rename).items()
    }
    problems = [f'missing {name}' for name in sorted(expected.keys() - given.keys())]
    problems += [f'unknown {name}' for name in sorted(given.keys() - expected.keys())]
    problems += [
        f'{name} has shape {given[name]} and not {expected[name]}'
        for name in sorted(expected.keys() & given.keys())
        if given[name] != expected[name]
    ]
    if problems:
        raise UserError(f'the weights do not fit the network: {"; ".join(problems)}')


def _named_leaves(parts: Mapping[str, Variables], rename: Rename) -> dict[str, Any]:
    return {
        rename(part, _torch_name(path)): leaf
        for part, tree in parts.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _torch_name(path: tuple[Any, ...]) -> str:
    """Maps params/layer1_0/conv1/kernel to 'layer1.0.conv1.weight'."""
    collection, *modules, leaf = (key.key for key in path)
    dotted = [re.sub(r'_(\d+)', r'.\1', module) for module in modules]
    return '.'.join([*dotted, _LEAVES[collection, leaf]])


def _axes(array: Any) -> tuple[int, ...]:
    return _TO_TORCH.get(len(array.shape), tuple(range(len(array.shape))))
