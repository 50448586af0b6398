"""The plain network: one branch, cross-entropy, no teacher. The baseline of everything."""

import jax

from one_jax import losses
from one_jax.methods.base import Method, Terms, register
from one_jax.models.multibranch import Outputs


@register
class Plain(Method):
    """Cross-entropy of one network."""

    name = 'plain'
    max_branches = 1

    def loss(
        self, outputs: Outputs, labels: jax.Array, mask: jax.Array | None, progress: jax.Array
    ) -> tuple[jax.Array, Terms]:
        branch = losses.batch_mean(losses.cross_entropy(outputs.logits, labels), mask)
        return branch.sum(), {'branch_cross_entropy': branch}
