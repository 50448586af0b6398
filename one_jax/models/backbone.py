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
    """A head's outputs for a batch; under `vmap` each array has the branch axis K in front.

    Attributes:
      logits: [B, C], at least float32.
      features: the pooled features that the classifier sees, [B, D].
      maps: the last feature maps, [B, H, W, D].
      stages: the maps after each stage of the head, [B, H, W, D] each.
    """

    logits: jax.Array
    features: jax.Array
    maps: jax.Array
    stages: tuple[jax.Array, ...] = ()


class Backbone(nn.Module):
    """A classifier: a stem, stages 1 to `num_stages`, pooling and a linear classifier.

    A subclass defines `num_stages`, `stem` and `stage`. `begin` and `end` select a segment. The
    default is the whole, plain network. `end=s` is the trunk: stem and stages 1 to s (0: the stem
    alone). `begin=s` is the head: the other stages, pooling and classifier. Parameter names do not
    depend on the cut, so the union of a trunk's tree and a head's tree is the plain network's tree.

    Attributes:
      num_classes: C.
      begin: the number of stages already done, after the stem; None starts with the stem.
      end: the last stage, or None to run to the classifier.
      dtype: of the computation.
      norm_axis_name: mesh axis of synchronised batch normalisation, or None.
      branch_conv: see `layers.make_conv`.
      remat: see `layers.remat`.
      width_ratio: factor on the channels of all stages, for networks that use `scaled`.
    """

    num_classes: int
    begin: int | None = None
    end: int | None = None
    dtype: Any = jnp.float32
    norm_axis_name: str | None = None
    branch_conv: str = 'dense'
    remat: str = 'none'
    width_ratio: float = 1.0

    # Whether stages consist of blocks, which use `remat`; whether they use `scaled`.
    has_blocks = True
    can_scale = False

    def scaled(self, channels: int) -> int:
        """Returns a stage's number of channels at this `width_ratio`, rounded down, at least 1."""
        # Rounded down as by BOC-KD's authors; but 0.29 * 100 is 28.999999999999996.
        return max(1, int(round(channels * self.width_ratio, 6)))

    @property
    def num_stages(self) -> int:
        """The number of stages after the stem."""
        raise NotImplementedError

    def stem(self, x: jax.Array, conv: Callable, norm: Callable) -> jax.Array:
        """Runs the layers before stage 1."""
        raise NotImplementedError

    def stage(self, x: jax.Array, number: int, conv: Callable, norm: Callable) -> jax.Array:
        """Runs stage `number`, counted from 1."""
        raise NotImplementedError

    def last_maps(self, x: jax.Array, norm: Callable) -> jax.Array:
        """Runs the layers between the last stage and the pooling; none in most networks."""
        return x

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array | HeadOutputs:
        """Runs the segment.

        Args:
          x: normalised images [B, H, W, 3] if `begin` is None, else the maps after stage `begin`
            (the stem's, if it is 0).
          train: whether batch normalisation uses the batch's statistics.

        Returns:
          The maps after stage `end`, or `HeadOutputs` if `end` is None.
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
