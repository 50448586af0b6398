"""EKD as reconstructed: several frozen teachers into one branched, compact student.

From the abstract of "ensemble knowledge distillation": several large pre-trained teachers of
different kinds; different teachers for different branches; branches coupled through their ensemble,
which is deployed; the largest gain where training data are few. Reconstructed: the form of the
loss, its constants and the other pairings.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from one_jax import losses
from one_jax.errors import require
from one_jax.methods.base import Context, Method, Terms, register
from one_jax.models.multibranch import Outputs


@register('ekd')
class EnsembleKnowledgeDistillation(Method):
    """Branches that each learn from a teacher, while their mean learns from the teachers' mean.

        L = a CE(mean z) + b D(mean t, mean z) + sum_i [a CE(z_i) + b D(t_i, z_i)]
        D(t, z) = KL_T(t || z) + rho * (mean over batch and classes of (t - z)^2)

    t_i are the frozen teachers' logits, z_i the branches'.
    """

    # Folders of exported students, separated by commas.
    teachers: str = ''
    temperature: float = 10.0
    # a.
    cross_entropy_weight: float = 0.5
    # b.
    distill_weight: float = 0.6
    # rho.
    squared_error_weight: float = 1.0
    # 'one_to_one': branch i learns from teacher i. 'all_to_all': every branch learns from every
    # teacher, by the mean of D over them. 'ensemble_to_all': every branch learns from mean t.
    pairing: Literal['one_to_one', 'all_to_all', 'ensemble_to_all'] = 'one_to_one'

    default_branches = 3
    default_share_stages = 1
    min_teachers = 1

    def validate(self) -> None:
        super().validate()
        number = len(self.teacher_folders)
        require(
            self.pairing != 'one_to_one' or number == self.num_branches,
            'method.teachers',
            self.teachers,
            f'{self.num_branches} folders, one for each branch: set model.num_branches={number}, '
            'or another method.pairing',
        )

    @property
    def deployed(self) -> str:
        return 'ensemble' if self.num_branches > 1 else 'branch 0'

    def targets(self, outputs: Outputs, context: Context) -> jax.Array:
        """Returns the teachers' logits for each branch, [N, K, B, C] with N teachers a branch."""
        teachers = jnp.asarray(context.teacher_logits)
        if self.pairing == 'one_to_one':
            return teachers[None]
        if self.pairing == 'ensemble_to_all':
            teachers = teachers.mean(axis=0, keepdims=True)
        shape = (len(teachers), self.num_branches, *teachers.shape[1:])
        return jnp.broadcast_to(teachers[:, None], shape)

    def loss(self, outputs: Outputs, context: Context) -> tuple[jax.Array, Terms]:
        logits, labels, mask = outputs.logits, context.labels, context.mask
        targets, teacher = self.targets(outputs, context), context.teacher_logits.mean(axis=0)
        ensemble = logits.mean(axis=0)
        distillation, squared_error = self._discrepancies(
            targets, jnp.broadcast_to(logits, targets.shape), mask
        )
        ensemble_distillation, ensemble_squared_error = self._discrepancies(teacher, ensemble, mask)
        terms = {
            'branch_cross_entropy': losses.batch_mean(losses.cross_entropy(logits, labels), mask),
            'distillation': distillation.mean(axis=0),
            'squared_error': squared_error.mean(axis=0),
            'ensemble_cross_entropy': losses.batch_mean(
                losses.cross_entropy(ensemble, labels), mask
            ),
            'ensemble_distillation': ensemble_distillation,
            'ensemble_squared_error': ensemble_squared_error,
        }
        rho = self.squared_error_weight
        cross_entropy = terms['branch_cross_entropy'].sum() + terms['ensemble_cross_entropy']
        discrepancy = (terms['distillation'] + rho * terms['squared_error']).sum()
        discrepancy += ensemble_distillation + rho * ensemble_squared_error
        loss = self.cross_entropy_weight * cross_entropy + self.distill_weight * discrepancy
        return loss, terms

    def _discrepancies(
        self, target: jax.Array, logits: jax.Array, mask: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the divergence and the squared error of logits [..., B, C], each [...]."""
        target = lax.stop_gradient(target)
        divergence = losses.kl_divergence(target, logits, self.temperature)
        squared_error = jnp.square(target - logits).mean(axis=-1)
        return losses.batch_mean(divergence, mask), losses.batch_mean(squared_error, mask)
