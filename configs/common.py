"""Options of every recipe: the names after the colon in `configs/svhn_resnet32.py:dml,smoke`."""

from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from one_jax import methods
from one_jax.errors import UserError

Fields = Mapping[str, Any]

# Four steps on generated images, to check that everything runs.
SMOKE = {
    'data.generated_examples': 64,
    'data.batch_size': 16,
    'data.eval_batch_size': 16,
    'optimizer.warmup_epochs': 0.0,
    'train.steps': 4,
    'train.log_every': 2,
}

# What the released code of ONE's authors does and the recipes do not; see cifar100_resnet32.py.
AUTHORS = {
    'optimizer.nesterov': False,
    'data.drop_last': False,
    'method.target_epsilon': 1e-7,
    'method.gate_scale': 'uniform',
}


def apply_options(
    config: config_dict.ConfigDict, options: str | None, smoke: Fields, **variants: Fields
) -> config_dict.ConfigDict:
    """Applies comma-separated options to a recipe and returns it.

    The options of a recipe, applied in this order, whatever the order on the command line:
      - a method, with the changes its paper makes to every recipe;
      - the variants of that method, such as `paper` for mde;
      - the variants of the recipe;
      - `smoke`, a few steps on generated images;
      - `plain`, the baseline: the same recipe for the network alone, with one branch.

    Args:
      config: the recipe.
      options: the option names; '' or None leaves the recipe as it is.
      smoke: the dotted fields that `smoke` sets in addition to `SMOKE`.
      **variants: the dotted fields that each variant of this recipe sets.

    Raises:
      UserError: the recipe has no such option, or two methods are given.
    """
    given = list(filter(None, (options or '').split(',')))
    registered = {name: cls for name, cls in methods.registered().items() if name != 'plain'}
    chosen = [name for name in given if name in registered]
    if len(chosen) > 1:
        raise UserError(f'config options {", ".join(map(repr, chosen))}: give one method only')
    settings = {name: {'method.name': name, **cls.recipe} for name, cls in registered.items()}
    for name in chosen or [config.method.name]:
        settings |= methods.registered()[name].options
    settings |= {**variants, 'smoke': {**SMOKE, **smoke}, 'plain': _plain()}
    for name in given:
        if name not in settings:
            raise UserError(
                f'config option {name!r} is not one of {", ".join(map(repr, settings))}'
            )
    for name, values in settings.items():
        if name in given:
            config.update_from_flattened_dict(values)
    return config


def _plain() -> Fields:
    """Returns the fields of the plain network, which undo what a recipe sets for its branches."""
    undone = [*(f'method.{field}' for field in methods.fields())]
    undone += ['model.num_branches', 'model.share_stages']
    return {**dict.fromkeys(undone), 'model.branch_networks': '', 'method.name': 'plain'}
