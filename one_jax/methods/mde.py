"""MDE, multi-branch diversity enhancement for online distillation, as reconstructed.

From the paper's abstract and overview figure: a fusion module computes the peers' targets from the
last maps and logits of all peers, without the leader; the classifier diversification acts on pairs
of peers' linear classifiers; the leader learns from the peers' ensemble. Reconstructed: the layers
of the fusion, the measure of a pair's overlap, and every constant.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import lax

from one_jax.errors import require
from one_jax.methods.base import Context, Terms, register
from one_jax.methods.okddip import Okddip
from one_jax.models.aggregators import AttentionFusion, PeerAttention, SelectiveFusion
from one_jax.models.multibranch import Outputs

FUSIONS = {'attention': AttentionFusion, 'selective': SelectiveFusion, 'none': PeerAttention}


def classifier_diversity(kernels: jax.typing.ArrayLike, side: str, norm: str) -> jax.Array:
    """Measures the overlap of linear classifiers, summed over pairs a < b; 0 if orthogonal.

    Args:
      kernels: [P, D, C], features first.
      side: 'class' measures kernel_a^T kernel_b [C, C], products of class vectors; 'feature'
        measures kernel_a kernel_b^T [D, D].
      norm: of that matrix: 'fro' (Frobenius), 'fro2' (its square), or for the side 'class' also
        'cosine' ('fro2' of class vectors of length 1: the sum of squared cosines).

    Returns:
      The scalar to minimise.
    """
    kernels = jnp.asarray(kernels)
    kernels = kernels.astype(jnp.promote_types(kernels.dtype, jnp.float32))
    if norm == 'cosine':
        # Any tiny bound keeps a class vector of zeros, and its gradient, finite.
        kernels = kernels / optax.safe_norm(kernels, 1e-12, axis=1, keepdims=True)
    first, second = (kernels[index] for index in np.triu_indices(len(kernels), k=1))
    product = 'pdc,pde->pce' if side == 'class' else 'pdc,pec->pde'
    overlaps = jnp.einsum(product, first, second, precision=lax.Precision.HIGHEST)
    if norm == 'fro':
        # The plain norm has no gradient at 0, where orthogonal classifiers are.
        return optax.safe_norm(overlaps, 0.0, axis=(1, 2)).sum()
    return (overlaps**2).sum()


@register('mde')
class Mde(Okddip):
    """OKDDip with a fusion module that computes the peers' targets, and diversified classifiers.

        OKDDip's loss + diversity_weight * sum over pairs of peers of a norm of W_a^T W_b

    The added term has no ramp. `fusion='none'` with `diversity_weight=0` is OKDDip. The option
    'paper' sets the constants reported for the paper, whose gradient is far below weight decay's:
    compare the recorded 'diversity_gradient_ratio' with `optimizer.weight_decay`.
    """

    # 'attention' (fused features in OKDDip's attention), 'selective' (weights of the peers for each
    # class) or 'none' (OKDDip's attention).
    fusion: Literal['attention', 'selective', 'none'] = 'attention'
    # Gamma, the weight of the diversification; 0 turns it off.
    diversity_weight: float = 1e-4
    # See `classifier_diversity`.
    diversity_side: Literal['class', 'feature'] = 'class'
    diversity_norm: Literal['fro2', 'fro', 'cosine'] = 'fro2'

    options: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        'paper': {
            'method.diversity_side': 'feature',
            'method.diversity_norm': 'fro',
            'method.diversity_weight': 5e-8,
        }
    }

    def validate(self) -> None:
        super().validate()
        require(
            self.diversity_norm != 'cosine' or self.diversity_side == 'class',
            'method.diversity_side',
            self.diversity_side,
            "'class' with method.diversity_norm='cosine': the cosine is of class vectors",
        )

    @property
    def make_aggregator(self) -> Callable[..., nn.Module]:
        return functools.partial(FUSIONS[self.fusion], num_peers=self.num_peers)

    def loss(self, outputs: Outputs, context: Context) -> tuple[jax.Array, Terms]:
        loss, terms = super().loss(outputs, context)
        kernels = context.params['head']['fc']['kernel'][: self.num_peers]
        diversity = functools.partial(
            classifier_diversity, side=self.diversity_side, norm=self.diversity_norm
        )
        terms['classifier_diversity'] = diversity(kernels)
        # The same ratio for weight decay is its coefficient.
        kernels = lax.stop_gradient(kernels)
        gradient = self.diversity_weight * optax.tree.norm(jax.grad(diversity)(kernels))
        terms['diversity_gradient_ratio'] = gradient / optax.tree.norm(kernels)
        return loss + self.diversity_weight * terms['classifier_diversity'], terms
