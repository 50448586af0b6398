"""The losses, as pure functions.

All computations are in at least float32: bfloat16 logits are cast up, float64 stays float64. Only
`batch_mean` averages over a batch, because it knows the mask of padded examples.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax


def _at_least_float32(values: jax.typing.ArrayLike) -> jax.Array:
    values = jnp.asarray(values)
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def cross_entropy(logits: jax.typing.ArrayLike, labels: jax.typing.ArrayLike) -> jax.Array:
    """Computes the cross-entropy of each prediction.

    Args:
      logits: [..., B, C].
      labels: [B] integers in [0, C), or [B, C] target probabilities (smoothed or mixed labels), for
        all leading dimensions.

    Returns:
      -log softmax(logits)[label] in nats, or its mean over the target's distribution, [..., B].
    """
    logits, labels = _at_least_float32(logits), jnp.asarray(labels)
    if labels.ndim == 2:
        chex.assert_equal_shape_suffix([logits, labels], 2)
        targets = jnp.broadcast_to(labels.astype(logits.dtype), logits.shape)
        return optax.softmax_cross_entropy(logits, targets)
    chex.assert_rank(labels, 1)
    chex.assert_axis_dimension(logits, -2, labels.shape[0])
    labels = jnp.broadcast_to(labels, logits.shape[:-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def kl_divergence(
    teacher_logits: jax.typing.ArrayLike,
    student_logits: jax.typing.ArrayLike,
    temperature: jax.typing.ArrayLike,
    epsilon: float = 0.0,
) -> jax.Array:
    """Computes the distillation loss T^2 KL(softmax(teacher / T) || softmax(student / T)).

    The factor T^2 keeps the size of the student's gradient similar at every temperature (Hinton,
    Vinyals, Dean 2015, section 2.1). Gradients flow to both sides: to stop the teacher's, the
    caller uses `lax.stop_gradient`.

    Args:
      teacher_logits: [..., B, C].
      student_logits: [..., B, C].
      temperature: T, a scalar above 0.
      epsilon: added to each of the teacher's probabilities, which then sum to 1 + C epsilon.

    Returns:
      The divergence in nats times T^2, [..., B].
    """
    teacher_logits = _at_least_float32(teacher_logits)
    student_logits = _at_least_float32(student_logits)
    chex.assert_equal_shape([teacher_logits, student_logits])
    student = jax.nn.log_softmax(student_logits / temperature)
    teacher = jax.nn.log_softmax(teacher_logits / temperature)
    if epsilon:
        teacher = jnp.log(jnp.exp(teacher) + epsilon)
    return temperature**2 * optax.losses.kl_divergence_with_log_targets(student, teacher)


def ensemble_logits(
    branch_logits: jax.typing.ArrayLike, weights: jax.typing.ArrayLike
) -> jax.Array:
    """Computes the weighted sum of the branches' logits, not probabilities (ONE, equation 5).

    Args:
      branch_logits: [K, B, C].
      weights: [B, K].

    Returns:
      [B, C].
    """
    branch_logits, weights = _at_least_float32(branch_logits), _at_least_float32(weights)
    num_branches, batch_size, _ = branch_logits.shape
    chex.assert_shape(weights, (batch_size, num_branches))
    # Not an einsum: accelerators would round the operands of a matrix product to bfloat16 or TF32.
    return jnp.sum(branch_logits * weights.T[:, :, None], axis=0)


def batch_mean(values: jax.typing.ArrayLike, mask: jax.typing.ArrayLike | None = None) -> jax.Array:
    """Computes the mean over the examples of a batch, without padding.

    Args:
      values: [..., B].
      mask: [B], 0 for padding and anything else for an example; None if there is no padding.

    Returns:
      [...]; 0 without any example.
    """
    values = _at_least_float32(values)
    if mask is None:
        return values.mean(axis=-1)
    chex.assert_shape(mask, values.shape[-1:])
    valid = jnp.asarray(mask).astype(bool)
    # `where` and not a product, which would pass on infinities and NaN from the padding.
    total = values.sum(axis=-1, where=jnp.broadcast_to(valid, values.shape))
    return total / jnp.maximum(valid.sum(), 1)


def one_loss(
    branch_logits: jax.typing.ArrayLike,
    teacher_logits: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    temperature: jax.typing.ArrayLike,
    distill_weight: jax.typing.ArrayLike,
    *,
    mask: jax.typing.ArrayLike | None = None,
    detach_teacher: bool = True,
    epsilon: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the loss of ONE (Lan, Zhu, Gong, NeurIPS 2018, equations 6 to 8).

        sum_i CE(branch_i) + CE(teacher) + distill_weight * T^2 sum_i KL(teacher || branch_i)

    Sums over branches, means over the batch.

    Args:
      branch_logits: [K, B, C].
      teacher_logits: [B, C].
      labels: [B] integers, or [B, C] target probabilities.
      temperature: T, a scalar above 0.
      distill_weight: a scalar (weight times ramp).
      mask: [B], 0 for padding, or None.
      detach_teacher: whether the teacher is a constant in the divergence, so that the gate learns
        from the teacher's cross-entropy alone; False is an ablation.
      epsilon: see `kl_divergence`.

    Returns:
      The scalar to minimise, and its unweighted terms: 'branch_cross_entropy' [K],
      'teacher_cross_entropy' (scalar), and 'distillation' [K] with T^2 applied.
    """
    chex.assert_rank([branch_logits, teacher_logits], [3, 2])
    target = jnp.asarray(teacher_logits)
    if detach_teacher:
        target = lax.stop_gradient(target)
    divergence = jax.vmap(functools.partial(kl_divergence, epsilon=epsilon), (None, 0, None))(
        target, jnp.asarray(branch_logits), temperature
    )
    terms = {
        'branch_cross_entropy': batch_mean(cross_entropy(branch_logits, labels), mask),
        'teacher_cross_entropy': batch_mean(cross_entropy(teacher_logits, labels), mask),
        'distillation': batch_mean(divergence, mask),
    }
    loss = (
        terms['branch_cross_entropy'].sum()
        + terms['teacher_cross_entropy']
        + distill_weight * terms['distillation'].sum()
    )
    return loss, terms


def sigmoid_rampup(epoch: jax.typing.ArrayLike, length: jax.typing.ArrayLike) -> jax.Array:
    """Computes the ramp exp(-5 (1 - epoch / length)^2), 1 from `length` on (Laine and Aila 2017).

    Args:
      epoch: completed epochs, any shape; or a fraction of training, if `length` is one too.
      length: the end of the ramp, a scalar; 0 is no ramp, a weight of 1 throughout.

    Returns:
      The weight in (0, 1], with the shape of `epoch`.
    """
    epoch, length = _at_least_float32(epoch), _at_least_float32(length)
    ramped = length > 0
    remaining = 1 - jnp.clip(epoch, 0, length) / jnp.where(ramped, length, 1)
    return jnp.where(ramped, jnp.exp(-5 * remaining**2), 1.0)
