"""Our variables under PyTorch's names and in PyTorch's layout, and back."""

import re
from collections.abc import Mapping
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
    wanted = dict(_named_leaves(template))
    given = {k: v for k, v in state_dict.items() if not k.endswith('.num_batches_tracked')}
    problems = [f'missing {name}' for name in sorted(wanted.keys() - given.keys())]
    problems += [f'unknown {name}' for name in sorted(given.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & given.keys()):
        shape = tuple(wanted[name].shape[axis] for axis in _axes(wanted[name]))
        if tuple(given[name].shape) != shape:
            problems.append(f'{name} has shape {tuple(given[name].shape)} and not {shape}')
    if problems:
        raise UserError(f'the weights do not fit the network: {"; ".join(problems)}')

    def take(path, leaf):
        array = given[torch_name(tuple(key.key for key in path))]
        return np.transpose(array, np.argsort(_axes(leaf))).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(take, dict(template))


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
