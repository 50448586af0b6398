"""MDE, multi-branch diversity enhancement for online distillation, as reconstructed.

Fixed by the paper's abstract and overview figure: a fusion module takes the last maps and logits of
all peers, not of the leader, and makes the peers' targets; the classifier diversification acts on
pairs of peers' linear classifiers; the leader learns from the peers' ensemble. Reconstructed here:
the layers of the fusion, how the diversification measures a pair, and every constant.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import lax

from one_jax.errors import ConfigError
from one_jax.methods.base import Context, Terms, register
from one_jax.methods.okddip import Okddip
from one_jax.models.attention import PeerAttention
from one_jax.models.fusion import AttentionFusion, SelectiveFusion
from one_jax.models.multibranch import Outputs

FUSIONS = {'attention': AttentionFusion, 'selective': SelectiveFusion, 'none': PeerAttention}
SIDES = ('class', 'feature')
NORMS = ('fro2', 'fro', 'cosine')


def classifier_diversity(kernels: jax.typing.ArrayLike, side: str, norm: str) -> jax.Array:
    """How much the linear classifiers overlap, summed over all pairs a < b; 0 if orthogonal.

    Args:
      kernels: [P, D, C], features first.
      side: 'class' measures kernel_a^T kernel_b, [C, C]: the products of a's class vectors with
        b's. 'feature' measures kernel_a kernel_b^T, [D, D].
      norm: of that matrix, 'fro' (Frobenius) or 'fro2' (its square); 'cosine' is 'fro2' of class
        vectors scaled to length 1, the sum of the squared cosines, for the side 'class' alone.

    Returns:
      The scalar to make small.

    Raises:
      ValueError: a side or norm that is not allowed.
    """
    if side not in SIDES or norm not in NORMS or (side, norm) == ('feature', 'cosine'):
        raise ValueError(f'side={side!r} with norm={norm!r} is not allowed')
    kernels = jnp.asarray(kernels)
    kernels = kernels.astype(jnp.promote_types(kernels.dtype, jnp.float32))
    if norm == 'cosine':
        # Any least length would do: it keeps a class vector of zeros, and its gradient, finite.
        kernels = kernels / optax.safe_norm(kernels, 1e-12, axis=1, keepdims=True)
    first, second = (kernels[index] for index in np.triu_indices(len(kernels), k=1))
    product = 'pdc,pde->pce' if side == 'class' else 'pdc,pec->pde'
    overlaps = jnp.einsum(product, first, second, precision=lax.Precision.HIGHEST)
    if norm == 'fro':
        # The plain norm has no gradient at 0, where orthogonal classifiers are.
        return optax.safe_norm(overlaps, 0.0, axis=(1, 2)).sum()
    return (overlaps**2).sum()


@register
class Mde(Okddip):
    """OKDDip with a fusion module that makes the peers' targets, and diversified classifiers.

        OKDDip's loss + diversity_weight * sum over pairs of peers of a norm of W_a^T W_b

    The term is not ramped. `fusion='none'` with `diversity_weight=0` is OKDDip. The constant
    reported for the paper is `diversity_weight=5e-8`, `diversity_side='feature'`,
    `diversity_norm='fro'`; its gradient is far below weight decay's. The record
    'diversity_gradient_ratio' shows it: compare it with `optimizer.weight_decay`.
    """

    name = 'mde'
    defaults = {  # noqa: RUF012
        **Okddip.defaults,
        # 'attention' (fused features in OKDDip's attention), 'selective' (weights of the peers for
        # each class) or 'none' (OKDDip's attention).
        'fusion': 'attention',
        # Gamma, the weight of the diversification; 0 leaves it out.
        'diversity_weight': 1e-4,
        # 'class' or 'feature': see `classifier_diversity`.
        'diversity_side': 'class',
        # 'fro2', 'fro' or 'cosine'.
        'diversity_norm': 'fro2',
    }

    def validate(self) -> None:
        super().validate()
        self.check_choice('fusion', tuple(FUSIONS))
        self.check_choice('diversity_side', SIDES)
        self.check_choice('diversity_norm', NORMS)
        self.check_range('diversity_weight')
        side = self.settings['diversity_side']
        if self.settings['diversity_norm'] == 'cosine' and side != 'class':
            raise ConfigError(
                'method.diversity_side',
                side,
                "'class' with method.diversity_norm='cosine': the cosine is of class vectors",
            )

    @property
    def make_aggregator(self) -> Callable[..., nn.Module]:
        return functools.partial(FUSIONS[self.settings['fusion']], num_peers=self.num_peers)

    def loss(self, outputs: Outputs, context: Context) -> tuple[jax.Array, Terms]:
        loss, terms = super().loss(outputs, context)
        kernels = context.params['head']['fc']['kernel'][: self.num_peers]
        diversity = functools.partial(
            classifier_diversity,
            side=self.settings['diversity_side'],
            norm=self.settings['diversity_norm'],
        )
        gamma = self.settings['diversity_weight']
        terms['classifier_diversity'] = diversity(kernels)
        # Weight decay's ratio of this kind is its coefficient.
        kernels = lax.stop_gradient(kernels)
        pull = gamma * optax.tree.norm(jax.grad(diversity)(kernels))
        terms['diversity_gradient_ratio'] = pull / optax.tree.norm(kernels)
        return loss + gamma * terms['classifier_diversity'], terms
