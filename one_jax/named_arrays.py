"""A pytree as arrays by name, for files that know nothing of its classes."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

PyTree = Any


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves by their path, such as `opt_state/0/trace/Dense_0/kernel`, in the tree's order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError('two leaves of the state have the same path')
    return named


def nest(named: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts of leaves named by path; `named_leaves` of them gives the names back."""
    tree: dict[str, Any] = {}
    for name, leaf in named.items():
        *parents, last = name.split('/')
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def form(leaf: Any) -> list[Any]:
    """[shape, dtype] in the form in which JSON gives them back."""
    if not hasattr(leaf, 'dtype'):
        leaf = np.asarray(leaf)
    return [list(leaf.shape), str(leaf.dtype)]


def in_words(described: list[Any] | None) -> str:
    """What `form` gives, as `float32[3, 3]`; None as `absent`."""
    return 'absent' if described is None else f'{described[1]}{described[0]}'


def place(values: np.ndarray, like: Any) -> jax.Array | np.ndarray:
    """Puts values where `like` is: on its devices, on none in particular, or on the host."""
    if isinstance(like, jax.Array) and not like.committed:
        # Committed to one device, it could not enter a step over several.
        return jax.device_put(values)
    sharding = getattr(like, 'sharding', None)
    if sharding is None:
        return values
    return jax.make_array_from_callback(
        values.shape, sharding, lambda index: np.asarray(values[index])
    )
