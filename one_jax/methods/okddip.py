"""OKDDip, online distillation with diverse peers (Chen, Mei, Wang, Feng, Chen, AAAI 2020)."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
from flax import linen as nn
from jax import lax

from one_jax import losses
from one_jax.errors import require
from one_jax.methods.base import Context, Method, Terms, register
from one_jax.models.aggregators import PeerAttention
from one_jax.models.multibranch import Outputs


@register('okddip')
class Okddip(Method):
    """Peers that learn from attention mixtures of each other, and a leader that learns from them.

    The last branch is the leader. It is part of no target, learns from the mean of the peers'
    logits, and is deployed. With z_a the logits of peer a, t_a its attention mixture, z_L the
    leader's logits and r the ramp:

        sum over all K of CE + r (sum over a of KL(t_a || z_a) + KL(mean z || z_L))

    `model.share_stages=0` is the paper's form with whole networks.
    """

    temperature: float = 3.0
    distill_weight: float = 1.0
    # 80 of the paper's 300 epochs; 0 is no ramp.
    rampup_fraction: float = 80 / 300
    # Weight of the leader's divergence relative to the peers'.
    leader_weight: float = 1.0
    # Whether the last branch is a leader; otherwise all K are peers, and branch 0 is deployed.
    leader: bool = True
    # Whether targets are constants in the divergences. The attention has no other gradient: with
    # True only weight decay changes it.
    detach_targets: bool = False

    default_branches = 4
    min_branches = 2
    identical_branches = True
    recipe: ClassVar[Mapping[str, Any]] = {'optimizer.weight_decay': 5e-4}

    def validate(self) -> None:
        super().validate()
        require(
            self.num_peers >= 2,
            'model.num_branches',
            self.num_branches,
            'at least 3, two peers and the leader; or 2 with method.leader=False',
        )

    @property
    def num_peers(self) -> int:
        """P: the first P branches teach each other."""
        return self.num_branches - int(self.leader)

    @property
    def make_aggregator(self) -> Callable[..., nn.Module]:
        return functools.partial(PeerAttention, num_peers=self.num_peers)

    @property
    def deployed(self) -> str:
        return f'branch {self.num_branches - 1}' if self.leader else 'branch 0'

    def loss(self, outputs: Outputs, context: Context) -> tuple[jax.Array, Terms]:
        targets, leader_target = outputs.aggregate.targets, outputs.teacher_logits
        if self.detach_targets:
            targets, leader_target = lax.stop_gradient((targets, leader_target))
        weight = self.ramped_weight(context.progress)
        branch = losses.cross_entropy(outputs.logits, context.labels)
        peer = losses.kl_divergence(targets, outputs.logits[: self.num_peers], self.temperature)
        terms = {
            'branch_cross_entropy': losses.batch_mean(branch, context.mask),
            'peer_distillation': losses.batch_mean(peer, context.mask),
        }
        distillation = terms['peer_distillation'].sum()
        if self.leader:
            leader = losses.kl_divergence(leader_target, outputs.logits[-1], self.temperature)
            terms['leader_distillation'] = losses.batch_mean(leader, context.mask)
            distillation += self.leader_weight * terms['leader_distillation']
        loss = terms['branch_cross_entropy'].sum() + weight * distillation
        terms['distill_weight'] = weight
        attention = outputs.aggregate.extra
        if attention is not None:
            # At 1 each peer is its own teacher, the trivial way to a small divergence.
            own = attention.diagonal(axis1=0, axis2=2).T
            terms['self_attention'] = losses.batch_mean(own, context.mask)
        return loss, terms
