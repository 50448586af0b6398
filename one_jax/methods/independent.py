"""Two controls: branches that share a trunk and nothing else, and branches trained as one average.

What a method gains over `independent` it does not owe to the shared trunk alone, and what it gains
over `joint_average` it does not owe to the ensemble's size alone (the average trained jointly helps
little: Allen-Zhu and Li, ICLR 2023).
"""

import jax
import jax.numpy as jnp

from one_jax import losses
from one_jax.methods.base import Context, Method, Terms, register
from one_jax.models.multibranch import Outputs


@register
class Independent(Method):
    """Branches above a shared trunk that learn from the labels alone: the sum of their CE."""

    name = 'independent'
    min_branches = 2

    def loss(self, outputs: Outputs, context: Context) -> tuple[jax.Array, Terms]:
        branch = losses.cross_entropy(outputs.logits, context.labels)
        branch = losses.batch_mean(branch, context.mask)
        return branch.sum(), {'branch_cross_entropy': branch}


@register
class JointAverage(Method):
    """One cross-entropy, of the mean of the branches' logits: no branch learns by itself.

    The mean is what was trained, and so the ensemble is what is deployed.
    """

    name = 'joint_average'
    min_branches = 2

    @property
    def deployed(self) -> str:
        return 'ensemble'

    def loss(self, outputs: Outputs, context: Context) -> tuple[jax.Array, Terms]:
        ensemble = jnp.asarray(outputs.logits).mean(axis=0)
        cross_entropy = losses.cross_entropy(ensemble, context.labels)
        cross_entropy = losses.batch_mean(cross_entropy, context.mask)
        return cross_entropy, {'ensemble_cross_entropy': cross_entropy}
