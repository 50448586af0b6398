"""The interface of a method, and the registry.

A method says which members there are, what their teacher is, which terms the loss has, and which
member is deployed. It is never a trainer: the train step, the loop, evaluation and export are the
same for all. docs/add_a_method.md walks through writing one.
"""

import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
from flax import linen as nn
from flax import struct

from one_jax import losses, models
from one_jax.errors import ConfigError
from one_jax.models.multibranch import Outputs

Terms = dict[str, jax.Array]


@struct.dataclass
class Context:
    """What a loss may look at beside the members' outputs.

    Attributes:
      labels: [B], integers; or target probabilities [B, C], where labels are smoothed or mixed.
      mask: [B], 1 for an example and 0 for padding, or None.
      progress: the completed epochs (a whole number) over all epochs, in [0, 1].
      teacher_logits: of the N frozen teachers on the same images, [N, B, C], or None. They carry no
        gradient.
      params: the parameters, `{'trunk': ..., 'head': ..., 'aggregator': ...}`.
      method_state: what the method keeps from epoch to epoch, or None; see `Method.initial_state`.
    """

    labels: jax.Array
    mask: jax.Array | None = None
    progress: jax.typing.ArrayLike = 1.0
    teacher_logits: jax.Array | None = None
    params: Any = None
    method_state: Any = None


class Method:
    """A distillation method: a subclass sets `name` and `defaults`, and defines `loss`.

    Attributes:
      name: what `config.method.name` says to get it.
      defaults: the fields of `config.method` it reads, with its own default of each. A field is
        there in every config, and setting one that the method does not read is an error.
      default_branches: K, where `config.model.num_branches` does not say.
      min_branches: the fewest branches it makes sense with.
      max_branches: the most, or None.
      default_share_stages: where `config.model.share_stages` does not say.
      whole_networks: whether its members share no stage: `share_stages` must be 0.
      alike_members: whether its members must be copies of one network.
      shares_stem: whether members that share no stage still share the stem.
      min_teachers: the fewest frozen teachers it needs.
      max_teachers: the most, or None.
      settings: the value of every field in `defaults` for this run.
      members: the name of every member's network, K of them.
      num_branches: K.
    """

    name: ClassVar[str]
    defaults: ClassVar[Mapping[str, Any]] = {}
    default_branches: ClassVar[int] = 3
    min_branches: ClassVar[int] = 1
    max_branches: ClassVar[int | None] = None
    default_share_stages: ClassVar[int] = 2
    whole_networks: ClassVar[bool] = False
    alike_members: ClassVar[bool] = False
    shares_stem: ClassVar[bool] = False
    min_teachers: ClassVar[int] = 0
    max_teachers: ClassVar[int | None] = 0

    def __init__(self, config: Any):
        """Reads and checks the fields of `config.method`, and those of `config.model` it decides.

        Raises:
          ConfigError: a field whose value the method cannot work with.
        """
        for field, value in config.method.items():
            if field not in ('name', *self.defaults) and value is not None:
                fields = ', '.join(self.defaults) or 'none'
                allowed = f'None: method.name={self.name!r} reads {fields}'
                raise ConfigError(f'method.{field}', value, allowed)
        self.settings = {}
        for field, default in self.defaults.items():
            value = config.method.get(field)
            self.settings[field] = default if value is None else value
        self.members = self._members(config.model)
        self.share_stages = self._share_stages(config.model)
        self.validate()

    @property
    def num_branches(self) -> int:
        return len(self.members)

    @property
    def teachers(self) -> tuple[str, ...]:
        """The folders of the frozen teachers, exported students."""
        return tuple(filter(None, self.settings.get('teachers', '').split(',')))

    def _members(self, model: Any) -> tuple[str, ...]:
        wanted, unlike = model.num_branches, tuple(filter(None, model.members.split(',')))
        if not unlike:
            wanted = self.default_branches if wanted is None else wanted
            self._check_number('model.num_branches', wanted, self.min_branches, self.max_branches)
            return self.member_networks(model.name, wanted)
        if wanted not in (None, len(unlike)):
            allowed = f'None or {len(unlike)}, the number of model.members={model.members!r}'
            raise ConfigError('model.num_branches', wanted, allowed)
        if self.alike_members and len(set(unlike)) > 1:
            allowed = f'copies of one network for method.name={self.name!r}'
            raise ConfigError('model.members', model.members, allowed)
        self._check_number('model.members', len(unlike), self.min_branches, self.max_branches)
        return unlike

    def _share_stages(self, model: Any) -> int:
        unlike = self.whole_networks or len(set(self.members)) > 1
        share_stages = model.share_stages
        if share_stages is None:
            share_stages = 0 if unlike else self.default_share_stages
        if unlike and share_stages:
            reason = 'members are whole networks' if self.whole_networks else 'members are unlike'
            allowed = f'0 or None: with method.name={self.name!r} the {reason}'
            raise ConfigError('model.share_stages', share_stages, allowed)
        for name in dict.fromkeys(self.members):
            num_stages = models.network(name)(num_classes=2).num_stages
            if not 0 <= share_stages < num_stages:
                raise ConfigError(
                    'model.share_stages',
                    share_stages,
                    f'0 to {num_stages - 1}: {name} has {num_stages} stages, and a branch '
                    'needs one of its own',
                )
        return share_stages

    def _check_number(self, field: str, number: int, least: int, most: int | None) -> None:
        if number < least or (most is not None and number > most):
            allowed = f'exactly {least}' if least == most else f'at least {least}'
            if most is not None and most != least:
                allowed += f' and at most {most}'
            raise ConfigError(field, number, f'{allowed} for method.name={self.name!r}')

    def validate(self) -> None:
        """Raises `ConfigError` for what the method does not allow; a subclass may add checks.

        Those here are of the fields that several methods share.
        """
        self.check_range('temperature', above=0)
        self.check_range('distill_weight')
        self.check_range('rampup_fraction', most=1)
        if 'teachers' in self.defaults:
            least, most = self.min_teachers, self.max_teachers
            if len(self.teachers) < least or (most is not None and len(self.teachers) > most):
                number = least if least == most else f'{least} or more'
                raise ConfigError(
                    'method.teachers',
                    self.settings['teachers'],
                    f'{number} folders of exported students, separated by commas, for '
                    f'method.name={self.name!r}: --config.method.teachers=DIR,DIR',
                )

    def check_range(
        self, field: str, least: float = 0, most: float = math.inf, above: float | None = None
    ) -> None:
        """Raises `ConfigError` if the method has this field and its value is out of the range.

        Args:
          field: of `config.method`.
          least: the smallest value allowed.
          most: the largest.
          above: a bound that is itself not allowed, in place of `least`.
        """
        value = self.settings.get(field)
        if value is None:
            return
        inside = value >= least if above is None else value > above
        if not (inside and value <= most and math.isfinite(value)):
            allowed = f'at least {least}' if above is None else f'above {above}'
            if math.isfinite(most):
                allowed = f'{least} to {most}' if above is None else f'{allowed}, at most {most}'
            raise ConfigError(f'method.{field}', value, allowed)

    def check_choice(self, field: str, choices: tuple[str, ...]) -> None:
        """Raises `ConfigError` if the value of a field is none of `choices`."""
        if self.settings[field] not in choices:
            raise ConfigError(f'method.{field}', self.settings[field], choices)

    def member_networks(self, name: str, num_branches: int) -> tuple[str, ...]:
        """The networks of the members: copies of `config.model.name`, if a method says nothing."""
        return (name,) * num_branches

    @property
    def make_aggregator(self) -> Callable[..., nn.Module] | None:
        """A constructor of the module that makes the teacher, or None.

        It is called with `dtype`, `norm_axis_name` and `name`; the module's call is that of
        `aggregators.Gate`.
        """
        return None

    @property
    def trunk_gradient(self) -> float:
        """The factor of the gradient that the members send into the trunk."""
        return 1.0

    @property
    def augments_members(self) -> bool:
        """Whether every member sees its own random crop of each image (nothing is shared then)."""
        return False

    @property
    def needs_validation(self) -> bool:
        """Whether `refresh` wants held-out images: `config.data.validation_fraction` above 0."""
        return False

    @property
    def deployed(self) -> str:
        """What is taken away in the end: 'branch N' or 'ensemble'."""
        return 'branch 0'

    def loss(self, outputs: Outputs, context: Context) -> tuple[jax.Array, Terms]:
        """The training loss and its terms.

        Args:
          outputs: of the network, logits [K, B, C].
          context: labels, mask, progress, and what some methods need beside them.

        Returns:
          The scalar to minimise, and the terms to record, each a scalar or [K].
        """
        raise TypeError(f'{type(self).__name__} must define its loss')

    def initial_state(self) -> Any:
        """A pytree of arrays that `refresh` makes anew at the start of every epoch, or None."""
        return None

    def held_out_sums(self, logits: jax.Array, labels: jax.Array, mask: jax.Array) -> Any:
        """Sums over a batch of held-out images, of which `refresh` gets the total.

        Args:
          logits: [K, B, C], in evaluation mode.
          labels: [B].
          mask: [B].
        """
        raise TypeError(f'{type(self).__name__} must define its held_out_sums')

    def refresh(self, sums: Any) -> Any:
        """The next epoch's state, from the total of `held_out_sums` over all held-out images."""
        raise TypeError(f'{type(self).__name__} must define its refresh')

    def distill_weight(self, progress: jax.typing.ArrayLike) -> jax.Array:
        """The weight of the distillation term: `distill_weight` times the ramp."""
        ramp = losses.sigmoid_rampup(progress, self.settings['rampup_fraction'])
        return self.settings['distill_weight'] * ramp


_REGISTRY: dict[str, type[Method]] = {}


def register(method: type[Method]) -> type[Method]:
    """Class decorator: makes a method available as `config.method.name=<its name>`."""
    if _REGISTRY.setdefault(method.name, method) is not method:
        raise ValueError(f'two methods are called {method.name!r}')
    return method


def registered() -> dict[str, type[Method]]:
    """Every method by name; the modules of this package register themselves on import."""
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f'{__package__}.{module.name}')
    return dict(sorted(_REGISTRY.items()))


def fields() -> dict[str, type]:
    """The fields of `config.method` that some method reads, and their types.

    Raises:
      ValueError: two methods give one field defaults of different types.
    """
    types: dict[str, type] = {}
    for method in registered().values():
        for field, default in method.defaults.items():
            if types.setdefault(field, type(default)) is not type(default):
                raise ValueError(f'{field!r} is {types[field]} and, in {method.name!r}, another')
    return types


def create(config: Any) -> Method:
    """The method that `config` asks for, with its settings.

    Raises:
      ConfigError: the method is unknown, or a field does not suit it.
    """
    methods = registered()
    if config.method.name not in methods:
        raise ConfigError('method.name', config.method.name, methods)
    return methods[config.method.name](config)
