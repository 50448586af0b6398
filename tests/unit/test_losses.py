"""The losses against the specification's numbers, closed forms, numpy and finite differences."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from one_jax import losses

# spec/one.md, section 4: two examples, three classes, three branches, T = 3.
LOGITS = np.array(
    [[[1, 2, 3], [0, 0, 0]], [[2, 0, 1], [1, -1, 0]], [[0, 1, 0], [-1, 2, 0.5]]], np.float32
)
GATE = np.array([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3]], np.float32)
TEACHER = np.array([[1.1, 1.2, 1.8], [0.2, 0.1, 0.15]], np.float32)
LABELS = np.array([2, 0])
TERMS = {
    'branch_cross_entropy': [0.753109, 0.907606, 2.396378],
    'teacher_cross_entropy': 0.882519,
    'distillation': [0.070845, 0.354324, 0.504729],
}


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


one_loss = jax.jit(losses.one_loss)
# ((loss, terms), gradients to the branches' and to the teacher's logits)
value_and_gradients = jax.jit(jax.value_and_grad(losses.one_loss, argnums=(0, 1), has_aux=True))


def random_case(num_branches=3, batch_size=5, num_classes=7, scale=2.0, seed=0):
    """Branch logits [K, B, C], teacher logits [B, C] and labels [B], in float64 numpy."""
    rng = np.random.default_rng(seed)
    return (
        scale * rng.normal(size=(num_branches, batch_size, num_classes)),
        scale * rng.normal(size=(batch_size, num_classes)),
        rng.integers(num_classes, size=batch_size),
    )


def numpy_softmax(logits):
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def numpy_one_loss(branch_logits, teacher_logits, labels, temperature, distill_weight):
    """The loss as section 4 writes it: probabilities first, one example at a time."""
    total = 0.0
    target = numpy_softmax(teacher_logits / temperature)
    for example, label in enumerate(labels):
        total -= np.log(numpy_softmax(teacher_logits[example])[label])
        for logits in branch_logits[:, example]:
            total -= np.log(numpy_softmax(logits)[label])
            softened = numpy_softmax(logits / temperature)
            divergence = np.sum(target[example] * np.log(target[example] / softened))
            total += distill_weight * temperature**2 * divergence
    return total / len(labels)


class SpecificationTest(chex.TestCase):
    """The fixture of the specification, with jit and without."""

    @chex.variants(with_jit=True, without_jit=True)
    def test_one_loss(self):
        loss, terms = self.variant(losses.one_loss)(LOGITS, TEACHER, LABELS, 3.0, 1.0)
        np.testing.assert_allclose(loss, 5.869510, atol=1e-5)
        assert set(terms) == set(TERMS)
        for name, expected in TERMS.items():
            np.testing.assert_allclose(terms[name], expected, atol=1e-5, err_msg=name)

    @chex.variants(with_jit=True, without_jit=True)
    def test_ensemble_logits(self):
        ensemble = self.variant(losses.ensemble_logits)(LOGITS, GATE)
        np.testing.assert_allclose(ensemble, TEACHER, atol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_rampup(self):
        rampup = self.variant(losses.sigmoid_rampup)
        epochs = np.array([0, 10, 20, 40, 60, 79])
        expected = [0.00674, 0.02175, 0.06005, 0.2865, 0.7316, 0.9992]
        np.testing.assert_allclose(rampup(epochs, 80), expected, rtol=1e-3)
        for epoch, weight in zip(epochs, expected, strict=True):
            np.testing.assert_allclose(rampup(int(epoch), 80), weight, rtol=1e-3)


def test_distill_weight_multiplies_only_the_divergence():
    loss, terms = one_loss(LOGITS, TEACHER, LABELS, 3.0, 0.25)
    np.testing.assert_allclose(loss, 4.939612 + 0.25 * terms['distillation'].sum(), atol=1e-5)


def test_rampup_is_one_from_its_length_on_and_without_length():
    np.testing.assert_array_equal(losses.sigmoid_rampup(np.array([80, 81, 300]), 80), 1.0)
    np.testing.assert_array_equal(losses.sigmoid_rampup(np.array([0, 1, 300]), 0), 1.0)
    # The same ramp in fractions of training.
    np.testing.assert_allclose(
        losses.sigmoid_rampup(40 / 300, 80 / 300), losses.sigmoid_rampup(40, 80), rtol=1e-6
    )
    # Also where the length is traced, and differentiated at 0.
    slope = jax.grad(losses.sigmoid_rampup, argnums=1)(3.0, 0.0)
    assert np.isfinite(slope)


def test_cross_entropy_closed_forms():
    uniform = jnp.full((2, 3, 4), 7.0)
    labels = jnp.array([0, 3, 1])
    np.testing.assert_allclose(losses.cross_entropy(uniform, labels), np.log(4), rtol=1e-6)
    # A margin m over C - 1 equal logits costs log(1 + (C - 1) exp(-m)).
    margin = 5.0
    logits = margin * jax.nn.one_hot(labels, 4)
    expected = np.log1p(3 * np.exp(-margin))
    np.testing.assert_allclose(losses.cross_entropy(logits, labels), expected, rtol=1e-5)


def test_kl_divergence_closed_forms():
    logits = jnp.array([[1.0, -2.0, 0.5]])
    np.testing.assert_allclose(losses.kl_divergence(logits, logits, 3.0), 0, atol=1e-6)
    # A constant added to the logits is no difference.
    np.testing.assert_allclose(losses.kl_divergence(logits, logits + 9, 3.0), 0, atol=1e-5)
    # From a target p to the uniform distribution: log C minus the entropy of p.
    target = np.array([[0.7, 0.2, 0.1]])
    expected = np.log(3) + np.sum(target * np.log(target))
    temperature = 2.5
    divergence = losses.kl_divergence(temperature * np.log(target), np.zeros((1, 3)), temperature)
    np.testing.assert_allclose(divergence, temperature**2 * expected, rtol=1e-5)
    # An epsilon is added to p, without a normalisation of the sum.
    added = target + 1e-3
    expected = (added * np.log(3 * added)).sum()
    divergence = losses.kl_divergence(np.log(target), np.zeros((1, 3)), 1.0, epsilon=1e-3)
    np.testing.assert_allclose(divergence, expected, rtol=1e-5)
    # The divergence is not symmetric.
    backwards = losses.kl_divergence(np.zeros((1, 3)), temperature * np.log(target), temperature)
    expected = -np.log(3) - np.mean(np.log(target))
    np.testing.assert_allclose(backwards, temperature**2 * expected, rtol=1e-5)


@pytest.mark.parametrize('temperature', [1.0, 3.0, 10.0])
@pytest.mark.parametrize('num_branches', [1, 4])
def test_one_loss_against_numpy(float64, num_branches, temperature):
    branch, teacher, labels = random_case(num_branches)
    loss, terms = one_loss(branch, teacher, labels, temperature, 0.7)
    expected = numpy_one_loss(branch, teacher, labels, temperature, 0.7)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    assert loss.dtype == jnp.float64
    chex.assert_shape(terms['branch_cross_entropy'], (num_branches,))
    chex.assert_shape(terms['distillation'], (num_branches,))
    single, _ = one_loss(
        branch.astype(np.float32), teacher.astype(np.float32), labels, temperature, 0.7
    )
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, expected, rtol=1e-5)


def test_gradients_against_finite_differences(float64):
    branch, teacher, labels = random_case()
    weights = numpy_softmax(np.random.default_rng(1).normal(size=(5, 3)))
    mask = np.array([1, 1, 0, 1, 1])
    check_grads(
        jax.jit(lambda x: losses.cross_entropy(x, labels)), (branch,), order=1, modes=['rev']
    )
    # To both sides and the temperature: stopping the teacher's gradient is the caller's policy.
    check_grads(jax.jit(losses.kl_divergence), (teacher, branch[0], 3.0), order=1, modes=['rev'])
    check_grads(jax.jit(losses.ensemble_logits), (branch, weights), order=1, modes=['rev'])
    check_grads(
        jax.jit(lambda x: losses.batch_mean(x, mask)), (branch[..., 0],), order=1, modes=['rev']
    )
    check_grads(
        jax.jit(lambda x, weight: losses.one_loss(x, teacher, labels, 3.0, weight, mask=mask)[0]),
        (branch, 0.6),
        order=1,
        modes=['rev'],
    )


def test_gradient_of_divergence_in_closed_form(float64):
    (student,), teacher, _ = random_case(num_branches=1)
    temperature = 3.0

    def mean_divergence(teacher, student):
        return losses.batch_mean(losses.kl_divergence(teacher, student, temperature))

    gradient = jax.grad(mean_divergence, argnums=1)(teacher, student)
    difference = numpy_softmax(student / temperature) - numpy_softmax(teacher / temperature)
    np.testing.assert_allclose(gradient, temperature * difference / len(student), atol=1e-14)


def test_one_loss_gradient_stops_at_the_teacher(float64):
    branch, teacher, labels = random_case()

    @jax.jit
    def cross_entropy_alone(logits):
        return losses.batch_mean(losses.cross_entropy(logits, labels)).sum()

    _, (branch_gradient, teacher_gradient) = value_and_gradients(branch, teacher, labels, 3.0, 2.0)
    # The teacher learns from the labels alone, whatever the weight of the distillation.
    np.testing.assert_allclose(teacher_gradient, jax.grad(cross_entropy_alone)(teacher), atol=1e-15)
    # A branch gets its labels' gradient and the pull towards the teacher.
    pull = numpy_softmax(branch / 3.0) - numpy_softmax(teacher / 3.0)
    expected = jax.grad(cross_entropy_alone)(branch) + 2.0 * 3.0 * pull / len(labels)
    np.testing.assert_allclose(branch_gradient, expected, atol=1e-14)


def test_gate_learns_from_the_teachers_cross_entropy_alone(float64):
    branch, _, labels = random_case()
    scores = np.random.default_rng(2).normal(size=(5, 3))

    @jax.jit
    def loss(scores, weight):
        teacher = losses.ensemble_logits(branch, jax.nn.softmax(scores))
        return losses.one_loss(branch, teacher, labels, 3.0, weight)[0]

    @jax.jit
    def teacher_alone(scores):
        teacher = losses.ensemble_logits(branch, jax.nn.softmax(scores))
        return losses.batch_mean(losses.cross_entropy(teacher, labels))

    expected = jax.grad(teacher_alone)(scores)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(jax.grad(loss)(scores, 5.0), expected, atol=1e-15)


@pytest.mark.parametrize('garbage', [0.0, 1e4, -1e30])
@pytest.mark.parametrize('dtype', [np.bool_, np.int32, np.float32])
def test_one_loss_with_padding_equals_one_loss_without(garbage, dtype):
    branch, teacher, labels = (x.astype(np.float32) for x in random_case())
    labels = labels.astype(np.int32)
    padded = (
        np.concatenate([branch, np.full((3, 2, 7), garbage, np.float32)], axis=1),
        np.concatenate([teacher, np.full((2, 7), -garbage, np.float32)]),
        # A label outside the classes too.
        np.concatenate([labels, [0, 10**6]]).astype(np.int32),
    )
    padded[0][:, -1, 0] *= -1
    mask = np.array([1, 1, 1, 1, 1, 0, 0], dtype)

    (expected, expected_terms), expected_gradients = value_and_gradients(
        branch, teacher, labels, 3.0, 0.5
    )
    (loss, terms), gradients = value_and_gradients(*padded, 3.0, 0.5, mask=mask)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    chex.assert_trees_all_close(terms, expected_terms, rtol=1e-5)
    for gradient, unpadded in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient[..., :5, :], unpadded, atol=1e-7)
        np.testing.assert_array_equal(gradient[..., 5:, :], 0)


def test_one_loss_of_a_batch_without_examples_is_zero():
    mask = np.zeros(2)
    everything = value_and_gradients(LOGITS, TEACHER, LABELS, 3.0, 1.0, mask=mask)
    for value in jax.tree.leaves(everything):
        np.testing.assert_array_equal(value, 0)


def test_batch_mean():
    values = np.array([[1.0, 2.0, 6.0], [4.0, np.nan, 8.0]], np.float32)
    np.testing.assert_allclose(losses.batch_mean(values[0]), 3.0)
    np.testing.assert_allclose(losses.batch_mean(values, np.array([1, 0, 1])), [3.5, 6.0])
    with pytest.raises(AssertionError, match='shape'):
        losses.batch_mean(values, np.ones(2))


def test_kl_divergence_at_high_temperature_matches_centred_logits(float64):
    (student,), teacher, _ = random_case(num_branches=1)
    difference = student - teacher
    difference -= difference.mean(axis=-1, keepdims=True)
    limit = np.sum(difference**2, axis=-1) / (2 * student.shape[-1])
    np.testing.assert_allclose(losses.kl_divergence(teacher, student, 1e4), limit, rtol=1e-3)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_one_loss_of_extreme_logits_is_finite(dtype):
    branch = jnp.array([[[1e4, -1e4, 0]], [[-1e4, 1e4, 1e4]]], dtype)
    teacher = jnp.array([[-1e4, 0, 1e4]], dtype)
    labels = jnp.array([1])

    for temperature in (0.1, 1.0, 3.0):
        (value, terms), gradients = value_and_gradients(branch, teacher, labels, temperature, 1.0)
        chex.assert_tree_all_finite((value, terms, gradients))
        # The wrong class by 20,000 nats, and half of a tie.
        np.testing.assert_allclose(terms['branch_cross_entropy'], [2e4, np.log(2)], rtol=0.01)
    backwards = jax.grad(jax.jit(lambda t: losses.kl_divergence(t, branch[0], 1.0).sum()))(teacher)
    chex.assert_tree_all_finite(backwards)


def test_bfloat16_logits_are_cast_up():
    branch, teacher, labels = random_case(scale=4.0)
    branch, teacher = jnp.asarray(branch, jnp.bfloat16), jnp.asarray(teacher, jnp.bfloat16)
    loss, terms = one_loss(branch, teacher, labels, 3.0, 1.0)
    assert {x.dtype for x in jax.tree.leaves((loss, terms))} == {jnp.dtype(jnp.float32)}
    expected = numpy_one_loss(
        np.asarray(branch, np.float64), np.asarray(teacher, np.float64), labels, 3.0, 1.0
    )
    # Only the input is rounded: computed in bfloat16 this would be off by a per cent.
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    weights = jnp.full((5, 3), 1 / 3, jnp.float32)
    np.testing.assert_allclose(
        losses.ensemble_logits(branch, weights), np.asarray(branch, np.float32).mean(0), atol=1e-5
    )


def test_one_loss_is_invariant_to_the_order_of_branches():
    branch, teacher, labels = (np.asarray(x, np.float32) for x in random_case(num_branches=4))
    labels, order = labels.astype(np.int32), np.array([2, 0, 3, 1])
    loss, terms = one_loss(branch, teacher, labels, 3.0, 1.0)
    permuted_loss, permuted = one_loss(branch[order], teacher, labels, 3.0, 1.0)
    np.testing.assert_allclose(permuted_loss, loss, rtol=1e-6)
    for name in ('branch_cross_entropy', 'distillation'):
        np.testing.assert_array_equal(permuted[name], terms[name][order])
    weights = np.asarray(numpy_softmax(np.random.default_rng(3).normal(size=(5, 4))), np.float32)
    np.testing.assert_allclose(
        losses.ensemble_logits(branch[order], weights[:, order]),
        losses.ensemble_logits(branch, weights),
        atol=1e-6,
    )


def test_one_loss_of_a_branch_that_is_its_own_teacher():
    branch, _, labels = random_case(num_branches=1)
    teacher = losses.ensemble_logits(branch, np.ones((5, 1)))
    loss, terms = one_loss(branch, teacher, labels, 3.0, 1.0)
    np.testing.assert_allclose(terms['distillation'], 0, atol=1e-6)
    np.testing.assert_allclose(loss, 2 * terms['teacher_cross_entropy'], rtol=1e-6)


@pytest.mark.parametrize(
    'wrong',
    [
        lambda: losses.cross_entropy(LOGITS, LABELS[:1]),
        lambda: losses.cross_entropy(LOGITS, np.stack([LABELS] * 3)),
        lambda: losses.kl_divergence(TEACHER, LOGITS, 3.0),
        lambda: losses.ensemble_logits(LOGITS, GATE[:, :2]),
        lambda: losses.one_loss(LOGITS[0], TEACHER, LABELS, 3.0, 1.0),
    ],
)
def test_wrong_shapes_are_errors(wrong):
    with pytest.raises(AssertionError):
        wrong()
