"""What all network families share: stages, and the cut into a trunk and a head."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from one_jax.models import layers


@struct.dataclass
class HeadOutputs:
    """What a head gives for a batch; under `vmap` each array has the branch axis K in front.

    Attributes:
      logits: [B, C], float32 at least.
      features: the pooled features the classifier sees, [B, D].
      maps: the last feature maps, [B, H, W, D].
      stages: what each stage of the head left, the last one included, [B, H, W, D] each.
    """

    logits: jax.Array
    features: jax.Array
    maps: jax.Array
    stages: tuple[jax.Array, ...] = ()


class Backbone(nn.Module):
    """A classifier as a stem, stages 1 to `num_stages`, pooling and a linear classifier.

    `begin` and `end` cut a segment out of it. With the defaults it is the whole, plain network.
    `end=s` is the trunk: stem and stages 1..s (0: the stem alone). `begin=s` is the head: the other
    stages, pooling and classifier. A name in the parameter tree does not depend on the cut, so the
    union of a trunk's tree and a head's tree is the plain network's tree.

    Attributes:
      num_classes: the number of classes C.
      begin: the number of stages that are already done, the stem before them; None: not even it.
      end: the last stage to do, or None to go on to the classifier.
      dtype: of the computation.
      norm_axis_name: mesh axis of synchronised batch normalisation, or None.
      branch_conv: how convolutions behave under vmap, see `layers.make_conv`.
      keep_activations: for the backward pass, see `layers.rematerialised`.
      width_ratio: factor of the channels of all stages, for networks that can be `scaled`.
    """

    num_classes: int
    begin: int | None = None
    end: int | None = None
    dtype: Any = jnp.float32
    norm_axis_name: str | None = None
    branch_conv: str = 'dense'
    keep_activations: str = 'all'
    width_ratio: float = 1.0

    def scaled(self, channels: int) -> int:
        """A stage's number of channels at this `width_ratio`, rounded, at least 1."""
        return max(1, round(channels * self.width_ratio))

    @property
    def num_stages(self) -> int:
        """The number of stages after the stem."""
        raise TypeError(f'{type(self).__name__} must say how many stages it has')

    def stem(self, x: jax.Array, conv: Callable, norm: Callable) -> jax.Array:
        """The layers before stage 1."""
        raise TypeError(f'{type(self).__name__} must define its stem')

    def stage(self, x: jax.Array, number: int, conv: Callable, norm: Callable) -> jax.Array:
        """Stage `number`, counted from 1."""
        raise TypeError(f'{type(self).__name__} must define its stages')

    def last_maps(self, x: jax.Array, norm: Callable) -> jax.Array:
        """What stands between the last stage and the pooling: nothing, in most networks."""
        return x

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array | HeadOutputs:
        """Runs the segment.

        Args:
          x: normalised images [B, H, W, 3] when `begin` is None, else the maps that stage `begin`
            left (the stem, when it is 0).
          train: whether batch normalisation uses the batch's statistics.

        Returns:
          The maps after stage `end`, or `HeadOutputs` when `end` is None.
        """
        conv = layers.make_conv(self.dtype, self.branch_conv)
        norm = layers.make_norm(self.dtype, self.norm_axis_name, train)
        if self.begin is None:
            x = self.stem(x.astype(self.dtype), conv, norm)
        last_stage = self.num_stages if self.end is None else self.end
        stages = []
        for number in range((self.begin or 0) + 1, last_stage + 1):
            x = self.stage(x, number, conv, norm)
            stages.append(x)
        if self.end is not None:
            return x
        maps = self.last_maps(x, norm)
        features = maps.mean(axis=(1, 2))
        logits = layers.Linear(self.num_classes, dtype=self.dtype, name='fc')(features)
        return HeadOutputs(
            logits.astype(layers.parameter_dtype(self.dtype)), features, maps, tuple(stages)
        )
