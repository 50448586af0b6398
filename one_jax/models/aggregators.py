"""Modules that make the teacher's logits out of the branches' outputs."""

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
    """What an aggregator gives; None where it has no such thing.

    Attributes:
      teacher_logits: the one teacher that is evaluated and recorded, [B, C].
      weights: convex weights of the branches for every image, [B, K].
      targets: where every member has a teacher of its own, their logits [M, B, C].
      extra: anything else that the method's loss wants.
    """

    teacher_logits: jax.Array | None = None
    weights: jax.Array | None = None
    targets: jax.Array | None = None
    extra: Any = None


class Mean(nn.Module):
    """The uniform mean of the members' logits: ONE without its gate.

    Attributes:
      dtype: of the computation of the network around it.
      norm_axis_name: unused: it has no layers.
    """

    dtype: Any = jnp.float32
    norm_axis_name: str | None = None

    @nn.compact
    def __call__(self, shared: jax.Array, members: HeadOutputs, train: bool) -> Aggregate:
        """The arguments are `Gate`'s."""
        return Aggregate(members.logits.mean(axis=0))


class Gate(nn.Module):
    """ONE's gate: shared map -> pooling -> linear -> batch norm -> ReLU -> softmax over branches.

    The teacher is the gated sum of the branches' logits (Lan et al. 2018, equation 4; the layers
    are those of the authors' code). It computes in float32 at least: K numbers an image cost
    nothing.

    Attributes:
      num_branches: K.
      dtype: of the computation of the network around it.
      norm_axis_name: mesh axis of synchronised batch normalisation, or None.
    """

    num_branches: int
    dtype: Any = jnp.float32
    norm_axis_name: str | None = None

    @nn.compact
    def __call__(self, shared: jax.Array, members: HeadOutputs, train: bool) -> Aggregate:
        """Weighs the branches.

        Args:
          shared: what the branches share, [B, H, W, D].
          members: the stacked outputs of the branches, logits [K, B, C].
          train: whether batch normalisation uses the batch's statistics.
        """
        dtype = layers.parameter_dtype(self.dtype)
        pooled = shared.astype(dtype).mean(axis=(1, 2))
        scores = layers.Linear(self.num_branches, dtype=dtype, name='linear')(pooled)
        norm = layers.make_norm(dtype, self.norm_axis_name, train)
        weights = nn.softmax(nn.relu(norm(name='bn')(scores)))
        return Aggregate(losses.ensemble_logits(members.logits, weights), weights)
