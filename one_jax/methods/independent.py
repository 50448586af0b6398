"""Two controls: branches that share a trunk and nothing else, and branches trained as one average.

A method's gain over `independent` is not due to the shared trunk alone, and its gain over
`joint_average` is not due to the ensemble's size alone (training the average jointly helps little:
Allen-Zhu and Li, ICLR 2023).
"""

import jax

from one_jax import losses
from one_jax.methods.base import Context, Method, Terms, register
from one_jax.models.multibranch import Outputs


@register('independent')
class Independent(Method):
    """Branches above a shared trunk that learn from the labels alone."""

    min_branches = 2


@register('joint_average')
class JointAverage(Method):
    """Branches above a shared trunk with one cross-entropy, of the mean of their logits.

    Only the mean is trained, so the ensemble is deployed.
    """

    min_branches = 2

    @property
    def deployed(self) -> str:
        return 'ensemble'

    def loss(self, outputs: Outputs, context: Context) -> tuple[jax.Array, Terms]:
        cross_entropy = losses.cross_entropy(outputs.logits.mean(axis=0), context.labels)
        cross_entropy = losses.batch_mean(cross_entropy, context.mask)
        return cross_entropy, {'ensemble_cross_entropy': cross_entropy}
