"""What a training run carries from step to step."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct


@struct.dataclass
class TrainState:
    """The state of a run; with the data set and the config, all that the next step depends on.

    Attributes:
      step: steps done, int32 scalar.
      params: parameters, `{'trunk': ..., 'head': ..., 'aggregator': ...}`.
      batch_stats: running statistics of batch normalisation, the same way.
      opt_state: the optimiser's.
      rng: raw PRNG key, uint32 [2]; every step folds its number into it, so it never changes.
      averages: exponential moving averages of parameters and statistics, or None.
      method: what the method keeps from epoch to epoch, or None.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    rng: jax.Array
    averages: Any = None
    method: Any = None

    @property
    def variables(self) -> dict[str, Any]:
        """What `network.apply` takes."""
        return {'params': self.params, 'batch_stats': self.batch_stats}

    @property
    def evaluated_variables(self) -> dict[str, Any]:
        """What is evaluated and exported: the averages, where they are kept."""
        return self.variables if self.averages is None else self.averages

    def with_fresh_averages(self) -> 'TrainState':
        """This state with its averages started at the variables, if there are any."""
        if self.averages is None:
            return self
        # A copy, because the step gives both sets of buffers away.
        return self.replace(averages=jax.tree.map(jnp.copy, self.variables))

    def with_averages(self, decay: float) -> 'TrainState':
        """This state with its averages moved on, if there are any.

        The decay starts low, min(decay, (1 + step) / (10 + step)), so that the averages soon forget
        the initial values.

        Args:
          decay: in [0, 1).
        """
        if self.averages is None:
            return self
        decay = jnp.minimum(decay, (1 + self.step) / (10 + self.step))
        averages = optax.incremental_update(self.variables, self.averages, 1 - decay)
        return self.replace(averages=averages)


def evaluated_variables(state: Mapping[str, Any]) -> dict[str, Any]:
    """`TrainState.evaluated_variables` of a state that was read as nested dictionaries."""
    if 'averages' in state:
        return state['averages']
    return {name: state[name] for name in ('params', 'batch_stats')}


def init_state(
    network: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
    seed: jax.typing.ArrayLike,
    with_averages: bool = False,
    method_state: Any = None,
) -> TrainState:
    """A fresh state, the same for the same seed on any number of devices.

    Args:
      network: called as `network(images, train)`.
      optimizer: initialised on the parameters.
      image_shape: (H, W, 3).
      seed: below 2**32; an array is uint32.
      with_averages: whether to keep exponential moving averages.
      method_state: the method's own part.
    """
    init_key, rng = jax.random.split(jax.random.PRNGKey(seed))
    variables = network.init(init_key, jnp.zeros((1, *image_shape), jnp.float32), train=False)
    # Flax begins float64 statistics in float32; after one step they would be of another type.
    dtype = jnp.result_type(*jax.tree.leaves(variables['params']))
    batch_stats = jax.tree.map(lambda x: x.astype(dtype), variables['batch_stats'])
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables['params'],
        batch_stats=batch_stats,
        opt_state=optimizer.init(variables['params']),
        rng=rng,
        method=method_state,
    )
    return state.replace(averages=()).with_fresh_averages() if with_averages else state
