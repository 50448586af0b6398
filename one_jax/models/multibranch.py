"""The network that is trained: one trunk, K heads over stacked parameters, and an aggregator."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax import struct

from one_jax.models.aggregators import Aggregate
from one_jax.models.backbone import Backbone, HeadOutputs


@struct.dataclass
class Outputs:
    """What the members and the teacher say of a batch.

    Attributes:
      logits: the members' logits, [K, B, C].
      features: their pooled features, [K, B, D].
      maps: their last feature maps, [K, B, H, W, D].
      teacher_logits: the aggregator's logits, [B, C], or None without an aggregator.
      weights: the weights the aggregator gave the members, [B, K], or None.
    """

    logits: jax.Array
    features: jax.Array
    maps: jax.Array
    teacher_logits: jax.Array | None = None
    weights: jax.Array | None = None


class MultiBranch(nn.Module):
    """A trunk, `num_branches` heads and an aggregator; with one branch and no aggregator, the plain
    net.

    The variables are `{'trunk': ..., 'head': ..., 'aggregator': ...}` in each collection; every
    array under 'head' has the branch axis K in front. Heads start from different random numbers.

    Attributes:
      make_backbone: constructor of a segment, called with `begin` or `end`, and `name`.
      num_branches: K, at least 1.
      share_stages: the number of stages in the trunk; 0 shares nothing, not even the stem.
      make_aggregator: constructor of the aggregator (called with `name`), or None.
    """

    make_backbone: Callable[..., Backbone]
    num_branches: int
    share_stages: int
    make_aggregator: Callable[..., nn.Module] | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> Outputs:
        """Runs every branch on the same images.

        Args:
          images: normalised, [B, H, W, 3].
          train: whether batch normalisation uses the batch's statistics.
        """
        shared = images
        if self.share_stages > 0:
            shared = self.make_backbone(end=self.share_stages, name='trunk')(images, train)
        run_heads = nn.vmap(
            lambda head, maps: head(maps, train),
            variable_axes={'params': 0, 'batch_stats': 0},
            split_rngs={'params': True},
            in_axes=None,
            axis_size=self.num_branches,
        )
        head = self.make_backbone(begin=self.share_stages, name='head')
        members: HeadOutputs = run_heads(head, shared)
        aggregate = Aggregate(teacher_logits=None)
        if self.make_aggregator is not None:
            aggregate = self.make_aggregator(name='aggregator')(shared, members, train)
        return Outputs(
            members.logits,
            members.features,
            members.maps,
            aggregate.teacher_logits,
            aggregate.weights,
        )


def student_variables(variables: Mapping[str, Any], branch: int) -> dict[str, Any]:
    """The plain network's variables for one branch: the trunk's tree united with a slice of the
    heads'.

    Args:
      variables: of a `MultiBranch`, e.g. `{'params': ..., 'batch_stats': ...}`.
      branch: which branch, from 0.

    Returns:
      The same collections, each the tree of the backbone with `begin=0` and `end=None`.
    """
    return {
        collection: {
            **tree.get('trunk', {}),
            **jax.tree.map(lambda stacked: stacked[branch], tree['head']),
        }
        for collection, tree in variables.items()
    }
