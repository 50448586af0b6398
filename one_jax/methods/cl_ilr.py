"""CL-ILR, collaborative learning with shared intermediate layers (Song and Chai, NeurIPS 2018).

The paper fixes the target (the mean of the other heads' logits) and the rescaling of the gradient
where the heads meet. The weights of the terms here are ONE's, a sum with a ramp and T = 3, as in
the comparisons that came after; the paper weighs the two terms of a head as beta and 1 - beta.
"""

import jax
import jax.numpy as jnp

from one_jax import losses
from one_jax.methods.base import Context, Method, Terms, register
from one_jax.models.multibranch import Outputs


def mean_of_others(logits: jax.typing.ArrayLike) -> jax.Array:
    """For each member, the mean of the logits of all others.

    Args:
      logits: [K, B, C], K at least 2.

    Returns:
      [K, B, C].
    """
    logits = jnp.asarray(logits)
    return (logits.sum(axis=0, keepdims=True) - logits) / (len(logits) - 1)


@register
class ClIlr(Method):
    """Branches that learn from the labels and from the mean of the other branches.

    With z_i the logits of branch i, t_i the mean of the others' and r the ramp:

        sum over i of CE(z_i) + r KL(t_i || z_i)

    Nothing is stopped: branch i is pulled to its target, and the target to branch i. K branches
    send K gradients into the trunk, which takes their mean and not their sum.
    """

    name = 'cl_ilr'
    defaults = {  # noqa: RUF012
        'temperature': 3.0,
        'distill_weight': 1.0,
        # 80 of 300 epochs, as ONE; 0 is no ramp.
        'rampup_fraction': 80 / 300,
        # Whether the gradient into the trunk is divided by K. With `model.share_stages=0` there is
        # no trunk, and nothing to divide.
        'rescale_gradient': True,
    }
    min_branches = 2

    @property
    def trunk_gradient(self) -> float:
        return 1 / self.num_branches if self.settings['rescale_gradient'] else 1.0

    def loss(self, outputs: Outputs, context: Context) -> tuple[jax.Array, Terms]:
        weight = self.distill_weight(context.progress)
        targets = mean_of_others(outputs.logits)
        branch = losses.cross_entropy(outputs.logits, context.labels)
        divergence = losses.kl_divergence(targets, outputs.logits, self.settings['temperature'])
        terms = {
            'branch_cross_entropy': losses.batch_mean(branch, context.mask),
            'distillation': losses.batch_mean(divergence, context.mask),
        }
        loss = terms['branch_cross_entropy'].sum() + weight * terms['distillation'].sum()
        return loss, {**terms, 'distill_weight': weight}
