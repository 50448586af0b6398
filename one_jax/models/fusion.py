"""The feature fusion modules of MDE as reconstructed: see `methods/mde.py` for what is known."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from one_jax.models import layers
from one_jax.models.aggregators import Aggregate
from one_jax.models.attention import PeerAttention
from one_jax.models.backbone import HeadOutputs


class AttentionFusion(PeerAttention):
    """OKDDip's attention between features to which one feature fused from all peers is added.

        f = GAP(ReLU(BN(conv1x1(the peers' last maps side by side)))),   e_a = h_a + f

    and e_a takes the place of h_a. With f = 0 it is `PeerAttention`, whose attributes and call it
    has.
    """

    def embeddings(self, members: HeadOutputs, train: bool) -> jax.Array:
        """The peers' pooled features plus the fused one, [P, B, D]."""
        dtype = layers.parameter_dtype(self.dtype)
        features = super().embeddings(members, train)
        maps = jnp.asarray(members.maps[: self.num_peers], dtype)
        side_by_side = jnp.concatenate(list(maps), axis=-1)
        conv = layers.make_conv(dtype, 'dense')
        norm = layers.make_norm(dtype, self.norm_axis_name, train)
        fused = conv(maps.shape[-1], kernel_size=1, name='conv')(side_by_side)
        fused = nn.relu(norm(name='bn')(fused)).mean(axis=(1, 2))
        return features + fused[None]


class SelectiveFusion(nn.Module):
    """One target for all peers, in which every class has its own weights of the peers.

        u = GAP(sum over a of the last maps s_a),   r = W_0 u in R^(D/4),   e_a = W_a r in R^C
        w = softmax over a of e_a, class by class,   target = sum over a of w_a * z_a

    W_a starts near zero, so the target starts as the mean of the peers' logits. Nothing has a bias.
    It computes in float32 at least.

    Attributes:
      num_peers: P, how many of the first members are peers; the others enter no target.
      dtype: of the computation of the network around it.
      norm_axis_name: unused: it has no batch normalisation.
    """

    num_peers: int
    dtype: Any = jnp.float32
    norm_axis_name: str | None = None

    @nn.compact
    def __call__(self, shared: jax.Array, members: HeadOutputs, train: bool) -> Aggregate:
        """The arguments are those of `PeerAttention`.

        Returns:
          `targets` [P, B, C], P times the same; `teacher_logits`, the mean of the peers' logits.
        """
        dtype = layers.parameter_dtype(self.dtype)
        logits = jnp.asarray(members.logits)[: self.num_peers]
        maps = jnp.asarray(members.maps[: self.num_peers], dtype)
        pooled = maps.mean(axis=(2, 3)).sum(axis=0)

        def linear(features: int, kernel_init: nn.initializers.Initializer, name: str) -> nn.Module:
            return nn.Dense(
                features,
                use_bias=False,
                dtype=dtype,
                param_dtype=dtype,
                kernel_init=kernel_init,
                name=name,
            )

        hidden = max(1, pooled.shape[-1] // 4)
        reduced = linear(hidden, layers.linear_kernel_init, 'reduce')(pooled)
        num_peers, batch_size, num_classes = logits.shape
        near_zero = nn.initializers.normal(1e-3)
        scores = linear(num_peers * num_classes, near_zero, 'select')(reduced)
        weights = nn.softmax(scores.reshape(batch_size, num_peers, num_classes), axis=1)
        target = (weights.transpose(1, 0, 2) * logits).sum(axis=0)
        targets = jnp.broadcast_to(target[None], logits.shape)
        return Aggregate(logits.mean(axis=0), targets=targets)
