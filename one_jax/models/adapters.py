"""Adapters that make the maps of narrow networks comparable with those of a wide one."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from one_jax.models import layers
from one_jax.models.aggregators import Aggregate
from one_jax.models.backbone import HeadOutputs


class Adapters(nn.Module):
    """The mean of unlike members' logits; and their maps at the width of member 0's.

    A 1x1 convolution without bias for every stage of every member but the first. They exist during
    training only.

    Attributes:
      dtype: of the convolutions.
      norm_axis_name: unused: there is no normalisation.
    """

    dtype: Any = jnp.float32
    norm_axis_name: str | None = None

    @nn.compact
    def __call__(self, shared: jax.Array, members: HeadOutputs, train: bool) -> Aggregate:
        """Adapts the maps of members 1 to K - 1.

        Args:
          shared: unused.
          members: outputs of unlike members of as many stages each, whose maps are equally large.
          train: unused.

        Returns:
          The mean logits [B, C] as the teacher's, and in `extra` for each of those members a tuple
          of its adapted stages, [B, H, W, channels of member 0] each.
        """
        conv = layers.make_conv(self.dtype, 'dense')
        pivot, *others = members.stages
        adapted = tuple(
            tuple(
                conv(wide.shape[-1], 1, name=f'member{member}_stage{stage}')(narrow)
                for stage, (narrow, wide) in enumerate(zip(stages, pivot, strict=True), start=1)
            )
            for member, stages in enumerate(others, start=1)
        )
        return Aggregate(members.logits.mean(axis=0), extra=adapted)
