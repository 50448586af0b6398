"""What a student's config.json must say for the rest to rely on it."""

import math
from collections.abc import Mapping
from typing import Any

from one_jax.errors import ConfigError, UserError

# Sides of an image; more is a mistake, and no memory would hold a batch.
_LARGEST_SIDE = 16384


def check(config: Any) -> None:
    """Checks the types and ranges of the fields that are there; `make_network` reads the others.

    Raises:
      UserError: it is no mapping, or a value is not allowed.
    """
    if not isinstance(config, Mapping):
        raise UserError(f'it holds a {type(config).__name__} in place of fields')
    for field, (allowed, suits) in _FIELDS.items():
        if field in config and not suits(config[field]):
            raise ConfigError(field, config[field], allowed)
    names, num_classes = config.get('label_names'), config.get('num_classes')
    if names is not None and num_classes is not None and len(names) != num_classes:
        raise UserError(f'label_names has {len(names)} names for num_classes={num_classes}')


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _is_size(value: Any) -> bool:
    sides = isinstance(value, list) and len(value) == 2
    return sides and all(_is_whole(side) and 1 <= side <= _LARGEST_SIDE for side in value)


def _is_of_channels(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))


def _is_data(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(entry, _DATA_TYPES.get(name, ())) for name, entry in value.items()
    )


# See `deployment.DATA_FIELDS`.
_DATA_TYPES = {'name': str, 'generated_examples': int, 'image_size': int, 'stream': bool}
_FIELDS = {
    'network': ('the name of a network', lambda value: isinstance(value, str)),
    'num_classes': ('a whole number from 1', lambda value: _is_whole(value) and value >= 1),
    'input_size': (f'height and width, whole numbers from 1 to {_LARGEST_SIDE:,}', _is_size),
    'crop': ('a number above 0, at most 1', lambda value: _is_number(value) and 0 < value <= 1),
    'mean': ('three numbers', _is_of_channels),
    'std': (
        'three numbers above 0',
        lambda value: _is_of_channels(value) and all(number > 0 for number in value),
    ),
    'data': (f'the fields {", ".join(_DATA_TYPES)} of a data set', _is_data),
    'label_names': (
        'a list of names',
        lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    ),
}
