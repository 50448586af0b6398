"""Dotted names of config fields, and which fields do not change what a run computes."""

from collections.abc import Mapping
from typing import Any

# Fields about where things are on one machine, and how it reads them.
LOCAL_FIELDS = (
    'data.data_dir',
    'data.root',
    'data.decode_threads',
    'data.prefetch',
    'method.teachers',
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
    """Returns a nested mapping as dotted names and values; tuples become lists, as in JSON."""
    flat = {}
    for name, value in config.items():
        if hasattr(value, 'items'):
            flat |= flatten(value, f'{prefix}{name}.')
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat
