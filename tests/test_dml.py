"""DML: its terms, the symmetry of two members, targets that are constants, unlike members."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_fixtures import (
    BATCH,
    create,
    cross_entropy,
    gradient_norms,
    kl_divergence,
    random_labels,
    random_outputs,
    softmax,
)
from test_train import make_config

from one_jax import methods, train
from one_jax.errors import ConfigError


def test_terms_against_the_formula():
    outputs, labels = random_outputs(3), random_labels()
    method = create('dml', distill_weight=0.5, **{'model.num_branches': 3})
    loss, terms = method.loss(outputs, methods.Context(labels, progress=0.0))
    z = outputs.logits
    divergences = [
        sum(kl_divergence(z[j], z[i], 1.0) for j in range(3) if j != i) / 2 for i in range(3)
    ]
    entropies = [cross_entropy(logits, labels) for logits in z]
    np.testing.assert_allclose(terms['distillation'], divergences, rtol=1e-4)
    np.testing.assert_allclose(terms['branch_cross_entropy'], entropies, rtol=1e-5)
    assert float(terms['distill_weight']) == 0.5
    assert float(loss) == pytest.approx(sum(entropies) + 0.5 * sum(divergences), rel=1e-4)


def test_two_members_are_symmetric():
    """Exchanged members have exchanged terms and gradients, and the same loss."""
    method, context = create('dml'), methods.Context(random_labels())

    @jax.jit
    def evaluate(logits):
        def loss(logits):
            return method.loss(random_outputs(2).replace(logits=logits), context)

        return jax.value_and_grad(loss, has_aux=True)(logits)

    logits = jnp.asarray(random_outputs(2).logits)
    (loss, terms), gradient = evaluate(logits)
    (exchanged_loss, exchanged_terms), exchanged_gradient = evaluate(logits[::-1])
    assert float(loss) == pytest.approx(float(exchanged_loss), rel=1e-6)
    for name in ('branch_cross_entropy', 'distillation'):
        np.testing.assert_allclose(terms[name], exchanged_terms[name][::-1], rtol=1e-6)
        assert abs(float(terms[name][0] - terms[name][1])) > 1e-3
    np.testing.assert_allclose(gradient, exchanged_gradient[::-1], rtol=1e-5, atol=1e-7)


def test_a_member_is_pulled_and_does_not_pull_back():
    """The gradient of the divergence is (p_i - mean of the others' p) / B at T = 1."""
    method = create('dml', **{'model.num_branches': 3})
    outputs = random_outputs(3)

    def divergence(logits):
        context = methods.Context(random_labels())
        return method.loss(outputs.replace(logits=logits), context)[1]['distillation'][0]

    gradient = jax.grad(divergence)(jnp.asarray(outputs.logits))
    p = softmax(outputs.logits)
    np.testing.assert_allclose(gradient[0], (p[0] - (p[1] + p[2]) / 2) / BATCH, atol=1e-6)
    np.testing.assert_array_equal(gradient[1:], 0)


def test_who_gets_gradient_in_a_network():
    def distillation(method, outputs, context):
        return method.loss(outputs, context)[1]['distillation'][0]

    norms = gradient_norms(distillation, 'dml', 2)
    assert norms['trunk'] == norms['head'][1] == 0
    assert norms['head'][0] > 0


def test_padding_is_left_out():
    outputs, labels, method = random_outputs(2), random_labels(), create('dml')
    padded = outputs.replace(logits=outputs.logits.copy())
    padded.logits[:, 2] = 1e30
    loss, _ = method.loss(padded, methods.Context(labels, np.array([1, 1, 0, 1])))
    whole = outputs.replace(logits=np.delete(outputs.logits, 2, axis=1))
    expected, _ = method.loss(whole, methods.Context(np.delete(labels, 2)))
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_members_are_whole_networks():
    assert create('dml').share_stages == 0
    assert create('dml').num_branches == 2
    with pytest.raises(ConfigError, match=r'model.share_stages=2 is not allowed'):
        create('dml', **{'model.share_stages': 2})
    with pytest.raises(ConfigError, match=r'model.num_branches=1 is not allowed'):
        create('dml', **{'model.num_branches': 1})


def test_unlike_members_learn_from_each_other(tmp_path):
    result = train.train_and_evaluate(
        make_config(
            **{
                'method.name': 'dml',
                'model.num_branches': None,
                'model.members': 'resnet8,wrn10_1',
                'data.generated_examples': 32,
                'train.epochs': 1,
            }
        ),
        tmp_path,
    )
    assert result['branch_network'] == ['resnet8', 'wrn10_1']
    assert len(result['branch_top1']) == 2
    assert np.isfinite(result['branch_nll']).all()
