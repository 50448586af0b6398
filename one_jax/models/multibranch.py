"""The network that is trained: a trunk, K members above it, and an aggregator."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import lax

from one_jax.models.aggregators import Aggregate
from one_jax.models.backbone import Backbone, HeadOutputs


@struct.dataclass
class Outputs:
    """What the members and the teacher say of a batch.

    Members that are alike have their arrays stacked, with the branch axis K in front; of unlike
    ones, `features`, `maps` and `stages` are tuples with an entry for each member.

    Attributes:
      logits: the members' logits, [K, B, C].
      features: their pooled features, [K, B, D].
      maps: their last feature maps, [K, B, H, W, D].
      stages: what each stage of their heads left, a tuple of [K, B, H, W, D]; for unlike members a
        tuple of such tuples.
      teacher_logits: the aggregator's logits, [B, C], or None without an aggregator.
      weights: the weights the aggregator gave the members, [B, K], or None.
      targets: the aggregator's teacher for each of the members that have one, [M, B, C], or None.
      extra: what else the aggregator gives.
    """

    logits: jax.Array
    features: Any
    maps: Any
    stages: Any = ()
    teacher_logits: jax.Array | None = None
    weights: jax.Array | None = None
    targets: jax.Array | None = None
    extra: Any = None


class MultiBranch(nn.Module):
    """A trunk, `num_branches` heads and an aggregator; with one branch and no aggregator, the plain
    net.

    The variables are `{'trunk': ..., 'head': ..., 'aggregator': ...}` in each collection; every
    array under 'head' has the branch axis K in front. Heads start from different random numbers.
    Unlike members are 'head_0', 'head_1', ... in place of 'head'.

    Attributes:
      make_backbones: constructors of a segment, called with `begin` or `end`, and `name`: one for
        members that are alike, or one for each of unlike members.
      num_branches: K, at least 1.
      share_stages: the number of stages in the trunk; 0 shares nothing, not even the stem.
      share_stem: with `share_stages` 0, share the stem all the same (the first member's).
      make_aggregator: constructor of the aggregator (called with `name`), or None.
      trunk_gradient: factor of the gradient that the members send into the trunk.
    """

    make_backbones: tuple[Callable[..., Backbone], ...]
    num_branches: int
    share_stages: int
    share_stem: bool = False
    make_aggregator: Callable[..., nn.Module] | None = None
    trunk_gradient: float = 1.0

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> Outputs:
        """Runs every branch.

        Args:
          images: normalised, [B, H, W, 3]; or [K, B, H, W, 3], each member's own, where nothing is
            shared.
          train: whether batch normalisation uses the batch's statistics.
        """
        shared, begin = images, None
        if self.share_stages > 0 or self.share_stem:
            begin = self.share_stages
            shared = self.make_backbones[0](end=begin, name='trunk')(images, train)
            if self.trunk_gradient != 1:
                scaled = self.trunk_gradient * shared
                # The difference is 0: the value stays exactly what it was.
                shared = lax.stop_gradient(shared) + (scaled - lax.stop_gradient(scaled))
        members = self._run_heads(shared, begin, own_images=images.ndim == 5, train=train)
        aggregate = Aggregate()
        if self.make_aggregator is not None:
            aggregate = self.make_aggregator(name='aggregator')(shared, members, train)
        return Outputs(
            members.logits,
            members.features,
            members.maps,
            members.stages,
            aggregate.teacher_logits,
            aggregate.weights,
            aggregate.targets,
            aggregate.extra,
        )

    def _run_heads(
        self, shared: jax.Array, begin: int | None, own_images: bool, train: bool
    ) -> HeadOutputs:
        if len(self.make_backbones) == 1:
            run_heads = nn.vmap(
                lambda head, maps: head(maps, train),
                variable_axes={'params': 0, 'batch_stats': 0},
                split_rngs={'params': True},
                in_axes=0 if own_images else None,
                axis_size=self.num_branches,
            )
            return run_heads(self.make_backbones[0](begin=begin, name='head'), shared)
        members = [
            make_backbone(begin=begin, name=f'head_{index}')(
                shared[index] if own_images else shared, train
            )
            for index, make_backbone in enumerate(self.make_backbones)
        ]
        return HeadOutputs(
            jnp.stack([member.logits for member in members]),
            tuple(member.features for member in members),
            tuple(member.maps for member in members),
            tuple(member.stages for member in members),
        )


def branch_variables(tree: Mapping[str, Any], branch: int) -> dict[str, Any]:
    """The head of one branch, out of one collection of the variables of a `MultiBranch`."""
    if 'head' in tree:
        return jax.tree.map(lambda stacked: stacked[branch], tree['head'])
    return tree[f'head_{branch}']


def student_variables(variables: Mapping[str, Any], branch: int) -> dict[str, Any]:
    """The plain network's variables for one branch: the trunk's tree united with a slice of the
    heads'.

    Args:
      variables: of a `MultiBranch`, e.g. `{'params': ..., 'batch_stats': ...}`.
      branch: which branch, from 0.

    Returns:
      The same collections, each the tree of the backbone with `begin` and `end` None.
    """
    return {
        collection: {**tree.get('trunk', {}), **branch_variables(tree, branch)}
        for collection, tree in variables.items()
    }


def aggregator_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    """What the aggregator has of the variables of a `MultiBranch`; empty, where it has none."""
    return {name: tree['aggregator'] for name, tree in variables.items() if 'aggregator' in tree}


def split_ensemble(variables: Mapping[str, Any], num_branches: int) -> dict[str, dict[str, Any]]:
    """The variables of a `MultiBranch` without its aggregator, in parts: 'trunk', 'branches.0', ...

    Args:
      variables: `{'params': ..., 'batch_stats': ...}`.
      num_branches: K.
    """
    trunk = {name: tree['trunk'] for name, tree in variables.items() if 'trunk' in tree}
    # Where batch normalisations are folded, a collection has nothing of the heads.
    of_heads = {
        name: tree
        for name, tree in variables.items()
        if any(part.startswith('head') for part in tree)
    }
    branches = {
        f'branches.{branch}': {
            name: branch_variables(tree, branch) for name, tree in of_heads.items()
        }
        for branch in range(num_branches)
    }
    return {'trunk': trunk, **branches}


def join_ensemble(parts: Mapping[str, Mapping[str, Any]], alike: bool) -> dict[str, Any]:
    """The inverse of `split_ensemble`.

    Args:
      parts: of arrays.
      alike: whether the branches are copies of one network, whose arrays are stacked.
    """
    branches = [part for name, part in parts.items() if name != 'trunk']
    variables = {}
    for name in branches[0]:
        if alike:
            stacked = jax.tree.map(lambda *x: jnp.stack(x), *[part[name] for part in branches])
            variables[name] = {'head': stacked}
        else:
            variables[name] = {f'head_{i}': part[name] for i, part in enumerate(branches)}
    for name, tree in parts['trunk'].items():
        variables.setdefault(name, {})['trunk'] = tree
    return variables
