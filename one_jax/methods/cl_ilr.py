"""CL-ILR, collaborative learning with shared intermediate layers (Song and Chai, NeurIPS 2018).

From the paper: the target, which is the mean of the other heads' logits, and the rescaled gradient
where the heads meet. The weights of the terms are ONE's (a sum with a ramp and T = 3), as in later
comparisons; the paper weights a head's two terms by beta and 1 - beta.
"""

import jax

from one_jax.methods.base import Context, Method, register
from one_jax.models.multibranch import Outputs


@register('cl_ilr')
class ClIlr(Method):
    """Branches that learn from the labels and from the mean of the other branches.

    With z_i the logits of branch i, t_i the mean of the others' logits and r the ramp:

        sum over i of CE(z_i) + r KL(t_i || z_i)

    No gradient is stopped: the target is pulled to the branch too. K branches send K gradients into
    the trunk, which receives their mean instead of their sum.
    """

    temperature: float = 3.0
    distill_weight: float = 1.0
    # 80 of 300 epochs, as in ONE; 0 is no ramp.
    rampup_fraction: float = 80 / 300
    # Whether to divide the gradient into the trunk by K. With `model.share_stages=0` there is no
    # trunk.
    rescale_gradient: bool = True

    min_branches = 2

    @property
    def trunk_gradient(self) -> float:
        return 1 / self.num_branches if self.rescale_gradient else 1.0

    def targets(self, outputs: Outputs, context: Context) -> jax.Array:
        logits = outputs.logits
        return (logits.sum(axis=0, keepdims=True) - logits) / (len(logits) - 1)
