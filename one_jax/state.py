"""What a training run carries from step to step."""

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
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    rng: jax.Array

    @property
    def variables(self) -> dict[str, Any]:
        """What `network.apply` takes."""
        return {'params': self.params, 'batch_stats': self.batch_stats}


def init_state(
    network: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
    seed: int,
) -> TrainState:
    """A fresh state, the same for the same seed on any number of devices.

    Args:
      network: called as `network(images, train)`.
      optimizer: initialised on the parameters.
      image_shape: (H, W, 3).
      seed: below 2**32.
    """
    init_key, rng = jax.random.split(jax.random.PRNGKey(seed))
    variables = network.init(init_key, jnp.zeros((1, *image_shape), jnp.float32), train=False)
    params = variables['params']
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get('batch_stats', {}),
        opt_state=optimizer.init(params),
        rng=rng,
    )
