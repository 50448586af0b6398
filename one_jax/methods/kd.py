"""Knowledge distillation from frozen teachers (Hinton, Vinyals, Dean 2015)."""

import jax

from one_jax.methods.base import Context, Method, register
from one_jax.models.multibranch import Outputs


@register('kd')
class KnowledgeDistillation(Method):
    """One network that learns from the labels and from the mean logits of its frozen teachers.

        CE(z) + distill_weight * KL_T(mean of the teachers' logits || z)

    One large teacher is classic distillation. One teacher of the student's own kind, from another
    seed, is self-distillation. Several of that kind are averaged teachers (Allen-Zhu and Li 2023),
    the yardstick of every online method.
    """

    # Folders of exported students, separated by commas.
    teachers: str = ''
    temperature: float = 4.0
    # The paper's alpha.
    distill_weight: float = 1.0
    # Fraction of training over which `distill_weight` rises; 0 is no ramp.
    rampup_fraction: float = 0.0

    default_branches = 1
    max_branches = 1
    min_teachers = 1

    def targets(self, outputs: Outputs, context: Context) -> jax.Array:
        return context.teacher_logits.mean(axis=0, keepdims=True)
