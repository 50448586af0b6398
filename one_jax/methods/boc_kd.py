"""BOC-KD, online ensemble model compression (Walawalkar, Shen, Savvides, ECCV 2020), partly
reconstructed.

From the paper: branches of decreasing width, the shared stem, the three terms and their weights.
Reconstructed: the adapters' layers, and the axes over which the squared error is averaged.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from one_jax import losses, models
from one_jax.errors import require
from one_jax.methods.base import Context, Method, Terms, register
from one_jax.models.aggregators import Adapters
from one_jax.models.multibranch import Outputs


@register('boc_kd')
class BocKd(Method):
    """Networks of decreasing width that learn together; any of them can be exported.

    Branch j of K has the stages of the network at (K - j) / K of their width; branch 0 is the whole
    network. They share only the stem.

        cross_entropy_weight * sum over j of CE(z_j)
        + feature_weight * sum over stages s and branches j >= 1 of MSE(adapter(f_js), sg f_0s)
        + distill_weight * sum over j of KL_T(sg mean z || z_j)

    The adapters are 1x1 convolutions. The squared error is a mean over batch, pixels and channels.
    """

    cross_entropy_weight: float = 0.7
    feature_weight: float = 0.15
    distill_weight: float = 0.15
    temperature: float = 2.0
    # Fraction of training over which `distill_weight` rises; 0 is no ramp.
    rampup_fraction: float = 0.0

    default_branches = 5
    min_branches = 2
    share_nothing = True
    shares_stem = True

    def validate(self) -> None:
        super().validate()
        # At any width, a network's stages have maps of the same height and width.
        kinds = {name.partition('@')[0] for name in self.branch_networks}
        require(
            len(kinds) == 1 < len(set(self.branch_networks)),
            'model.branch_networks',
            ','.join(self.branch_networks),
            f'different widths of one network for method.name={self.name!r}, e.g. '
            'resnet32,resnet32@0.5',
        )

    @classmethod
    def default_branch_networks(cls, name: str, num_branches: int) -> tuple[str, ...]:
        models.network(name)  # Reports an unknown name as the user wrote it.
        kind, _, ratio = name.partition('@')
        widths = [float(ratio or 1) * (1 - j / num_branches) for j in range(1, num_branches)]
        return (name, *(f'{kind}@{width:g}' for width in widths))

    @property
    def make_aggregator(self) -> Callable[..., nn.Module]:
        return Adapters

    def loss(self, outputs: Outputs, context: Context) -> tuple[jax.Array, Terms]:
        weight = self.ramped_weight(context.progress)
        target = jnp.broadcast_to(lax.stop_gradient(outputs.teacher_logits), outputs.logits.shape)
        divergence = losses.kl_divergence(target, outputs.logits, self.temperature)
        cross_entropy = losses.cross_entropy(outputs.logits, context.labels)
        adapted, widest = outputs.aggregate.extra, outputs.heads.stages[0]
        squared_error = jnp.stack([_squared_error(stages, widest) for stages in adapted])
        terms = {
            'branch_cross_entropy': losses.batch_mean(cross_entropy, context.mask),
            # For branches 1 to K - 1.
            'feature_squared_error': losses.batch_mean(squared_error, context.mask),
            'distillation': losses.batch_mean(divergence, context.mask),
        }
        loss = (
            self.cross_entropy_weight * terms['branch_cross_entropy'].sum()
            + self.feature_weight * terms['feature_squared_error'].sum()
            + weight * terms['distillation'].sum()
        )
        return loss, {**terms, 'distill_weight': weight}


def _squared_error(adapted: tuple[jax.Array, ...], widest: tuple[jax.Array, ...]) -> jax.Array:
    """Returns each image's error [B]: the mean over pixels and channels, the sum over stages."""
    errors = []
    for maps, target in zip(adapted, widest, strict=True):
        target = jnp.asarray(lax.stop_gradient(target))
        dtype = jnp.promote_types(target.dtype, jnp.float32)
        errors.append(jnp.square(maps.astype(dtype) - target.astype(dtype)).mean(axis=(1, 2, 3)))
    return sum(errors)
