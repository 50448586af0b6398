"""Dotted names of config fields, which of them change no result, and kinds of values in JSON."""

from collections.abc import Callable, Mapping
from typing import Any

# Fields about where things are on one machine, and how it reads them. The content of data and
# students is compared instead.
LOCAL_FIELDS = (
    'data.data_dir',
    'data.root',
    'data.decode_threads',
    'data.prefetch',
    'method.teachers',
    'model.init_from',
    'train.compilation_cache_dir',
)
# Fields that do not change what is computed: they may differ when a run resumes.
MACHINE_FIELDS = (
    *LOCAL_FIELDS,
    'data.placement',
    'model.branch_conv',
    'model.remat',
    'profile_steps',
    'train.steps_per_call',
)
# Where compiled programs are cached; a command that cannot write it goes without.
DEFAULT_CACHE = '~/.cache/one_jax'
# Fields of earlier versions by their new names; stored configs are read under the new ones.
RENAMED = {
    'model.keep_activations': 'model.remat',
    'model.members': 'model.branch_networks',
}
# Fields of earlier versions that are gone, and what to do instead.
REMOVED = {'seeds': 'each run has one `seed`; run several as `make demo-seeds` does'}


def get_field(config: Any, field: str) -> Any:
    """Returns the value of a dotted field of a nested config or dictionary."""
    for part in field.split('.'):
        config = config[part]
    return config


def flatten(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """Returns a nested mapping as dotted names and values; tuples become lists, as in JSON.

    An empty mapping is a value.
    """
    flat = {}
    for name, value in config.items():
        if hasattr(value, 'items') and value:
            flat |= flatten(value, f'{prefix}{name}.')
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


# What a value in a file may be: in words, and the test.
Kind = tuple[str, Callable[[Any], bool]]


def number(low: float = -1e40, high: float = 1e40, kinds: tuple[type, ...] = (int, float)) -> Any:
    """Returns a test for numbers from `low` to `high`; by default whatever float32 can hold."""
    return lambda value: type(value) in kinds and low <= value <= high


def list_of(suits: Callable[[Any], bool], length: int | None = None) -> Callable[[Any], bool]:
    """Returns a test for lists of `length` (None: any) whose entries all pass the test `suits`."""
    return lambda value: (
        isinstance(value, list) and length in (None, len(value)) and all(map(suits, value))
    )


def or_none(kind: Kind) -> Kind:
    """Returns `kind` with null as one more value."""
    return f'{kind[0]}, or null', lambda value: value is None or kind[1](value)


KINDS: Mapping[type, Kind] = {
    bool: ('true or false', lambda value: isinstance(value, bool)),
    int: ('a whole number', number(kinds=(int,))),
    float: ('a number', number()),
    str: ('text', lambda value: isinstance(value, str)),
    tuple: ('a list of numbers', list_of(number())),
    dict: ('an object with fields', lambda value: isinstance(value, dict)),
}
