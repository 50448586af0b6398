"""The CIFAR ResNets: exact sizes, the cut into trunk and head, the branched network, its gate."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from network_fixtures import abstract_variables, branched, init

from one_jax import config as config_lib
from one_jax import models
from one_jax.errors import ConfigError
from one_jax.models import aggregators, convolution, cost, multibranch
from one_jax.models.backbone import HeadOutputs

IMAGE_SHAPE = (32, 32, 3)


def predict(network, variables, images):
    return jax.jit(lambda v, x: network.apply(v, x, train=False))(variables, images)


def train(network, variables, images):
    """Outputs and the variables with updated statistics."""
    outputs, updated = jax.jit(
        lambda v, x: network.apply(v, x, train=True, mutable=['batch_stats'])
    )(variables, images)
    return outputs, {**variables, **updated}


# Exact arithmetic of the specification: classes, plain, trunk, three branches with their gate.
PARAMETERS = [
    ('resnet32', 10, 466_906, 112_592, 1_175_639),
    ('resnet32', 100, 472_756, 112_592, 1_193_189),
    ('resnet110_bottleneck', 100, 1_727_284, 409_296, 4_363_653),
    ('resnet110', 10, 1_730_714, 414_608, 4_363_031),
    ('resnet110_bottleneck12', 10, 1_147_738, 275_280, None),
]


@pytest.mark.parametrize(('name', 'num_classes', 'plain', 'trunk', 'branches'), PARAMETERS)
def test_parameters_equal_the_specification(name, num_classes, plain, trunk, branches):
    make_backbone = models.make_backbone(name, num_classes)

    def count(network):
        return cost.count_parameters(abstract_variables(network, IMAGE_SHAPE)['params'])

    assert count(make_backbone()) == plain
    assert count(make_backbone(end=2)) == trunk
    assert branches in (None, count(branched(name, num_classes)))


# The cost column of the ONE paper, in 1e8 FLOPs; K = 1 is the plain network.
@pytest.mark.parametrize(
    ('name', 'costs'),
    [
        ('resnet32', [1.383, 1.834, 2.285, 2.736, 3.187]),
        ('resnet110_bottleneck', [4.953, None, 8.289]),
        ('resnet110', [5.063]),
    ],
)
def test_flops_equal_the_papers_cost_column(name, costs):
    for num_branches, expected in enumerate(costs, start=1):
        if expected is None:
            continue
        network = models.make_backbone(name, 100)()
        if num_branches > 1:
            network = branched(name, 100, num_branches)
        flops = cost.forward_cost(network, IMAGE_SHAPE)[1]
        assert flops / 1e8 == pytest.approx(expected, abs=5e-4)


def test_flops_of_dense_and_grouped_branches_are_equal():
    dense, grouped = (
        cost.forward_cost(branched('resnet8', branch_conv=form), IMAGE_SHAPE)
        for form in ('dense', 'grouped')
    )
    assert dense == grouped


@pytest.mark.parametrize('form', ['grouped', 'as on TPU'])
def test_dense_and_other_branches_have_equal_gradients(monkeypatch, form):
    images = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
    results = []
    for branch_conv in ('dense', 'grouped' if form == 'grouped' else 'auto'):
        monkeypatch.setattr(convolution, 'runs_on_tpu', lambda auto=branch_conv == 'auto': auto)
        network = branched('resnet8', branch_conv=branch_conv)
        variables = init(network, images)

        def loss(params, network=network, variables=variables):
            outputs, _ = network.apply(
                {**variables, 'params': params}, images, train=True, mutable=['batch_stats']
            )
            return (outputs.teacher_logits**2).mean() + (outputs.logits**3).mean()

        results.append(jax.jit(jax.value_and_grad(loss))(variables['params']))
    chex.assert_trees_all_close(*results, rtol=1e-3, atol=1e-5)


def test_one_branch_without_aggregator_equals_the_plain_network():
    make_backbone = models.make_backbone('resnet8', 10)
    network = multibranch.MultiBranch((make_backbone,), num_branches=1, share_stages=2)
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    variables = init(network, images)
    assert set(variables['params']) == {'trunk', 'head'}
    outputs = predict(network, variables, images)
    assert outputs.teacher_logits is None
    assert outputs.aggregate.weights is None
    plain = make_backbone()
    alone = predict(plain, multibranch.student_variables(variables, 0), images)
    np.testing.assert_allclose(outputs.logits[0], alone.logits, rtol=1e-6)


def test_gate_reproduces_the_specifications_weights():
    """Scores after batch normalisation of the fixture give its weights, and they mix the logits."""
    scores = np.array([[1, -1, 0.5], [-2, 0, 2]])
    weights = np.array([[0.506480, 0.186324, 0.307196], [0.106507, 0.106507, 0.786986]])
    gate = aggregators.Gate(3)
    logits = jax.random.normal(jax.random.key(0), (3, 2, 4))
    heads = HeadOutputs(logits, features=None, maps=None)
    # A map whose pooled value is the score, an identity as the linear layer, and running statistics
    # that change nothing.
    shared = jnp.asarray(scores)[:, None, None, :] * jnp.asarray([0.5, 1.5]).reshape(1, 2, 1, 1)
    variables = {
        'params': {
            'linear': {'kernel': jnp.eye(3), 'bias': jnp.zeros(3)},
            'bn': {'scale': jnp.ones(3), 'bias': jnp.zeros(3)},
        },
        'batch_stats': {'bn': {'mean': jnp.zeros(3), 'var': jnp.full(3, 1 - 1e-5)}},
    }
    aggregate = gate.apply(variables, shared, heads, train=False)
    np.testing.assert_allclose(aggregate.weights, weights, atol=1e-6)
    expected = np.einsum('bk,kbc->bc', weights, logits)
    np.testing.assert_allclose(aggregate.teacher_logits, expected, atol=1e-5)


def test_gate_in_training_normalises_scores_over_the_batch():
    gate = aggregators.Gate(3)
    shared = jax.random.normal(jax.random.key(0), (16, 4, 4, 8))
    heads = HeadOutputs(jnp.zeros((3, 16, 5)), features=None, maps=None)
    variables = gate.init(jax.random.key(1), shared, heads, train=False)
    aggregate, _ = gate.apply(variables, shared, heads, train=True, mutable=['batch_stats'])
    params = jax.tree.map(np.asarray, variables['params']['linear'])
    scores = np.asarray(shared).mean(axis=(1, 2)) @ params['kernel'] + params['bias']
    scores = (scores - scores.mean(0)) / np.sqrt(scores.var(0) + 1e-5)
    exponentials = np.exp(np.maximum(scores, 0))
    expected = exponentials / exponentials.sum(1, keepdims=True)
    np.testing.assert_allclose(aggregate.weights, expected, rtol=1e-4)
    np.testing.assert_allclose(aggregate.weights.sum(1), 1, rtol=1e-6)


def test_bfloat16_network_keeps_parameters_and_logits_in_float32():
    network = branched('resnet8', dtype=jnp.bfloat16)
    images = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
    outputs, variables = train(network, init(network, images), images)
    for leaf in jax.tree.leaves((variables, outputs.logits, outputs.teacher_logits)):
        assert leaf.dtype == jnp.float32
    assert outputs.heads.maps.dtype == jnp.bfloat16
    exact = predict(branched('resnet8'), variables, images)
    rough = predict(network, variables, images)
    np.testing.assert_allclose(rough.logits, exact.logits, atol=0.1)


def test_remat_keeps_gradients_and_stores_less():
    images = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    results, stored = {}, {}
    for mode in ('none', 'convolutions', 'blocks'):
        network = models.make_backbone('resnet8', 10, jnp.float64, remat=mode)()

        def loss(params, rest, network=network):
            outputs, updated = network.apply(
                {'params': params, **rest}, images, train=True, mutable=['batch_stats']
            )
            return jnp.square(outputs.logits).sum(), updated

        with jax.enable_x64(True):
            if mode == 'none':
                variables = init(network, images)
                params = variables.pop('params')
            results[mode] = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, variables)
            # A vjp function is a tree of what is stored for the backward pass.
            backward = jax.eval_shape(lambda p, v, f=loss: jax.vjp(f, p, v)[1], params, variables)
            stored[mode] = sum(leaf.size for leaf in jax.tree.leaves(backward))
            stored[mode] -= sum(leaf.size for leaf in jax.tree.leaves(params))
    for mode in ('convolutions', 'blocks'):
        chex.assert_trees_all_close(results[mode], results['none'], rtol=1e-9, atol=1e-9)
    assert stored['blocks'] < stored['convolutions'] < 0.9 * stored['none']


def test_remat_without_blocks_is_an_error():
    config = config_lib.default_config()
    config.update_from_flattened_dict(
        {'model.name': 'vgg6_tiny', 'model.remat': 'blocks', 'method.name': 'plain'}
    )
    config.data.generated_examples = 256
    with pytest.raises(ConfigError, match=r"model\.remat='blocks' is not allowed: 'none'"):
        config_lib.validate(config)
