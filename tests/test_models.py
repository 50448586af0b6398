"""The networks: exact sizes, the cut into trunk and head, the branched network and its gate."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from one_jax import config as config_lib
from one_jax import device_memory, models
from one_jax.errors import ConfigError
from one_jax.models import aggregators, cost, multibranch
from one_jax.models.backbone import HeadOutputs

IMAGE_SHAPE = (32, 32, 3)


def branched(name, num_classes=10, num_branches=3, share_stages=2, **kwargs):
    return multibranch.MultiBranch(
        (models.make_backbone(name, num_classes, **kwargs),),
        num_branches,
        share_stages,
        make_aggregator=functools.partial(aggregators.Gate, num_branches),
    )


def init(network, images):
    """Compiled, which is faster than hundreds of single operations."""
    return jax.jit(lambda x: network.init(jax.random.key(0), x, train=False))(images)


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
def test_parameter_counts(name, num_classes, plain, trunk, branches):
    make_backbone = models.make_backbone(name, num_classes)
    assert cost.forward_cost(make_backbone(), IMAGE_SHAPE)[0] == plain
    images = jax.ShapeDtypeStruct((1, *IMAGE_SHAPE), jnp.float32)
    trunk_variables = jax.eval_shape(
        lambda x: make_backbone(end=2).init(jax.random.key(0), x, False), images
    )
    assert cost.count_parameters(trunk_variables['params']) == trunk
    if branches:
        assert cost.forward_cost(branched(name, num_classes), IMAGE_SHAPE)[0] == branches


# The cost column of the ONE paper, in 1e8 FLOPs; K = 1 is the plain network.
@pytest.mark.parametrize(
    ('name', 'costs'),
    [
        ('resnet32', [1.383, 1.834, 2.285, 2.736, 3.187]),
        ('resnet110_bottleneck', [4.953, None, 8.289]),
        ('resnet110', [5.063, None, 8.419]),
    ],
)
def test_flops(name, costs):
    for num_branches, expected in enumerate(costs, start=1):
        if expected is None:
            continue
        network = models.make_backbone(name, 100)()
        if num_branches > 1:
            network = branched(name, 100, num_branches)
        flops = cost.forward_cost(network, IMAGE_SHAPE)[1]
        assert flops / 1e8 == pytest.approx(expected, abs=5e-4)


def test_flops_do_not_depend_on_the_form_of_the_branches():
    dense, grouped = (
        cost.forward_cost(branched('resnet8', branch_conv=form), IMAGE_SHAPE)
        for form in ('dense', 'grouped')
    )
    assert dense == grouped


@pytest.mark.parametrize('share_stages', [0, 1, 2])
@pytest.mark.parametrize('name', ['resnet8', 'resnet11_bottleneck'])
def test_a_branch_is_the_plain_network(name, share_stages):
    """The export's promise: trunk + head i, as variables of the plain network, is branch i."""
    network = branched(name, share_stages=share_stages)
    images = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
    # Running statistics away from their start, so that they count too.
    _, variables = train(network, init(network, images), images)
    outputs = predict(network, variables, images)
    plain = models.make_backbone(name, 10)()
    template = jax.eval_shape(lambda: plain.init(jax.random.key(0), images, train=False))
    for branch in range(3):
        student = multibranch.student_variables(variables, branch)
        chex.assert_trees_all_equal_shapes_and_dtypes(student, template)
        alone = predict(plain, student, images)
        chex.assert_trees_all_close(alone.logits, outputs.logits[branch], rtol=1e-5, atol=1e-5)
        chex.assert_trees_all_close(alone.features, outputs.features[branch], rtol=1e-5, atol=1e-5)
    # Heads start apart, or there is nothing to learn from each other.
    assert jnp.abs(outputs.logits[0] - outputs.logits[1]).max() > 1e-3


def test_dense_and_grouped_branches_have_equal_outputs_and_gradients():
    images = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
    results = []
    for form in ('dense', 'grouped'):
        network = branched('resnet8', branch_conv=form)
        variables = init(network, images)

        def loss(params, network=network, variables=variables):
            outputs, _ = network.apply(
                {**variables, 'params': params}, images, train=True, mutable=['batch_stats']
            )
            return (outputs.teacher_logits**2).mean() + (outputs.logits**3).mean()

        results.append(jax.jit(jax.value_and_grad(loss))(variables['params']))
    chex.assert_trees_all_close(*results, rtol=1e-3, atol=1e-5)


def test_one_branch_without_aggregator_is_the_plain_network():
    make_backbone = models.make_backbone('resnet8', 10)
    network = multibranch.MultiBranch((make_backbone,), num_branches=1, share_stages=2)
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    variables = init(network, images)
    assert set(variables['params']) == {'trunk', 'head'}
    outputs = predict(network, variables, images)
    assert outputs.teacher_logits is None
    assert outputs.weights is None
    plain = make_backbone()
    alone = predict(plain, multibranch.student_variables(variables, 0), images)
    np.testing.assert_allclose(outputs.logits[0], alone.logits, rtol=1e-6)


def test_gate_on_the_fixture_of_the_specification():
    """Scores after batch normalisation of the fixture give its weights, and they mix the logits."""
    scores = np.array([[1, -1, 0.5], [-2, 0, 2]])
    weights = np.array([[0.506480, 0.186324, 0.307196], [0.106507, 0.106507, 0.786986]])
    gate = aggregators.Gate(3)
    logits = jax.random.normal(jax.random.key(0), (3, 2, 4))
    members = HeadOutputs(logits, features=None, maps=None)
    # A map whose pooled value is the score, an identity as the linear layer, and running statistics
    # that leave it as it is.
    shared = jnp.asarray(scores)[:, None, None, :] * jnp.asarray([0.5, 1.5]).reshape(1, 2, 1, 1)
    variables = {
        'params': {
            'linear': {'kernel': jnp.eye(3), 'bias': jnp.zeros(3)},
            'bn': {'scale': jnp.ones(3), 'bias': jnp.zeros(3)},
        },
        'batch_stats': {'bn': {'mean': jnp.zeros(3), 'var': jnp.full(3, 1 - 1e-5)}},
    }
    aggregate = gate.apply(variables, shared, members, train=False)
    np.testing.assert_allclose(aggregate.weights, weights, atol=1e-6)
    expected = np.einsum('bk,kbc->bc', weights, logits)
    np.testing.assert_allclose(aggregate.teacher_logits, expected, atol=1e-5)


def test_gate_normalises_scores_over_the_batch_in_training():
    gate = aggregators.Gate(3)
    shared = jax.random.normal(jax.random.key(0), (16, 4, 4, 8))
    members = HeadOutputs(jnp.zeros((3, 16, 5)), features=None, maps=None)
    variables = gate.init(jax.random.key(1), shared, members, train=False)
    aggregate, _ = gate.apply(variables, shared, members, train=True, mutable=['batch_stats'])
    params = jax.tree.map(np.asarray, variables['params']['linear'])
    scores = np.asarray(shared).mean(axis=(1, 2)) @ params['kernel'] + params['bias']
    scores = (scores - scores.mean(0)) / np.sqrt(scores.var(0) + 1e-5)
    exponentials = np.exp(np.maximum(scores, 0))
    expected = exponentials / exponentials.sum(1, keepdims=True)
    np.testing.assert_allclose(aggregate.weights, expected, rtol=1e-4)
    np.testing.assert_allclose(aggregate.weights.sum(1), 1, rtol=1e-6)


def test_bfloat16_keeps_parameters_statistics_and_logits_in_float32():
    network = branched('resnet8', dtype=jnp.bfloat16)
    images = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
    outputs, variables = train(network, init(network, images), images)
    for leaf in jax.tree.leaves((variables, outputs.logits, outputs.teacher_logits)):
        assert leaf.dtype == jnp.float32
    assert outputs.maps.dtype == jnp.bfloat16
    exact = predict(branched('resnet8'), variables, images)
    rough = predict(network, variables, images)
    np.testing.assert_allclose(rough.logits, exact.logits, atol=0.1)


@pytest.mark.parametrize('name', ['resnet152', 'resnet33', 'resnet2', 'vgg', 'resnet08'])
def test_unknown_networks_are_named(name):
    with pytest.raises(ConfigError, match=f"model.name='{name}' is not allowed: one of resnet11"):
        models.network(name)


@pytest.mark.parametrize('name', ['resnet14', 'densenet16_4'])
def test_what_is_not_kept_is_computed_again(name):
    """Equal losses, gradients and statistics, of arrays of the same names; and less is kept."""
    images = jax.random.normal(jax.random.key(0), (32, 16, 16, 3))
    results, kept = {}, {}
    for keep in ('all', 'convolutions', 'blocks'):
        network = models.make_backbone(name, 10, jnp.float64, keep_activations=keep)()

        def loss(params, rest, network=network):
            outputs, updated = network.apply(
                {'params': params, **rest}, images, train=True, mutable=['batch_stats']
            )
            return jnp.square(outputs.logits).sum(), updated

        with jax.enable_x64(True):
            variables = jax.jit(lambda n=network: n.init(jax.random.key(1), images, train=False))()
            params = variables.pop('params')
            step = jax.value_and_grad(loss, has_aux=True)
            results[keep] = jax.jit(step)(params, variables)
            kept[keep] = device_memory.peak_bytes(jax.make_jaxpr(step)(params, variables).jaxpr)
    for keep in ('convolutions', 'blocks'):
        chex.assert_trees_all_close(results[keep], results['all'], rtol=1e-9, atol=1e-9)
    assert kept['blocks'] < kept['convolutions'] < 0.9 * kept['all']


def test_a_network_without_blocks_keeps_all():
    config = config_lib.default_config()
    config.update_from_flattened_dict(
        {'model.name': 'vgg6_tiny', 'model.keep_activations': 'blocks', 'method.name': 'plain'}
    )
    config.data.generated_examples = 256
    with pytest.raises(ConfigError, match="keep_activations='blocks' is not allowed: 'all'"):
        config_lib.validate(config)
