"""DML, deep mutual learning (Zhang, Xiang, Hospedales, Lu, CVPR 2018)."""

import jax
import jax.numpy as jnp
from jax import lax

from one_jax import losses
from one_jax.methods.base import Context, Method, Terms, register
from one_jax.models.multibranch import Outputs


@register
class Dml(Method):
    """Whole networks that each learn from the labels and from the predictions of all others.

    With z_i the logits of member i of K (equations 5 and 7):

        sum over i of CE(z_i) + mean over j != i of KL(z_j || z_i)

    The members' targets are constants. The paper updates its networks in turn, each on predictions
    made anew; here all are updated at once from one forward pass.
    """

    name = 'dml'
    defaults = {  # noqa: RUF012
        'temperature': 1.0,
        'distill_weight': 1.0,
        # The paper has no ramp.
        'rampup_fraction': 0.0,
    }
    default_branches = 2
    min_branches = 2
    whole_networks = True

    def loss(self, outputs: Outputs, context: Context) -> tuple[jax.Array, Terms]:
        weight = self.distill_weight(context.progress)
        divergence = self._mutual_divergence(jnp.asarray(outputs.logits))
        branch = losses.cross_entropy(outputs.logits, context.labels)
        terms = {
            'branch_cross_entropy': losses.batch_mean(branch, context.mask),
            'distillation': losses.batch_mean(divergence, context.mask),
        }
        loss = terms['branch_cross_entropy'].sum() + weight * terms['distillation'].sum()
        return loss, {**terms, 'distill_weight': weight}

    def _mutual_divergence(self, logits: jax.Array) -> jax.Array:
        """Of every member from each of the others, their mean, [K, B]."""
        pairs = self.num_branches, *logits.shape
        divergence = losses.kl_divergence(
            jnp.broadcast_to(lax.stop_gradient(logits)[:, None], pairs),
            jnp.broadcast_to(logits[None], pairs),
            self.settings['temperature'],
        )
        # A member's divergence from itself is in the sum too: it is 0.
        return divergence.sum(axis=0) / (self.num_branches - 1)
