"""The plain network: one branch, cross-entropy, no teacher. The baseline of everything."""

import jax

from one_jax import losses
from one_jax.methods.base import Context, Method, Terms, register
from one_jax.models.multibranch import Outputs


@register
class Plain(Method):
    """Cross-entropy of one network."""

    name = 'plain'
    default_branches = 1
    max_branches = 1

    def loss(self, outputs: Outputs, context: Context) -> tuple[jax.Array, Terms]:
        branch = losses.cross_entropy(outputs.logits, context.labels)
        branch = losses.batch_mean(branch, context.mask)
        return branch.sum(), {'branch_cross_entropy': branch}
