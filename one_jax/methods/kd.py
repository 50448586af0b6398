"""Knowledge distillation from frozen teachers (Hinton, Vinyals, Dean 2015)."""

import jax

from one_jax.methods.base import Context, Method, Terms, register
from one_jax.models.multibranch import Outputs


@register('kd')
class KnowledgeDistillation(Method):
    """One network that learns from the labels and from the mean logits of its frozen teachers.

        cross_entropy_weight * CE(z) + distill_weight * KL_T(mean of the teachers' logits || z)

    One large teacher is classic distillation. One teacher of the student's own kind, from another
    seed, is self-distillation. Several of that kind are averaged teachers (Allen-Zhu and Li 2023),
    the yardstick of every online method. Most later code has `cross_entropy_weight=0.1` and
    `distill_weight=0.9` (Tian, Krishnan, Isola 2020).
    """

    # Folders of exported students, separated by commas.
    teachers: str = ''
    temperature: float = 4.0
    cross_entropy_weight: float = 1.0
    # The paper's alpha.
    distill_weight: float = 1.0
    # Fraction of training over which `distill_weight` rises; 0 is no ramp.
    rampup_fraction: float = 0.0

    default_branches = 1
    max_branches = 1
    min_teachers = 1

    def targets(self, outputs: Outputs, context: Context) -> jax.Array:
        return context.teacher_logits.mean(axis=0, keepdims=True)

    def loss(self, outputs: Outputs, context: Context) -> tuple[jax.Array, Terms]:
        _, terms = super().loss(outputs, context)
        distillation = terms['distill_weight'] * terms['distillation'].sum()
        cross_entropy = terms['branch_cross_entropy'].sum()
        return self.cross_entropy_weight * cross_entropy + distillation, terms
