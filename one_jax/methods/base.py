"""The interface of a method, and the registry.

A method says which members there are, what their teacher is, and which terms the loss has. It is
never a
trainer: the train step, the loop, evaluation and export are the same for all.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
from flax import linen as nn

from one_jax import losses
from one_jax.errors import ConfigError
from one_jax.models.multibranch import Outputs

Terms = dict[str, jax.Array]


class Method:
    """A distillation method: a subclass sets `name` and `defaults`, and defines `loss`.

    Attributes:
      name: what `config.method.name` says to get it.
      defaults: the fields of `config.method` it reads, with its own default of each.
      min_branches: the fewest branches it makes sense with.
      max_branches: the most, or None.
      settings: the value of every field in `defaults` for this run.
      num_branches: K.
    """

    name: ClassVar[str]
    defaults: ClassVar[Mapping[str, Any]] = {}
    min_branches: ClassVar[int] = 1
    max_branches: ClassVar[int | None] = None

    def __init__(self, config: Any):
        """Reads and checks the fields of `config.method`.

        Raises:
          ConfigError: a field whose value the method cannot work with.
        """
        self.num_branches = config.model.num_branches
        self.settings = {}
        for field, default in self.defaults.items():
            value = config.method.get(field)
            self.settings[field] = default if value is None else value
        self.validate()

    def validate(self) -> None:
        """Raises `ConfigError` for what the method does not allow; a subclass may add checks."""
        least, most = self.min_branches, self.max_branches
        if self.num_branches < least or (most is not None and self.num_branches > most):
            allowed = f'exactly {least}' if least == most else f'at least {least}'
            if most is not None and most != least:
                allowed += f' and at most {most}'
            raise ConfigError(
                'model.num_branches', self.num_branches, f'{allowed} for method.name={self.name!r}'
            )
        temperature = self.settings.get('temperature', 1.0)
        if not 0 < temperature < float('inf'):
            raise ConfigError('method.temperature', temperature, 'above 0')
        distill_weight = self.settings.get('distill_weight', 0.0)
        if not 0 <= distill_weight < float('inf'):
            raise ConfigError('method.distill_weight', distill_weight, 'at least 0')
        rampup_fraction = self.settings.get('rampup_fraction', 0.0)
        if not 0 <= rampup_fraction <= 1:
            raise ConfigError('method.rampup_fraction', rampup_fraction, '0 to 1')

    @property
    def make_aggregator(self) -> Callable[..., nn.Module] | None:
        """A constructor of the module that makes the teacher, or None.

        It is called with `dtype`, `norm_axis_name` and `name`; the module's call is that of
        `aggregators.Gate`.
        """
        return None

    @property
    def deployed(self) -> str:
        """What is taken away in the end: 'branch N' or 'ensemble'."""
        return 'branch 0'

    def loss(
        self, outputs: Outputs, labels: jax.Array, mask: jax.Array | None, progress: jax.Array
    ) -> tuple[jax.Array, Terms]:
        """The training loss and its terms.

        Args:
          outputs: of the network, logits [K, B, C].
          labels: [B], integers.
          mask: [B], 1 for an example and 0 for padding, or None.
          progress: the completed epochs (a whole number) over all epochs, in [0, 1].

        Returns:
          The scalar to minimise, and the terms to record, each a scalar or [K].
        """
        raise TypeError(f'{type(self).__name__} must define its loss')

    def distill_weight(self, progress: jax.Array) -> jax.Array:
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


def create(config: Any) -> Method:
    """The method that `config` asks for, with its settings.

    Raises:
      ConfigError: the method is unknown, or a field does not suit it.
    """
    methods = registered()
    if config.method.name not in methods:
        raise ConfigError('method.name', config.method.name, methods)
    return methods[config.method.name](config)
