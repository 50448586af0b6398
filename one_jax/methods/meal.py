"""MEAL V2 (Shen and Savvides 2020) without its discriminator."""

import jax

from one_jax import losses
from one_jax.methods.base import Context, Method, Terms, register
from one_jax.models.multibranch import Outputs


@register('meal')
class MealV2(Method):
    """One network that learns the mean probabilities of its frozen teachers, and no labels.

        KL(mean of the teachers' softmax || softmax(z)), T = 1

    Unlike `kd`, it averages probabilities and not logits. The paper's optional discriminator on the
    logits is left out.
    """

    # Folders of exported students, separated by commas.
    teachers: str = ''

    default_branches = 1
    max_branches = 1
    min_teachers = 1

    def loss(self, outputs: Outputs, context: Context) -> tuple[jax.Array, Terms]:
        log_probabilities = jax.nn.log_softmax(context.teacher_logits)
        # The logarithm of the mean probabilities, up to a constant that the softmax removes.
        target = jax.nn.logsumexp(log_probabilities, axis=0, keepdims=True)
        divergence = losses.kl_divergence(target, outputs.logits, 1.0)
        distillation = losses.batch_mean(divergence, context.mask)
        return distillation.sum(), {'distillation': distillation}
