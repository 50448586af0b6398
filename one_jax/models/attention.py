"""OKDDip's attention: every peer has a teacher of its own, a mixture of all peers' logits."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from one_jax import losses
from one_jax.models import layers
from one_jax.models.aggregators import Aggregate
from one_jax.models.backbone import HeadOutputs


class PeerAttention(nn.Module):
    """The peers' targets by attention between their features (OKDDip, Chen et al., AAAI 2020).

    With h_a the pooled feature of peer a in R^D, q_a = W_q h_a and k_a = W_k h_a in R^(D/8),
    without biases, the same two matrices for all peers:

        attention_ab = softmax over b of q_a . k_b,   target_a = sum over b of attention_ab z_b

    A peer attends to itself too, and the products are not scaled. It computes in float32 at least.

    Attributes:
      num_peers: P, how many of the first members are peers; the others enter no target.
      dtype: of the computation of the network around it.
      norm_axis_name: mesh axis of synchronised batch normalisation, or None.
    """

    num_peers: int
    dtype: Any = jnp.float32
    norm_axis_name: str | None = None

    def embeddings(self, members: HeadOutputs, train: bool) -> jax.Array:
        """What stands for each peer in the attention, [P, B, D]: its pooled feature."""
        dtype = layers.parameter_dtype(self.dtype)
        return jnp.asarray(members.features[: self.num_peers], dtype)

    @nn.compact
    def __call__(self, shared: jax.Array, members: HeadOutputs, train: bool) -> Aggregate:
        """Mixes the peers' logits.

        Args:
          shared: what the members share; unused.
          members: the stacked outputs of the members, logits [K, B, C], features [K, B, D].
          train: whether batch normalisation uses the batch's statistics.

        Returns:
          `targets` [P, B, C]; `teacher_logits`, the mean of the peers' logits; and, as `extra`, the
          attention [P, B, P], whose last axis sums to 1.
        """
        dtype = layers.parameter_dtype(self.dtype)
        embeddings = self.embeddings(members, train)

        def project(name: str) -> jax.Array:
            return nn.Dense(
                max(1, embeddings.shape[-1] // 8),
                use_bias=False,
                dtype=dtype,
                param_dtype=dtype,
                kernel_init=layers.linear_kernel_init,
                name=name,
            )(embeddings)

        queries, keys = project('query'), project('key')
        keys_by_example = keys.transpose(1, 0, 2)
        # Not a matrix product, which accelerators would round: unscaled scores may be large.
        scores = (queries[:, :, None] * keys_by_example[None]).sum(axis=-1)
        attention = nn.softmax(scores)
        logits = jnp.asarray(members.logits)[: self.num_peers]
        targets = jax.vmap(losses.ensemble_logits, in_axes=(None, 0))(logits, attention)
        return Aggregate(logits.mean(axis=0), targets=targets, extra=attention)
