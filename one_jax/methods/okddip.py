"""OKDDip, online distillation with diverse peers (Chen, Mei, Wang, Feng, Chen, AAAI 2020)."""

import functools
from collections.abc import Callable

import jax
from flax import linen as nn
from jax import lax

from one_jax import losses
from one_jax.errors import ConfigError
from one_jax.methods.base import Context, Method, Terms, register
from one_jax.models.attention import PeerAttention
from one_jax.models.multibranch import Outputs


@register
class Okddip(Method):
    """Peers that learn from attention mixtures of each other, and a leader that learns from them.

    The last member is the leader. It is in no target; its own target is the mean of the peers'
    logits, and it is what is deployed. With z_a the logits of peer a, t_a its attention mixture,
    z_L the leader's logits and r the ramp:

        sum over all K of CE + r (sum over a of KL(t_a || z_a) + KL(mean z || z_L))

    `model.share_stages=0` is the paper's form with whole networks.
    """

    name = 'okddip'
    defaults = {  # noqa: RUF012
        'temperature': 3.0,
        'distill_weight': 1.0,
        # 80 of the paper's 300 epochs; 0 is no ramp.
        'rampup_fraction': 80 / 300,
        # Weight of the leader's divergence beside those of the peers.
        'leader_weight': 1.0,
        # Whether the last member is a leader; if not, all K are peers and branch 0 is deployed.
        'leader': True,
        # Whether all targets are constants in the divergences. The attention has no other source of
        # gradient: with True it stays as it was initialised, save for weight decay.
        'detach_targets': False,
    }
    default_branches = 4
    min_branches = 2
    alike_members = True

    def validate(self) -> None:
        super().validate()
        self.check_range('leader_weight')
        if self.num_peers < 2:
            raise ConfigError(
                'model.num_branches',
                self.num_branches,
                'at least 3, two peers and the leader; or 2 with method.leader=False',
            )

    @property
    def num_peers(self) -> int:
        """P, the number of members that teach and are taught by each other: the first P."""
        return self.num_branches - int(self.settings['leader'])

    @property
    def make_aggregator(self) -> Callable[..., nn.Module]:
        return functools.partial(PeerAttention, num_peers=self.num_peers)

    @property
    def deployed(self) -> str:
        return f'branch {self.num_branches - 1}' if self.settings['leader'] else 'branch 0'

    def loss(self, outputs: Outputs, context: Context) -> tuple[jax.Array, Terms]:
        targets, leader_target = outputs.targets, outputs.teacher_logits
        if self.settings['detach_targets']:
            targets, leader_target = lax.stop_gradient((targets, leader_target))
        weight, temperature = self.distill_weight(context.progress), self.settings['temperature']
        branch = losses.cross_entropy(outputs.logits, context.labels)
        peer = losses.kl_divergence(targets, outputs.logits[: self.num_peers], temperature)
        terms = {
            'branch_cross_entropy': losses.batch_mean(branch, context.mask),
            'peer_distillation': losses.batch_mean(peer, context.mask),
        }
        distillation = terms['peer_distillation'].sum()
        if self.settings['leader']:
            leader = losses.kl_divergence(leader_target, outputs.logits[-1], temperature)
            terms['leader_distillation'] = losses.batch_mean(leader, context.mask)
            distillation += self.settings['leader_weight'] * terms['leader_distillation']
        loss = terms['branch_cross_entropy'].sum() + weight * distillation
        terms['distill_weight'] = weight
        if outputs.extra is not None:
            # 1 means that a peer is its own teacher: the trivial way to make the divergence small.
            own = outputs.extra.diagonal(axis1=0, axis2=2).T
            terms['self_attention'] = losses.batch_mean(own, context.mask)
        return loss, terms
