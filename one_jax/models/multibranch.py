"""The network in training: a trunk, K branches above it, and an aggregator."""

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
    """The network's outputs for a batch.

    Attributes:
      heads: the branches' outputs. Identical branches have stacked arrays, with the branch axis K
        in front. Heterogeneous branches have stacked logits; `features`, `maps` and `stages` are
        tuples with one entry for each branch.
      aggregate: the aggregator's output, empty without an aggregator.
    """

    heads: HeadOutputs
    aggregate: Aggregate

    @property
    def logits(self) -> jax.Array:
        """The branches' logits, [K, B, C]."""
        return self.heads.logits

    @property
    def teacher_logits(self) -> jax.Array | None:
        """The teacher's logits, [B, C], or None."""
        return self.aggregate.teacher_logits

    def evaluated_logits(self) -> jax.Array:
        """Stacks the logits of the branches, the teacher (if any) and the ensemble.

        The ensemble is the mean of the branches' logits, as in the methods' papers.

        Returns:
          [K + 1, B, C], or [K + 2, B, C] with a teacher.
        """
        teacher = [] if self.teacher_logits is None else [self.teacher_logits]
        return jnp.stack([*self.logits, *teacher, self.logits.mean(axis=0)])


class MultiBranch(nn.Module):
    """A trunk, `num_branches` heads and an aggregator; with one branch and no aggregator, the plain
    network.

    The variables are `{'trunk': ..., 'head': ..., 'aggregator': ...}` in each collection; every
    array under 'head' has the branch axis K in front. Heads start from different random numbers.
    Heterogeneous branches are 'head_0', 'head_1', ... in place of 'head'.

    Attributes:
      make_backbones: constructors of a segment, called with `begin` or `end`, and `name`: one for
        identical branches, or one for each heterogeneous branch.
      num_branches: K, at least 1.
      share_stages: the number of stages in the trunk; 0 shares nothing, not even the stem.
      share_stem: with `share_stages` 0, share the stem all the same (the first branch's).
      make_aggregator: constructor of the aggregator (called with `name`), or None.
      trunk_gradient: factor on the gradient from the branches into the trunk.
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
          images: normalised, [B, H, W, 3]; or [K, B, H, W, 3], one batch for each branch, if
            nothing is shared.
          train: whether batch normalisation uses the batch's statistics.
        """
        shared, begin = images, None
        if self.share_stages > 0 or self.share_stem:
            begin = self.share_stages
            shared = self.make_backbones[0](end=begin, name='trunk')(images, train)
            if self.trunk_gradient != 1:
                scaled = self.trunk_gradient * shared
                # The difference is 0: the value does not change.
                shared = lax.stop_gradient(shared) + (scaled - lax.stop_gradient(scaled))
        heads = self._run_heads(shared, begin, own_images=images.ndim == 5, train=train)
        aggregate = Aggregate()
        if self.make_aggregator is not None:
            aggregate = self.make_aggregator(name='aggregator')(shared, heads, train)
        return Outputs(heads, aggregate)

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
        heads = [
            make_backbone(begin=begin, name=f'head_{index}')(
                shared[index] if own_images else shared, train
            )
            for index, make_backbone in enumerate(self.make_backbones)
        ]
        return HeadOutputs(
            jnp.stack([head.logits for head in heads]),
            tuple(head.features for head in heads),
            tuple(head.maps for head in heads),
            tuple(head.stages for head in heads),
        )


def branch_variables(tree: Mapping[str, Any], branch: int) -> dict[str, Any]:
    """Selects one branch's head from one collection of a `MultiBranch`'s variables."""
    if 'head' in tree:
        return jax.tree.map(lambda stacked: stacked[branch], tree['head'])
    return tree[f'head_{branch}']


def student_variables(variables: Mapping[str, Any], branch: int) -> dict[str, Any]:
    """Selects one branch's plain network, with the union of the trunk's tree and the head's in each
    collection (`{'params': ..., 'batch_stats': ...}`).
    """
    return {
        collection: {**tree.get('trunk', {}), **branch_variables(tree, branch)}
        for collection, tree in variables.items()
    }


def aggregator_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Selects the aggregator's part of a `MultiBranch`'s variables; empty if it has none."""
    return {name: tree['aggregator'] for name, tree in variables.items() if 'aggregator' in tree}


def split_ensemble(variables: Mapping[str, Any], num_branches: int) -> dict[str, dict[str, Any]]:
    """Splits a `MultiBranch`'s variables, without the aggregator: 'trunk', 'branches.0', ..."""
    trunk = {name: tree['trunk'] for name, tree in variables.items() if 'trunk' in tree}
    # With folded batch normalisations, a collection may lack the heads.
    heads = {
        name: tree
        for name, tree in variables.items()
        if any(part.startswith('head') for part in tree)
    }
    branches = {
        f'branches.{branch}': {name: branch_variables(tree, branch) for name, tree in heads.items()}
        for branch in range(num_branches)
    }
    return {'trunk': trunk, **branches}


def join_ensemble(parts: Mapping[str, Mapping[str, Any]], identical: bool) -> dict[str, Any]:
    """Inverts `split_ensemble`; identical branches have stacked arrays."""
    branches = [part for name, part in parts.items() if name != 'trunk']
    variables = {}
    for name in branches[0]:
        if identical:
            stacked = jax.tree.map(lambda *x: jnp.stack(x), *[part[name] for part in branches])
            variables[name] = {'head': stacked}
        else:
            variables[name] = {f'head_{i}': part[name] for i, part in enumerate(branches)}
    for name, tree in parts['trunk'].items():
        variables.setdefault(name, {})['trunk'] = tree
    return variables
