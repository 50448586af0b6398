"""ONE, the on-the-fly native ensemble (Lan, Zhu, Gong, NeurIPS 2018)."""

import functools
from collections.abc import Callable

import jax
from flax import linen as nn

from one_jax import losses
from one_jax.methods.base import Method, Terms, register
from one_jax.models.aggregators import Gate
from one_jax.models.multibranch import Outputs


@register
class One(Method):
    """Branches that learn from the labels and from their gated ensemble (equations 3 to 7)."""

    name = 'one'
    defaults = {  # noqa: RUF012
        'temperature': 3.0,
        'distill_weight': 1.0,
        # 80 of the paper's 300 epochs.
        'rampup_fraction': 80 / 300,
    }
    # One branch would be its own teacher: the paper's row "1 branch" is the plain network.
    min_branches = 2

    @property
    def make_aggregator(self) -> Callable[..., nn.Module]:
        return functools.partial(Gate, num_branches=self.num_branches)

    def loss(
        self, outputs: Outputs, labels: jax.Array, mask: jax.Array | None, progress: jax.Array
    ) -> tuple[jax.Array, Terms]:
        weight = self.distill_weight(progress)
        loss, terms = losses.one_loss(
            outputs.logits,
            outputs.teacher_logits,
            labels,
            self.settings['temperature'],
            weight,
            mask=mask,
        )
        gate_weights = losses.batch_mean(outputs.weights.T, mask)
        return loss, {**terms, 'distill_weight': weight, 'gate_weights': gate_weights}
