"""EKD as reconstructed: several frozen teachers into one branched, compact student.

The abstract of the paper ("ensemble knowledge distillation", a compact student with parallel
branches) fixes this much: the teachers are several large pre-trained networks of different kinds;
different teachers go to different branches; the branches are coupled through their ensemble, which
is deployed; the gain is largest where training data are few. The form of the loss, its constants
and the other pairings are a reconstruction.
"""

import jax
import jax.numpy as jnp
from jax import lax

from one_jax import losses
from one_jax.errors import ConfigError
from one_jax.methods.base import Context, Method, Terms, register
from one_jax.models.multibranch import Outputs

PAIRINGS = ('one_to_one', 'all_to_all', 'ensemble_to_all')


@register
class EnsembleKnowledgeDistillation(Method):
    """Branches that learn from a teacher each, and their mean from the mean of the teachers.

        L = a CE(mean z, y) + b D(mean t, mean z) + sum_i [a CE(z_i, y) + b D(t_i, z_i)]
        D(t, z) = KL_T(t || z) + rho * (mean over batch and classes of (t - z)^2)

    t_i are the frozen teachers' logits, z_i the branches'.
    """

    name = 'ekd'
    defaults = {  # noqa: RUF012
        # Folders of exported students, separated by commas.
        'teachers': '',
        'temperature': 10.0,
        # a.
        'cross_entropy_weight': 0.5,
        # b.
        'distill_weight': 0.6,
        # rho.
        'squared_error_weight': 1.0,
        # 'one_to_one': branch i learns from teacher i. 'all_to_all': every branch from every
        # teacher, by the mean of D over them. 'ensemble_to_all': every branch from the mean t.
        'pairing': 'one_to_one',
    }
    default_branches = 3
    default_share_stages = 1
    min_teachers = 1
    max_teachers = None

    def validate(self) -> None:
        super().validate()
        self.check_range('cross_entropy_weight')
        self.check_range('squared_error_weight')
        self.check_choice('pairing', PAIRINGS)
        one_to_one = self.settings['pairing'] == 'one_to_one'
        if one_to_one and len(self.teachers) != self.num_branches:
            raise ConfigError(
                'method.teachers',
                self.settings['teachers'],
                f'{self.num_branches} folders, one for each branch: '
                f'set model.num_branches={len(self.teachers)}, or another method.pairing',
            )

    @property
    def deployed(self) -> str:
        return 'ensemble' if self.num_branches > 1 else 'branch 0'

    def loss(self, outputs: Outputs, context: Context) -> tuple[jax.Array, Terms]:
        logits, teachers = jnp.asarray(outputs.logits), jnp.asarray(context.teacher_logits)
        ensemble, mask = logits.mean(axis=0), context.mask
        targets = self._targets(teachers)
        # Every branch against every teacher it has: [teachers of a branch, K].
        distillation, squared_error = self._discrepancies(
            targets, jnp.broadcast_to(logits, targets.shape), mask
        )
        ensemble_distillation, ensemble_squared_error = self._discrepancies(
            teachers.mean(axis=0), ensemble, mask
        )
        terms = {
            'branch_cross_entropy': losses.batch_mean(
                losses.cross_entropy(logits, context.labels), mask
            ),
            'distillation': distillation.mean(axis=0),
            'squared_error': squared_error.mean(axis=0),
            'ensemble_cross_entropy': losses.batch_mean(
                losses.cross_entropy(ensemble, context.labels), mask
            ),
            'ensemble_distillation': ensemble_distillation,
            'ensemble_squared_error': ensemble_squared_error,
        }
        rho = self.settings['squared_error_weight']
        cross_entropy = terms['branch_cross_entropy'].sum() + terms['ensemble_cross_entropy']
        discrepancy = (terms['distillation'] + rho * terms['squared_error']).sum()
        discrepancy += ensemble_distillation + rho * ensemble_squared_error
        loss = (
            self.settings['cross_entropy_weight'] * cross_entropy
            + self.settings['distill_weight'] * discrepancy
        )
        return loss, terms

    def _targets(self, teachers: jax.Array) -> jax.Array:
        """The logits of the teachers that each branch has, [teachers of a branch, K, B, C]."""
        if self.settings['pairing'] == 'one_to_one':
            return teachers[None]
        if self.settings['pairing'] == 'ensemble_to_all':
            teachers = teachers.mean(axis=0, keepdims=True)
        shape = (len(teachers), self.num_branches, *teachers.shape[1:])
        return jnp.broadcast_to(teachers[:, None], shape)

    def _discrepancies(
        self, target: jax.Array, logits: jax.Array, mask: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """The divergence and the squared error of logits [..., B, C], each [...]."""
        target = lax.stop_gradient(target)
        divergence = losses.kl_divergence(target, logits, self.settings['temperature'])
        squared_error = jnp.square(target - logits).mean(axis=-1)
        return losses.batch_mean(divergence, mask), losses.batch_mean(squared_error, mask)
