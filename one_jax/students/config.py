"""A student's config.json: what it must hold, and the network it describes."""

import dataclasses
import functools
import sys
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from one_jax import methods, models
from one_jax.errors import require, require_kinds
from one_jax.fields import KINDS, Kind, list_of, number, or_none
from one_jax.students.batch_norm_folding import FoldedNetwork

ENSEMBLE, TEACHER = 'ensemble', 'teacher'
BATCH_NORM = ('separate', 'folded')
# The config fields that identify a data set on any machine, and their types.
DATA_FIELDS = {'name': str, 'generated_examples': int, 'image_size': int, 'stream': bool}
# A longer side is a mistake: no memory would hold a batch.
_LARGEST_SIDE = 4096


def check(config: Mapping[str, Any]) -> None:
    """Checks the fields that every student has; `build_network` checks the others.

    Raises `ConfigError` for a value of a wrong type or out of range, `KeyError` for a missing one.
    """
    require_kinds(config, _FIELDS)
    for field in _REQUIRED:
        config[field]
    names, number = config['label_names'], config['num_classes']
    distinct = len(set(names))
    require(len(names) == number, 'num_classes', number, f'label_names has {len(names)} names')
    require(distinct == number, 'label_names', names, f'{number} different names')


def _is_data(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(entry, DATA_FIELDS.get(name, ())) for name, entry in value.items()
    )


_POSITIVE = sys.float_info.min
# Of the numbers that images are normalised with, in float32.
_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_REQUIRED = ('network', 'num_classes', 'input_size', 'mean', 'std', 'label_names')
_FIELDS: Mapping[str, Kind] = {
    'network': ('the name of a network', KINDS[str][1]),
    'num_classes': ('a whole number from 1', number(1, kinds=(int,))),
    'input_size': (
        f'height and width, whole numbers from 1 to {_LARGEST_SIDE:,}',
        list_of(number(1, _LARGEST_SIDE, (int,)), 2),
    ),
    'crop': ('a number above 0, at most 1', number(_POSITIVE, 1)),
    'mean': ('three numbers', list_of(number(-_LARGEST, _LARGEST), 3)),
    'std': ('three numbers above 0, in float32', list_of(number(_SMALLEST, _LARGEST), 3)),
    'data': (f'the fields {", ".join(DATA_FIELDS)} of a data set', _is_data),
    'label_names': ('a list of names', list_of(KINDS[str][1])),
    'ensemble': KINDS[dict],
    'metric': or_none(KINDS[dict]),
    'method': or_none(KINDS[str]),
    'seed': or_none(KINDS[int]),
    'weights_sha256': KINDS[str],
}


def network_fields(method: methods.Method, branch: int | str, num_classes: int) -> dict[str, Any]:
    """Returns the fields of config.json that describe a branch, the ensemble or the teacher."""
    if isinstance(branch, int):
        return {'network': method.branch_networks[branch], 'num_classes': num_classes}
    # The keys, 'members' among them, are a file format.
    ensemble = {
        'members': list(method.branch_networks),
        'share_stages': method.share_stages,
        'share_stem': method.shares_stem,
    }
    if branch == TEACHER:
        ensemble['aggregator'] = {'method': method.name, 'settings': method.settings}
    return network_fields(method, 0, num_classes) | {'ensemble': ensemble}


def data_fields(data_config: Any, description: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of config.json about images and classes; see `Source.description`."""
    return {
        'label_names': list(description['label_names']),
        'input_size': list(description['image_shape'][:2]),
        'channels': 'RGB',
        # Older runs did not record it: they show the whole image.
        'crop': description.get('crop', 1.0),
        'mean': list(description['mean']),
        'std': list(description['std']),
        'data': {field: data_config[field] for field in DATA_FIELDS},
    }


def build_network(config: Mapping[str, Any], dtype: Any = jnp.float32) -> nn.Module | FoldedNetwork:
    """Builds the network that a student's config.json describes, to compute in `dtype`.

    Raises `ConfigError` for a value that is not allowed, `KeyError` for a missing field.
    """
    batch_norm = config.get('batch_norm', BATCH_NORM[0])
    require(batch_norm in BATCH_NORM, 'batch_norm', batch_norm, BATCH_NORM)
    if 'ensemble' in config:
        network = _build_ensemble(config['ensemble'], config['num_classes'], dtype)
    else:
        network = models.make_backbone(config['network'], config['num_classes'], dtype)()
    return FoldedNetwork(network) if batch_norm == 'folded' else network


def _build_ensemble(ensemble: Mapping[str, Any], num_classes: int, dtype: Any) -> nn.Module:
    networks, make_aggregator = ensemble['members'], None
    if 'aggregator' in ensemble:
        method = methods.registered()[ensemble['aggregator']['method']]
        # A student of an earlier version may have settings that the method no longer has.
        known = {field.name for field in dataclasses.fields(method)}
        settings = {k: v for k, v in ensemble['aggregator']['settings'].items() if k in known}
        trained_by = method(
            branch_networks=tuple(networks), share_stages=ensemble['share_stages'], **settings
        )
        make_aggregator = functools.partial(trained_by.make_aggregator, dtype=jnp.dtype(dtype))
    # One backbone makes all of several identical branches.
    names = networks[:1] if len(set(networks)) == 1 else networks
    return models.MultiBranch(
        make_backbones=tuple(models.make_backbone(name, num_classes, dtype) for name in names),
        num_branches=len(networks),
        share_stages=ensemble['share_stages'],
        share_stem=ensemble['share_stem'],
        make_aggregator=make_aggregator,
    )
