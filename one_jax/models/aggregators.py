"""Aggregators: modules that compute the teacher's logits from the branches' outputs.

All are called as `aggregator(shared, heads, train)` with
  shared: the maps that the branches share, [B, H, W, D] (the images, if they share nothing);
  heads: the branches' outputs, logits [K, B, C];
  train: whether batch normalisation uses the batch's statistics,
and have the attributes
  dtype: of the network's computation (an aggregator computes in at least float32);
  norm_axis_name: the mesh axis of synchronised batch normalisation, or None.
They exist during training only.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from one_jax import losses
from one_jax.models import layers
from one_jax.models.backbone import HeadOutputs


@struct.dataclass
class Aggregate:
    """The output of an aggregator; each part may be None.

    Attributes:
      teacher_logits: [B, C], evaluated and recorded as the teacher.
      weights: convex weights of the branches for each image, [B, K].
      targets: where branches have teachers of their own, the logits of the first M, [M, B, C].
      extra: anything else that the method's loss uses.
    """

    teacher_logits: jax.Array | None = None
    weights: jax.Array | None = None
    targets: jax.Array | None = None
    extra: Any = None


class Mean(nn.Module):
    """The uniform mean of the branches' logits: ONE without its gate."""

    dtype: Any = jnp.float32
    norm_axis_name: str | None = None

    @nn.compact
    def __call__(self, shared: jax.Array, heads: HeadOutputs, train: bool) -> Aggregate:
        return Aggregate(heads.logits.mean(axis=0))


class Gate(nn.Module):
    """ONE's gate: shared map -> pooling -> linear -> batch norm -> ReLU -> softmax over branches.

    The teacher is the gated sum of the branches' logits (Lan et al. 2018, equation 4; the layers
    are those of the authors' code).

    Attributes:
      num_branches: K.
      scale_init: of the batch norm: 'ones', or 'uniform' in [0, 1).
    """

    num_branches: int
    scale_init: str = 'ones'
    dtype: Any = jnp.float32
    norm_axis_name: str | None = None

    @nn.compact
    def __call__(self, shared: jax.Array, heads: HeadOutputs, train: bool) -> Aggregate:
        dtype = layers.parameter_dtype(self.dtype)
        pooled = shared.astype(dtype).mean(axis=(1, 2))
        scores = layers.Linear(self.num_branches, dtype=dtype, name='linear')(pooled)
        norm = layers.make_norm(dtype, self.norm_axis_name, train)
        scale_init = {'ones': nn.initializers.ones, 'uniform': nn.initializers.uniform(1.0)}
        norm = norm(scale_init=scale_init[self.scale_init], name='bn')
        weights = nn.softmax(nn.relu(norm(scores)))
        return Aggregate(losses.ensemble_logits(heads.logits, weights), weights)


def _linear(features: int, dtype: Any, kernel_init: Any, name: str) -> nn.Module:
    return nn.Dense(
        features,
        use_bias=False,
        dtype=dtype,
        param_dtype=dtype,
        kernel_init=kernel_init,
        name=name,
    )


class PeerAttention(nn.Module):
    """The peers' targets by attention between their features (OKDDip, Chen et al., AAAI 2020).

    With h_a the pooled feature of peer a in R^D, q_a = W_q h_a and k_a = W_k h_a in R^(D/8),
    without biases and with the same two matrices for all peers:

        attention_ab = softmax over b of q_a . k_b,   target_a = sum over b of attention_ab z_b

    A peer attends to itself too, and the products are not scaled. The aggregate has `targets`
    [P, B, C], the mean of the peers' logits as `teacher_logits`, and the attention [P, B, P] as
    `extra`.

    Attributes:
      num_peers: P; the first P branches are peers, the others are part of no target.
    """

    num_peers: int
    dtype: Any = jnp.float32
    norm_axis_name: str | None = None

    def embeddings(self, heads: HeadOutputs, train: bool) -> jax.Array:
        """Returns each peer's input to the attention, [P, B, D]: its pooled feature."""
        dtype = layers.parameter_dtype(self.dtype)
        return jnp.asarray(heads.features[: self.num_peers], dtype)

    @nn.compact
    def __call__(self, shared: jax.Array, heads: HeadOutputs, train: bool) -> Aggregate:
        dtype = layers.parameter_dtype(self.dtype)
        embeddings = self.embeddings(heads, train)
        width = max(1, embeddings.shape[-1] // 8)
        queries = _linear(width, dtype, layers.linear_kernel_init, 'query')(embeddings)
        keys = _linear(width, dtype, layers.linear_kernel_init, 'key')(embeddings)
        keys_by_example = keys.transpose(1, 0, 2)
        # Not a matrix product, which accelerators would round: unscaled scores may be large.
        scores = (queries[:, :, None] * keys_by_example[None]).sum(axis=-1)
        attention = nn.softmax(scores)
        logits = jnp.asarray(heads.logits)[: self.num_peers]
        targets = jax.vmap(losses.ensemble_logits, in_axes=(None, 0))(logits, attention)
        return Aggregate(logits.mean(axis=0), targets=targets, extra=attention)


class AttentionFusion(PeerAttention):
    """MDE's fusion as reconstructed: OKDDip's attention with one fused feature added for all peers.

        f = GAP(ReLU(BN(conv1x1(the peers' last maps side by side)))),   e_a = h_a + f

    where e_a takes the place of h_a. With f = 0 it is `PeerAttention`.
    """

    def embeddings(self, heads: HeadOutputs, train: bool) -> jax.Array:
        """Returns the peers' pooled features plus the fused one, [P, B, D]."""
        dtype = layers.parameter_dtype(self.dtype)
        features = super().embeddings(heads, train)
        maps = jnp.asarray(heads.maps[: self.num_peers], dtype)
        side_by_side = jnp.concatenate(list(maps), axis=-1)
        conv = layers.make_conv(dtype, 'dense')
        norm = layers.make_norm(dtype, self.norm_axis_name, train)
        fused = conv(maps.shape[-1], kernel_size=1, name='conv')(side_by_side)
        fused = nn.relu(norm(name='bn')(fused)).mean(axis=(1, 2))
        return features + fused[None]


class SelectiveFusion(nn.Module):
    """MDE's fusion as one target for all peers, with weights of the peers for each class.

        u = GAP(sum over a of the last maps s_a),   r = W_0 u in R^(D/4),   e_a = W_a r in R^C
        w = softmax over a of e_a, for each class,   target = sum over a of w_a * z_a

    W_a starts near zero, so the target starts as the mean of the peers' logits. There are no
    biases. The aggregate has `targets` [P, B, C], P times the same, and the mean of the peers'
    logits as `teacher_logits`.

    Attributes:
      num_peers: P; the first P branches are peers, the others are part of no target.
    """

    num_peers: int
    dtype: Any = jnp.float32
    norm_axis_name: str | None = None

    @nn.compact
    def __call__(self, shared: jax.Array, heads: HeadOutputs, train: bool) -> Aggregate:
        dtype = layers.parameter_dtype(self.dtype)
        logits = jnp.asarray(heads.logits)[: self.num_peers]
        maps = jnp.asarray(heads.maps[: self.num_peers], dtype)
        pooled = maps.mean(axis=(2, 3)).sum(axis=0)
        hidden = max(1, pooled.shape[-1] // 4)
        reduced = _linear(hidden, dtype, layers.linear_kernel_init, 'reduce')(pooled)
        num_peers, batch_size, num_classes = logits.shape
        near_zero = nn.initializers.normal(1e-3)
        scores = _linear(num_peers * num_classes, dtype, near_zero, 'select')(reduced)
        weights = nn.softmax(scores.reshape(batch_size, num_peers, num_classes), axis=1)
        target = (weights.transpose(1, 0, 2) * logits).sum(axis=0)
        targets = jnp.broadcast_to(target[None], logits.shape)
        return Aggregate(logits.mean(axis=0), targets=targets)


class Adapters(nn.Module):
    """BOC-KD's adapters: the maps of narrower branches at the width of branch 0's.

    A 1x1 convolution without bias for each stage of branches 1 to K - 1. The aggregate has the mean
    of the branches' logits as `teacher_logits`, and as `extra` a tuple of adapted stages
    [B, H, W, channels of branch 0] for each of those branches.
    """

    dtype: Any = jnp.float32
    norm_axis_name: str | None = None

    @nn.compact
    def __call__(self, shared: jax.Array, heads: HeadOutputs, train: bool) -> Aggregate:
        conv = layers.make_conv(self.dtype, 'dense')
        widest, *others = heads.stages
        adapted = tuple(
            tuple(
                conv(wide.shape[-1], 1, name=f'member{branch}_stage{stage}')(narrow)
                for stage, (narrow, wide) in enumerate(zip(stages, widest, strict=True), start=1)
            )
            for branch, stages in enumerate(others, start=1)
        )
        return Aggregate(heads.logits.mean(axis=0), extra=adapted)
