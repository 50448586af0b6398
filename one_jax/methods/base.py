"""The interface of a distillation method, and the registry.

A method chooses the branches, their teacher, the terms of the loss and the branch to deploy. The
train step, the loop, evaluation and export are the same for all methods. docs/add_a_method.md shows
how to write one.
"""

import dataclasses
import importlib
import pkgutil
import typing
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from one_jax import losses, models
from one_jax.errors import ConfigError, require, require_number
from one_jax.models.multibranch import Outputs

Terms = dict[str, jax.Array]

# Ranges of the numbers in `config.method` by the ends of their names, as in `Method`. Above a
# temperature of 1000, T^2 times the rounding of float32 is more than a divergence.
_RANGES = {
    'temperature': (0.01, 1000),
    '_weight': (0, 10**6),
    '_fraction': (0, 1, True),
    '': (-(10**6), 10**6),
}


@struct.dataclass
class Context:
    """What a loss may use besides the network's outputs.

    Attributes:
      labels: [B] integers, or [B, C] target probabilities (smoothed or mixed labels).
      mask: [B], 1 for an example and 0 for padding, or None.
      progress: completed epochs (a whole number) over all epochs, in [0, 1].
      teacher_logits: [N, B, C] from the N frozen teachers on the same images, without gradient, or
        None.
      params: the parameters, `{'trunk': ..., 'head': ..., 'aggregator': ...}`.
      method_state: see `Method.initial_state`, or None.
    """

    labels: jax.Array
    mask: jax.Array | None = None
    progress: jax.typing.ArrayLike = 1.0
    teacher_logits: jax.Array | None = None
    params: Any = None
    method_state: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A distillation method with its settings.

    A subclass is decorated with `@register(name)`, which makes it a dataclass. Its own annotated
    fields, with defaults, are its fields in `config.method`: bool, float, int, str or a `Literal`
    of strings. Names imply ranges: 'temperature' is at least 0.01, '*_weight' at least 0,
    '*_fraction' between 0 and 1.
    """

    # The network's name for each of the K branches, and the number of stages in the trunk.
    branch_networks: tuple[str, ...]
    share_stages: int

    # The value of `config.method.name`.
    name: ClassVar[str]
    # K where `config.model.num_branches` is None, and its range.
    default_branches: ClassVar[int] = 3
    min_branches: ClassVar[int] = 1
    max_branches: ClassVar[int] = 64
    # Used where `config.model.share_stages` is None.
    default_share_stages: ClassVar[int] = 2
    # Whether branches are whole networks; whether these still share the stem.
    share_nothing: ClassVar[bool] = False
    shares_stem: ClassVar[bool] = False
    # Whether all branches must be copies of one network.
    identical_branches: ClassVar[bool] = False
    # The number of frozen teachers, for a method with the field `teachers`.
    min_teachers: ClassVar[int] = 0
    max_teachers: ClassVar[int] = 64
    # Values of dotted config fields that the paper changes in every recipe, and config options of
    # the method, each with such values.
    recipe: ClassVar[Mapping[str, Any]] = {}
    options: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @property
    def num_branches(self) -> int:
        return len(self.branch_networks)

    @property
    def settings(self) -> dict[str, Any]:
        """The value of each field that the method reads from `config.method`."""
        return {field: getattr(self, field) for field in defaults(type(self))}

    @property
    def teacher_folders(self) -> tuple[str, ...]:
        """The folders of the frozen teachers: exported students."""
        return _split(self.settings.get('teachers', ''))

    @classmethod
    def default_branch_networks(cls, name: str, num_branches: int) -> tuple[str, ...]:
        """The branches' networks where the config lists none: copies of `config.model.name`."""
        return (name,) * num_branches

    @property
    def make_aggregator(self) -> Callable[..., nn.Module] | None:
        """A constructor of the module that computes the teacher, or None; see `Gate`."""
        return None

    @property
    def trunk_gradient(self) -> float:
        """A factor on the gradient from the branches into the trunk."""
        return 1.0

    @property
    def augments_branches(self) -> bool:
        """Whether each branch sees its own random crops; this requires `share_stages=0`."""
        return False

    @property
    def uses_validation(self) -> bool:
        """Whether `state_from_validation` is called before every epoch."""
        return False

    @property
    def deployed(self) -> str:
        """What is exported by default: 'branch N' or 'ensemble'."""
        return 'branch 0'

    def targets(self, outputs: Outputs, context: Context) -> jax.Array | None:
        """Computes the branches' targets in the default `loss`, which stops no gradient.

        Returns:
          Logits [K, B, C], or [1, B, C] for one target; None to learn from the labels alone.
        """
        return None

    def divergence(self, targets: jax.Array, logits: jax.Array, context: Context) -> jax.Array:
        """Computes KL_T(target || branch) in the default `loss`, [K, B] for logits [K, B, C]."""
        targets = jnp.broadcast_to(targets, logits.shape)
        return losses.kl_divergence(targets, logits, self.temperature)

    def loss(self, outputs: Outputs, context: Context) -> tuple[jax.Array, Terms]:
        """Computes the training loss. The default is

            sum over branches of CE(branch) + w KL_T(target || branch)

        with `targets`, `divergence`, and T and w from the fields `temperature`, `distill_weight`
        and `rampup_fraction`.

        Returns:
          The scalar to minimise, and the terms to record, each a scalar or [K].
        """
        return self.distillation_loss(outputs, context, self.targets(outputs, context))

    def distillation_loss(
        self, outputs: Outputs, context: Context, targets: jax.Array | None
    ) -> tuple[jax.Array, Terms]:
        """Computes the default `loss` for given `targets`."""
        cross_entropy = losses.cross_entropy(outputs.logits, context.labels)
        cross_entropy = losses.batch_mean(cross_entropy, context.mask)
        if targets is None:
            return cross_entropy.sum(), {'branch_cross_entropy': cross_entropy}
        divergence = self.divergence(targets, outputs.logits, context)
        distillation = losses.batch_mean(divergence, context.mask)
        weight = self.ramped_weight(context.progress)
        loss = cross_entropy.sum() + weight * distillation.sum()
        return loss, {
            'branch_cross_entropy': cross_entropy,
            'distillation': distillation,
            'distill_weight': weight,
        }

    def ramped_weight(self, progress: jax.typing.ArrayLike) -> jax.Array:
        """Computes `distill_weight` times the ramp."""
        return self.distill_weight * losses.sigmoid_rampup(progress, self.rampup_fraction)

    def initial_state(self) -> Any:
        """Returns the state that `state_from_validation` replaces, a pytree of arrays, or None."""
        return None

    def validation_statistics(self, logits: jax.Array, labels: jax.Array, mask: jax.Array) -> Any:
        """Computes sums over a batch of held-out images, from logits [K, B, C] in evaluation mode,
        labels [B] and mask [B].
        """
        raise NotImplementedError

    def state_from_validation(self, statistics: Any) -> Any:
        """Computes the next epoch's state from the total of all `validation_statistics`."""
        raise NotImplementedError

    def validate(self) -> None:
        """Checks the settings; a subclass may add checks with `errors.require`.

        Raises:
          ConfigError: a value that is not allowed.
        """
        types = typing.get_type_hints(type(self))
        for field, value in self.settings.items():
            if typing.get_origin(types[field]) is typing.Literal:
                choices = typing.get_args(types[field])
                require(value in choices, f'method.{field}', value, choices)
            elif types[field] in (int, float):
                require_number(f'method.{field}', value, *number_range(field))
        if 'teachers' in self.settings:
            least, most = self.min_teachers, self.max_teachers
            number = least if least == most else f'{least} to {most}'
            require(
                least <= len(self.teacher_folders) <= most,
                'method.teachers',
                self.settings['teachers'],
                f'{number} folders of exported students, separated by commas, for '
                f'method.name={self.name!r}: --config.method.teachers=DIR,DIR',
            )


def number_range(field: str) -> tuple:
    """Returns the last arguments of `errors.require_number` for a method's field."""
    return next(values for ending, values in _RANGES.items() if field.endswith(ending))


_REGISTRY: dict[str, type[Method]] = {}


@typing.dataclass_transform(kw_only_default=True, frozen_default=True)
def register(name: str) -> Callable[[type[Method]], type[Method]]:
    """Class decorator: makes a frozen dataclass, available as `config.method.name=<name>`."""

    def decorate(method: type[Method]) -> type[Method]:
        method = dataclasses.dataclass(frozen=True, kw_only=True)(method)
        method.name = name
        if _REGISTRY.setdefault(name, method) is not method:
            raise ValueError(f'two methods have the name {name!r}')
        return method

    return decorate


def registered() -> dict[str, type[Method]]:
    """Returns every method by name; importing a module of this package registers its methods."""
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f'{__package__}.{module.name}')
    return dict(sorted(_REGISTRY.items()))


def defaults(method: type[Method]) -> dict[str, Any]:
    """Returns the default of each field that `method` reads from `config.method`."""
    structure = {field.name for field in dataclasses.fields(Method)}
    own = [field for field in dataclasses.fields(method) if field.name not in structure]
    return {field.name: field.default for field in own}


def fields() -> dict[str, type]:
    """Returns the type of every field of `config.method` that some method reads."""
    return {
        field: type(default)
        for method in registered().values()
        for field, default in defaults(method).items()
    }


def create(config: Any) -> Method:
    """Creates the method that `config.method` and `config.model` describe.

    Raises:
      ConfigError: the method is unknown, or a field's value is not allowed.
    """
    methods = registered()
    require(config.method.name in methods, 'method.name', config.method.name, methods)
    kind = methods[config.method.name]
    given = {k: v for k, v in config.method.items() if k != 'name' and v is not None}
    for field, value in given.items():
        reads = ', '.join(defaults(kind)) or 'none'
        allowed = f'None: method.name={kind.name!r} reads {reads}'
        require(field in defaults(kind), f'method.{field}', value, allowed)
    networks = _branch_networks(kind, config.model)
    share_stages = _share_stages(kind, networks, config.model.share_stages)
    method = kind(branch_networks=networks, share_stages=share_stages, **given)
    method.validate()
    return method


def _branch_networks(kind: type[Method], model: Any) -> tuple[str, ...]:
    networks, number = _split(model.branch_networks), model.num_branches
    if networks:
        field, value = 'model.branch_networks', model.branch_networks
        for name in networks:
            try:
                models.network(name)
            except ConfigError as error:
                raise ConfigError(field, error.value, error.allowed) from None
        allowed = f'None or {len(networks)}, the number of {field}={value!r}'
        require(number in (None, len(networks)), 'model.num_branches', number, allowed)
        identical = len(set(networks)) == 1 or not kind.identical_branches
        require(identical, field, value, f'copies of one network for method.name={kind.name!r}')
        number = len(networks)
    else:
        number = kind.default_branches if number is None else number
        field, value = 'model.num_branches', number
    least, most = kind.min_branches, kind.max_branches
    allowed = f'exactly {least}' if least == most else f'at least {least} and at most {most}'
    require(least <= number <= most, field, value, f'{allowed} for method.name={kind.name!r}')
    return networks or kind.default_branch_networks(model.name, number)


def _share_stages(kind: type[Method], networks: tuple[str, ...], share_stages: int | None) -> int:
    field = 'model.share_stages'
    whole = kind.share_nothing or len(set(networks)) > 1
    if share_stages is None:
        share_stages = 0 if whole else kind.default_share_stages
    reason = 'branches are whole networks' if kind.share_nothing else 'branches are heterogeneous'
    allowed = f'0 or None: with method.name={kind.name!r} the {reason}'
    require(not (whole and share_stages), field, share_stages, allowed)
    for name in dict.fromkeys(networks):
        stages = models.network(name)(num_classes=2).num_stages
        allowed = f'0 to {stages - 1}: {name} has {stages} stages, and a branch needs at least one'
        require(0 <= share_stages < stages, field, share_stages, allowed)
    return share_stages


def _split(names: str) -> tuple[str, ...]:
    return tuple(filter(None, map(str.strip, names.split(','))))
