"""Knowledge distillation from frozen teachers (Hinton, Vinyals, Dean 2015)."""

import jax

from one_jax import losses
from one_jax.methods.base import Context, Method, Terms, register
from one_jax.models.multibranch import Outputs


@register
class KnowledgeDistillation(Method):
    """One network that learns from the labels and from the mean logits of its frozen teachers.

        CE(z, y) + distill_weight * KL_T(mean of the teachers' logits || z)

    What the teachers are makes the variants. One large network: classic distillation. One network
    like the student, from another seed: self-distillation. Several of them: averaged teachers
    (Allen-Zhu and Li 2023), whose gain is the yardstick of every online method.
    """

    name = 'kd'
    defaults = {  # noqa: RUF012
        # Folders of exported students, separated by commas.
        'teachers': '',
        'temperature': 4.0,
        # alpha.
        'distill_weight': 1.0,
        # Share of the run over which `distill_weight` rises; 0 is no ramp.
        'rampup_fraction': 0.0,
    }
    default_branches = 1
    max_branches = 1
    min_teachers = 1
    max_teachers = None

    def loss(self, outputs: Outputs, context: Context) -> tuple[jax.Array, Terms]:
        weight = self.distill_weight(context.progress)
        target = context.teacher_logits.mean(axis=0, keepdims=True)
        divergence = losses.kl_divergence(target, outputs.logits, self.settings['temperature'])
        cross_entropy = losses.cross_entropy(outputs.logits, context.labels)
        terms = {
            'branch_cross_entropy': losses.batch_mean(cross_entropy, context.mask),
            'distillation': losses.batch_mean(divergence, context.mask),
        }
        loss = terms['branch_cross_entropy'].sum() + weight * terms['distillation'].sum()
        return loss, {**terms, 'distill_weight': weight}
