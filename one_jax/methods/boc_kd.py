"""BOC-KD, online ensemble model compression (Walawalkar, Shen, Savvides, ECCV 2020), in part as
reconstructed.

Taken from the paper: members of falling width, the shared stem, three terms and their weights.
Reconstructed: the adapters' layers, and what the squared error is a mean over.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from one_jax import losses, models
from one_jax.errors import ConfigError
from one_jax.methods.base import Context, Method, Terms, register
from one_jax.models.adapters import Adapters
from one_jax.models.multibranch import Outputs


@register
class BocKd(Method):
    """Networks of falling width that learn together; any of them can be exported.

    Member j of N has the stages of the network at (N - j) / N of their width; member 0 is the whole
    network. They share the stem alone.

        cross_entropy_weight * sum over j of CE(z_j, y)
        + feature_weight * sum over stages s and members j >= 1 of MSE(adapter(f_js), sg f_0s)
        + distill_weight * sum over j of KL_T(sg mean z || z_j)

    The adapters are 1x1 convolutions. The mean of the squared error is over batch, pixels and
    channels.
    """

    name = 'boc_kd'
    defaults = {  # noqa: RUF012
        'cross_entropy_weight': 0.7,
        'feature_weight': 0.15,
        'distill_weight': 0.15,
        'temperature': 2.0,
        # Share of the run over which `distill_weight` rises; 0 is no ramp.
        'rampup_fraction': 0.0,
    }
    default_branches = 5
    min_branches = 2
    whole_networks = True
    shares_stem = True

    def validate(self) -> None:
        super().validate()
        self.check_range('cross_entropy_weight')
        self.check_range('feature_weight')
        # Of one network, the stages' maps are of the same height and width at any of its widths.
        kinds = {name.partition('@')[0] for name in self.members}
        if len(kinds) > 1 or len(set(self.members)) == 1:
            raise ConfigError(
                'model.members',
                ','.join(self.members),
                f'different widths of one network for method.name={self.name!r}, as in '
                'resnet32,resnet32@0.5',
            )

    def member_networks(self, name: str, num_branches: int) -> tuple[str, ...]:
        # An unknown name or a width that cannot be is reported as such.
        models.network(name)
        kind, _, ratio = name.partition('@')
        widths = [float(ratio or 1) * (1 - j / num_branches) for j in range(1, num_branches)]
        return (name, *(f'{kind}@{width:g}' for width in widths))

    @property
    def make_aggregator(self) -> Callable[..., nn.Module]:
        return Adapters

    def loss(self, outputs: Outputs, context: Context) -> tuple[jax.Array, Terms]:
        weight = self.distill_weight(context.progress)
        logits = jnp.asarray(outputs.logits)
        target = jnp.broadcast_to(lax.stop_gradient(outputs.teacher_logits), logits.shape)
        divergence = losses.kl_divergence(target, logits, self.settings['temperature'])
        cross_entropy = losses.cross_entropy(logits, context.labels)
        squared_error = jnp.stack([_squared_error(m, outputs.stages[0]) for m in outputs.extra])
        terms = {
            'branch_cross_entropy': losses.batch_mean(cross_entropy, context.mask),
            # Of members 1 to K - 1.
            'feature_squared_error': losses.batch_mean(squared_error, context.mask),
            'distillation': losses.batch_mean(divergence, context.mask),
        }
        loss = (
            self.settings['cross_entropy_weight'] * terms['branch_cross_entropy'].sum()
            + self.settings['feature_weight'] * terms['feature_squared_error'].sum()
            + weight * terms['distillation'].sum()
        )
        return loss, {**terms, 'distill_weight': weight}


def _squared_error(adapted: tuple[jax.Array, ...], pivot: tuple[jax.Array, ...]) -> jax.Array:
    """The squared error of each image, [B]: a mean over pixels and channels, a sum over stages."""
    errors = []
    for maps, target in zip(adapted, pivot, strict=True):
        target = jnp.asarray(lax.stop_gradient(target))
        dtype = jnp.promote_types(target.dtype, jnp.float32)
        errors.append(jnp.square(maps.astype(dtype) - target.astype(dtype)).mean(axis=(1, 2, 3)))
    return sum(errors)
