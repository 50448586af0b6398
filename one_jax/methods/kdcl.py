"""KDCL, knowledge distillation via collaborative learning (Guo et al., CVPR 2020)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from one_jax import losses
from one_jax.methods.base import Context, Method, Terms, register
from one_jax.models.multibranch import Outputs

TEACHERS = ('naive', 'linear', 'min_logit', 'general')
# Added to the diagonal of the error covariance, relative to the mean of the diagonal. It keeps the
# weights of members that are still nearly equal finite, and near to uniform.
RIDGE = 0.01
# The barrier of 'linear' in its successive Newton steps, in nats: the last is how near the
# cross-entropy comes to its least value, for each member.
BARRIERS = np.concatenate([np.geomspace(0.1, 1e-5, 16), np.full(4, 1e-5)]).astype(np.float32)
# Halvings of the interval in which the length of a Newton step lies.
HALVINGS = 12


@register
class Kdcl(Method):
    """Whole networks that learn from the labels and from one teacher made of all their logits.

    With z_i the logits of member i and t those of the teacher, a constant:

        sum over i of CE(z_i) + KL(t || z_i)

    The members are started apart, may be unlike, and see different crops of the same images.
    """

    name = 'kdcl'
    defaults = {  # noqa: RUF012
        'temperature': 2.0,
        'distill_weight': 1.0,
        # The paper has no ramp.
        'rampup_fraction': 0.0,
        # 'naive' (the best member on each image), 'linear' (the best convex combination on each
        # image), 'min_logit' (every class as far below the true one as any member has it) or
        # 'general' (weights from the members' errors on held-out images, made anew every epoch;
        # they may be negative).
        'teacher': 'min_logit',
        # Whether every member sees its own random crop of each image; if not, all see the same.
        'own_augmentation': True,
    }
    default_branches = 2
    min_branches = 2
    whole_networks = True

    def validate(self) -> None:
        super().validate()
        self.check_choice('teacher', TEACHERS)

    @property
    def augments_members(self) -> bool:
        return self.settings['own_augmentation']

    @property
    def needs_validation(self) -> bool:
        return self.settings['teacher'] == 'general'

    def loss(self, outputs: Outputs, context: Context) -> tuple[jax.Array, Terms]:
        logits = jnp.asarray(outputs.logits)
        target, weights = self._teacher(lax.stop_gradient(logits), context)
        divergence = losses.kl_divergence(
            jnp.broadcast_to(target, logits.shape), logits, self.settings['temperature']
        )
        branch = losses.cross_entropy(logits, context.labels)
        distill_weight = self.distill_weight(context.progress)
        terms = {
            'branch_cross_entropy': losses.batch_mean(branch, context.mask),
            'distillation': losses.batch_mean(divergence, context.mask),
        }
        loss = terms['branch_cross_entropy'].sum() + distill_weight * terms['distillation'].sum()
        terms['distill_weight'] = distill_weight
        if weights is not None:
            terms['teacher_weights'] = losses.batch_mean(weights.T, context.mask)
        return loss, terms

    def _teacher(self, logits: jax.Array, context: Context) -> tuple[jax.Array, jax.Array | None]:
        """The teacher's logits [B, C], and the members' weights in them [B, K] if it has any."""
        if self.settings['teacher'] == 'min_logit':
            return min_logit_target(logits, context.labels), None
        if self.settings['teacher'] == 'naive':
            weights = naive_weights(logits, context.labels)
        elif self.settings['teacher'] == 'linear':
            weights = linear_weights(logits, context.labels)
        else:
            shape = logits.shape[1], logits.shape[0]
            weights = jnp.broadcast_to(context.method_state['weights'][None], shape)
        return losses.ensemble_logits(logits, weights), weights

    def initial_state(self) -> Any:
        """Uniform weights [K] for 'general'; the other teachers keep nothing."""
        if not self.needs_validation:
            return None
        return {'weights': jnp.full(self.num_branches, 1 / self.num_branches, jnp.float32)}

    def held_out_sums(self, logits: jax.Array, labels: jax.Array, mask: jax.Array) -> Any:
        """The sums that make the error covariance; the arguments are those of `Method`.

        Returns:
          'products', [K, K], of the members' errors (probabilities less the one-hot label) with
          each other, summed over classes and examples; and the number of 'examples'.
        """
        errors = jax.nn.softmax(logits) - jax.nn.one_hot(labels, logits.shape[-1])[None]
        valid = mask.astype(bool)
        errors = jnp.where(valid[None, :, None], errors, 0)
        products = jnp.einsum('ibc,jbc->ij', errors, errors, precision=lax.Precision.HIGHEST)
        return {'products': products, 'examples': valid.sum()}

    def refresh(self, sums: Any) -> Any:
        covariance = np.asarray(sums['products'], np.float64) / np.asarray(sums['examples'])
        return {'weights': general_weights(covariance).astype(np.float32)}


def naive_weights(logits: jax.typing.ArrayLike, labels: jax.typing.ArrayLike) -> jax.Array:
    """1 for the member whose cross-entropy is least on the image, 0 for the others (section 3.2).

    Args:
      logits: [K, B, C].
      labels: [B], integers, or [B, C], target probabilities.

    Returns:
      [B, K].
    """
    logits = jnp.asarray(logits)
    best = losses.cross_entropy(logits, labels).argmin(axis=0)
    return jax.nn.one_hot(best, len(logits), dtype=logits.dtype)


def min_logit_target(logits: jax.typing.ArrayLike, labels: jax.typing.ArrayLike) -> jax.Array:
    """For each class, its logit less that of the true class, in the member where that is least.

        t[k] = min over i of (z_i[k] - z_i[y])

    No member gives the true class a higher probability than this teacher does. A mixed or smoothed
    label has no one true class: its most probable class counts as the true one.

    Args:
      logits: [K, B, C].
      labels: [B], integers, or [B, C], target probabilities.

    Returns:
      [B, C], 0 at the true class.
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    true_class = labels.argmax(axis=-1) if labels.ndim == 2 else labels
    indices = jnp.broadcast_to(true_class[None, :, None], (*logits.shape[:2], 1))
    return (logits - jnp.take_along_axis(logits, indices, axis=-1)).min(axis=0)


def linear_weights(logits: jax.typing.ArrayLike, labels: jax.typing.ArrayLike) -> jax.Array:
    """The convex weights whose sum of logits has the least cross-entropy, for each image alone.

    The problem is convex. It is solved by a barrier method (Boyd and Vandenberghe, Convex
    Optimization, section 11.3): a fixed number of Newton steps on the cross-entropy less a barrier
    times the sum of the weights' logarithms, with the barrier falling from step to step and an
    exact line search. The result is within K times the last barrier, 1e-5 nats, of the least value.

    Args:
      logits: [K, B, C], finite.
      labels: [B], integers, or [B, C], target probabilities.

    Returns:
      [B, K], above 0, with sum 1.
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    num_members, _, num_classes = logits.shape
    if labels.ndim == 1:
        labels = jax.nn.one_hot(labels, num_classes)
    labels = labels.astype(logits.dtype)
    barriers = jnp.asarray(BARRIERS, logits.dtype)

    def newton_step(index: jax.Array, weights: jax.Array) -> jax.Array:
        mixture = losses.ensemble_logits(logits, weights)
        relative = _newton_direction(logits, mixture, labels, weights, barriers[index])
        direction = losses.ensemble_logits(logits, weights * relative)
        step = _best_step(mixture, direction, labels, relative, barriers[index])
        weights = weights * (1 + step[:, None] * relative)
        return weights / weights.sum(axis=-1, keepdims=True)

    start = (naive_weights(logits, labels) + 1 / num_members) / 2
    return lax.fori_loop(0, len(BARRIERS), newton_step, start)


def _newton_direction(
    logits: jax.Array, mixture: jax.Array, labels: jax.Array, weights: jax.Array, barrier: jax.Array
) -> jax.Array:
    """The Newton direction relative to the weights, [B, K]: the weights change in proportion.

    The member with the largest weight gives what the others get, so that the weights' sum stays.
    In these coordinates the barrier's Hessian is near a multiple of the identity, and float32 is
    enough.
    """
    giver = jax.nn.one_hot(weights.argmax(axis=-1), len(logits), dtype=logits.dtype)
    share = (1 - giver) * weights / weights.max(axis=-1, keepdims=True)
    changes = weights.T[:, :, None] * (logits - losses.ensemble_logits(logits, giver)[None])
    probabilities = jax.nn.softmax(mixture)
    gradient = (changes * (probabilities - labels)[None]).sum(axis=-1).T
    gradient -= barrier * (1 - giver - share)
    # Deviations from the mean first: a difference of large second moments would not be positive.
    mean = (changes * probabilities[None]).sum(axis=-1, keepdims=True)
    deviations = (changes - mean) * jnp.sqrt(probabilities)[None]
    hessian = jnp.einsum('ibc,jbc->bij', deviations, deviations, precision=lax.Precision.HIGHEST)
    identity = jnp.eye(len(logits), dtype=logits.dtype)[None]
    hessian += barrier * (identity + share[:, :, None] * share[:, None, :])
    relative = -jnp.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
    return relative - giver * (share * relative).sum(axis=-1, keepdims=True)


def _best_step(
    mixture: jax.Array,
    direction: jax.Array,
    labels: jax.Array,
    relative: jax.Array,
    barrier: jax.Array,
) -> jax.Array:
    """The length of the Newton step with the least cross-entropy and barrier, by bisection.

    Args:
      mixture: logits at length 0, [B, C].
      direction: their change by a step of length 1, [B, C].
      labels: target probabilities, [B, C].
      relative: the change of each weight by a step of length 1 over the weight, [B, K].
      barrier: a scalar.

    Returns:
      [B], at least 0, at most 2, and such that no weight falls to 0.
    """

    def slope(step: jax.Array) -> jax.Array:
        step = step[:, None]
        residual = jax.nn.softmax(mixture + step * direction) - labels
        walls = barrier * (relative / (1 + step * relative)).sum(axis=-1)
        return (residual * direction).sum(axis=-1) - walls

    def halve(number: jax.Array, step: jax.Array) -> jax.Array:
        return step - jnp.sign(slope(step)) * most * 0.5 ** (number + 2)

    most = 0.999 / jnp.maximum(-relative.min(axis=-1), 0.5)
    return lax.fori_loop(0, HALVINGS, halve, most / 2)


def general_weights(covariance: np.ndarray) -> np.ndarray:
    """The weights, of sum 1, that make the expected squared error of the combination least.

        w = C^-1 1 / (1' C^-1 1)

    with C the covariance and `RIDGE` times the mean of its diagonal added to that diagonal.

    Args:
      covariance: of the members' errors, [K, K].

    Returns:
      [K]; uniform where no member makes any error.
    """
    num_members = len(covariance)
    scale = np.trace(covariance) / num_members
    if scale == 0:
        return np.full(num_members, 1 / num_members)
    regular = covariance / scale + RIDGE * np.eye(num_members)
    solution = np.linalg.solve(regular, np.ones(num_members))
    return solution / solution.sum()
