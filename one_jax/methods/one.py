"""ONE, the on-the-fly native ensemble (Lan, Zhu, Gong, NeurIPS 2018), and its ablations."""

import functools
from collections.abc import Callable
from typing import Literal

import jax
from flax import linen as nn

from one_jax import losses
from one_jax.errors import require
from one_jax.methods.base import Context, Method, Terms, register
from one_jax.models.aggregators import Gate, Mean
from one_jax.models.multibranch import Outputs


@register('one')
class One(Method):
    """Branches that learn from the labels and from their gated ensemble (equations 3 to 7).

    The paper's ablations: `distill_weight=0` (no online distillation), `model.share_stages=0` (no
    sharing; the gate sees the image), `teacher='mean'` (no gate), `model.num_branches` 1 to 5. One
    branch is the plain network without a teacher, as in the paper's table. The authors' code, not
    the paper, has `target_epsilon=1e-7` and `gate_scale='uniform'`.
    """

    temperature: float = 3.0
    distill_weight: float = 1.0
    # 80 of the paper's 300 epochs; 0 is no ramp.
    rampup_fraction: float = 80 / 300
    # 'gate' (learned weights for each image) or 'mean' (uniform weights).
    teacher: Literal['gate', 'mean'] = 'gate'
    # Whether the teacher is a constant in the divergence; otherwise it is pulled to the branches.
    detach_teacher: bool = True
    # Added to each of the teacher's probabilities in the divergence.
    target_epsilon: float = 0.0
    # The initial scale of the gate's batch normalisation: 1, or drawn from U(0, 1) as PyTorch did
    # before version 1.2.
    gate_scale: Literal['ones', 'uniform'] = 'ones'

    def validate(self) -> None:
        super().validate()
        epsilon = self.target_epsilon
        require(0 <= epsilon < 1, 'method.target_epsilon', epsilon, 'at least 0 and below 1')

    @property
    def make_aggregator(self) -> Callable[..., nn.Module] | None:
        if self.num_branches == 1:
            return None
        if self.teacher == 'mean':
            return Mean
        return functools.partial(Gate, num_branches=self.num_branches, scale_init=self.gate_scale)

    def loss(self, outputs: Outputs, context: Context) -> tuple[jax.Array, Terms]:
        if self.num_branches == 1:
            return super().loss(outputs, context)
        weight = self.ramped_weight(context.progress)
        loss, terms = losses.one_loss(
            outputs.logits,
            outputs.teacher_logits,
            context.labels,
            self.temperature,
            weight,
            mask=context.mask,
            detach_teacher=self.detach_teacher,
            epsilon=self.target_epsilon,
        )
        terms = {**terms, 'distill_weight': weight}
        if outputs.aggregate.weights is not None:
            terms['gate_weights'] = losses.batch_mean(outputs.aggregate.weights.T, context.mask)
        return loss, terms
