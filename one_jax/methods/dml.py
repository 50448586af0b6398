"""DML, deep mutual learning (Zhang, Xiang, Hospedales, Lu, CVPR 2018)."""

import jax
import jax.numpy as jnp
from jax import lax

from one_jax import losses
from one_jax.methods.base import Context, Method, register
from one_jax.models.multibranch import Outputs


@register('dml')
class Dml(Method):
    """Whole networks that learn from the labels and from each other's predictions.

    With z_i the logits of network i of K (equations 5 and 7):

        sum over i of CE(z_i) + mean over j != i of KL(z_j || z_i)

    Targets are constants. The paper updates its networks in turn, each with new predictions; here
    one forward pass updates all of them.
    """

    temperature: float = 1.0
    distill_weight: float = 1.0
    # The paper has no ramp.
    rampup_fraction: float = 0.0

    default_branches = 2
    min_branches = 2
    share_nothing = True

    def targets(self, outputs: Outputs, context: Context) -> jax.Array:
        return lax.stop_gradient(outputs.logits)

    def divergence(self, targets: jax.Array, logits: jax.Array, context: Context) -> jax.Array:
        """Averages each network's divergence from all others, [K, B]."""
        pairs = len(logits), *logits.shape
        divergence = losses.kl_divergence(
            jnp.broadcast_to(targets[:, None], pairs),
            jnp.broadcast_to(logits[None], pairs),
            self.temperature,
        )
        # The sum includes each network's divergence from itself, which is 0.
        return divergence.sum(axis=0) / (len(logits) - 1)
