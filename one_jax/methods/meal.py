"""MEAL V2 (Shen and Savvides 2020) without its discriminator."""

import jax
import jax.numpy as jnp

from one_jax import losses
from one_jax.methods.base import Context, Method, Terms, register
from one_jax.models.multibranch import Outputs


@register
class MealV2(Method):
    """One network that learns the mean of its frozen teachers' probabilities, and no labels.

        KL(mean of the teachers' softmax || softmax(z)), T = 1

    The mean is of probabilities and not of logits, unlike that of `kd`. The paper's optional
    discriminator on the logits is left out.
    """

    name = 'meal'
    defaults = {  # noqa: RUF012
        # Folders of exported students, separated by commas.
        'teachers': '',
    }
    default_branches = 1
    max_branches = 1
    min_teachers = 1
    max_teachers = None

    def loss(self, outputs: Outputs, context: Context) -> tuple[jax.Array, Terms]:
        log_probabilities = jax.nn.log_softmax(context.teacher_logits)
        # Up to a constant, which the softmax takes away, the logarithm of the mean probabilities.
        target = jax.nn.logsumexp(log_probabilities, axis=0, keepdims=True)
        divergence = losses.kl_divergence(target, jnp.asarray(outputs.logits), 1.0)
        distillation = losses.batch_mean(divergence, context.mask)
        return distillation.sum(), {'distillation': distillation}
