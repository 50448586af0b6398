"""OKDDip: its attention, its terms, and who learns from which of them."""

import functools

import jax
import numpy as np
import optax
import pytest
from method_fixtures import (
    BATCH,
    CLASSES,
    create,
    cross_entropy,
    gradient_norms,
    kl_divergence,
    random_labels,
    random_outputs,
    softmax,
)

from one_jax import methods
from one_jax.errors import ConfigError
from one_jax.models.attention import PeerAttention


def wide_outputs(num_branches=4):
    """Random outputs of features wide enough for two columns of queries and keys."""
    rng = np.random.default_rng(3)
    features = rng.normal(size=(num_branches, BATCH, 16))
    maps = rng.normal(size=(num_branches, BATCH, 2, 2, 16))
    return random_outputs(num_branches).replace(features=features, maps=maps)


def random_projections():
    rng = np.random.default_rng(1)
    return {name: {'kernel': rng.normal(size=(16, 2)) / 2} for name in ('query', 'key')}


@functools.cache
def _attention(num_peers):
    attention = PeerAttention(num_peers)
    return jax.jit(lambda params, members: attention.apply({'params': params}, None, members, True))


def attend(members, params=None, num_peers=3):
    return jax.device_get(_attention(num_peers)(params or random_projections(), members))


def with_targets(outputs):
    """The outputs as the network gives them, with the targets of the first three members."""
    aggregate = attend(outputs)
    return outputs.replace(
        teacher_logits=aggregate.teacher_logits, targets=aggregate.targets, extra=aggregate.extra
    )


def numpy_targets(params, features, logits):
    """Peer by peer and example by example, from the definition."""
    targets = np.zeros_like(logits)
    for example in range(logits.shape[1]):
        for peer, feature in enumerate(features[:, example]):
            query = feature @ params['query']['kernel']
            scores = [query @ (other @ params['key']['kernel']) for other in features[:, example]]
            weights = softmax(np.array(scores))
            for weight, other in zip(weights, logits[:, example], strict=True):
                targets[peer, example] += weight * other
    return targets


def gradient_flow(method, term):
    """Who gets gradient from a term, by the aggregator and the members' outputs alone.

    Compiled in a second, where `method_fixtures.gradient_norms` has the network around it.

    Args:
      method: of at least two members.
      term: function of (method, outputs, context) to a scalar.

    Returns:
      Norms: a list over the members, and a dictionary over the aggregator's modules.
    """
    outputs = wide_outputs(method.num_branches)
    aggregator = method.make_aggregator()
    variables = jax.jit(lambda key: aggregator.init(key, None, outputs, False))(jax.random.key(0))

    def scalar(params, arrays):
        members = outputs.replace(**arrays)
        aggregate, _ = aggregator.apply(
            {**variables, 'params': params}, None, members, True, mutable=['batch_stats']
        )
        given = ('teacher_logits', 'targets', 'extra')
        members = members.replace(**{name: getattr(aggregate, name) for name in given})
        kernels = np.random.default_rng(4).normal(size=(method.num_branches, 16, CLASSES))
        context = methods.Context(
            labels=random_labels(), params={'head': {'fc': {'kernel': kernels}}}
        )
        return term(method, members, context)

    arrays = {name: getattr(outputs, name) for name in ('logits', 'features', 'maps')}
    modules, members = jax.jit(jax.grad(scalar, argnums=(0, 1)))(variables['params'], arrays)
    by_member = [
        float(optax.tree.norm({name: array[member] for name, array in members.items()}))
        for member in range(method.num_branches)
    ]
    return by_member, {name: float(optax.tree.norm(tree)) for name, tree in modules.items()}


def term(name, index=None):
    """The term of that name as `gradient_norms` and `gradient_flow` want it, or an entry of it."""

    def scalar(method, outputs, context):
        value = method.loss(outputs, context)[1][name]
        return value.sum() if index is None else value[index]

    return scalar


def test_targets_are_the_attention_mixtures():
    outputs, params = wide_outputs(), random_projections()
    aggregate = attend(outputs, params)
    expected = numpy_targets(params, outputs.features[:3], outputs.logits[:3])
    np.testing.assert_allclose(aggregate.targets, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        aggregate.teacher_logits, outputs.logits[:3].mean(axis=0), rtol=1e-5, atol=1e-6
    )
    assert aggregate.extra.shape == (3, BATCH, 3)
    np.testing.assert_allclose(aggregate.extra.sum(axis=-1), 1, rtol=1e-5)
    # Queries and keys are told apart: exchanged, they give other targets.
    exchanged = {'query': params['key'], 'key': params['query']}
    assert np.abs(attend(outputs, exchanged).targets - expected).max() > 0.1


def test_the_projections_have_an_eighth_of_the_width_and_no_bias():
    members = random_outputs(4)
    members = members.replace(features=np.ones((4, BATCH, 64)))
    init = jax.jit(lambda key: PeerAttention(3).init(key, None, members, False))
    shapes = jax.tree.map(np.shape, init(jax.random.key(0)))
    assert shapes == {'params': {'query': {'kernel': (64, 8)}, 'key': {'kernel': (64, 8)}}}


def test_the_leader_is_in_no_target():
    outputs, params = wide_outputs(), random_projections()
    changed = outputs.replace(
        logits=np.concatenate([outputs.logits[:3], -5 * outputs.logits[3:]]),
        features=np.concatenate([outputs.features[:3], -5 * outputs.features[3:]]),
    )
    before, after = attend(outputs, params), attend(changed, params)
    np.testing.assert_array_equal(before.targets, after.targets)
    np.testing.assert_array_equal(before.teacher_logits, after.teacher_logits)
    # A peer is in all of them.
    changed = outputs.replace(logits=np.concatenate([-5 * outputs.logits[:1], outputs.logits[1:]]))
    after = attend(changed, params)
    assert (np.abs(before.targets - after.targets).max(axis=(1, 2)) > 0.01).all()


@pytest.mark.parametrize('progress', [0.1, 1.0])
def test_terms_and_loss(progress):
    method = create('okddip', leader_weight=2.0)
    outputs, labels = with_targets(wide_outputs()), random_labels()
    loss, terms = method.loss(outputs, methods.Context(labels, progress=progress))
    z, mixtures = outputs.logits, np.asarray(outputs.targets, np.float64)
    branch = [cross_entropy(logits, labels) for logits in z]
    peers = [kl_divergence(mixtures[a], z[a], 3.0) for a in range(3)]
    leader = kl_divergence(z[:3].mean(axis=0), z[3], 3.0)
    # 80 of 300 epochs.
    ramp = np.exp(-5 * (1 - min(progress * 300, 80) / 80) ** 2)
    np.testing.assert_allclose(terms['branch_cross_entropy'], branch, rtol=1e-5)
    np.testing.assert_allclose(terms['peer_distillation'], peers, rtol=1e-4)
    np.testing.assert_allclose(terms['leader_distillation'], leader, rtol=1e-5)
    np.testing.assert_allclose(terms['distill_weight'], ramp, rtol=1e-5)
    own = [outputs.extra[a, :, a].mean() for a in range(3)]
    np.testing.assert_allclose(terms['self_attention'], own, rtol=1e-5)
    np.testing.assert_allclose(loss, sum(branch) + ramp * (sum(peers) + 2 * leader), rtol=1e-5)


def test_without_a_leader_all_are_peers():
    method = create('okddip', leader=False, **{'model.num_branches': 3})
    assert (method.num_peers, method.deployed) == (3, 'branch 0')
    outputs, labels = with_targets(wide_outputs(3)), random_labels()
    loss, terms = method.loss(outputs, methods.Context(labels))
    assert 'leader_distillation' not in terms
    assert terms['peer_distillation'].shape == terms['branch_cross_entropy'].shape == (3,)
    expected = terms['branch_cross_entropy'].sum() + terms['peer_distillation'].sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_padding_changes_nothing_and_labels_may_be_probabilities():
    method = create('okddip')
    whole, labels = with_targets(wide_outputs()), random_labels()
    padded = whole.replace(
        logits=np.concatenate([whole.logits[:, :3], 9 * whole.logits[:, 3:]], axis=1),
        targets=np.concatenate([whole.targets[:, :3], 7 - whole.targets[:, 3:]], axis=1),
        teacher_logits=np.concatenate([whole.teacher_logits[:3], 7 - whole.teacher_logits[3:]]),
        extra=np.concatenate([whole.extra[:, :3], np.ones_like(whole.extra[:, 3:])], axis=1),
    )
    first_three = whole.replace(
        logits=whole.logits[:, :3],
        targets=whole.targets[:, :3],
        teacher_logits=whole.teacher_logits[:3],
        extra=whole.extra[:, :3],
    )
    expected = method.loss(first_three, methods.Context(labels[:3]))
    mask = np.array([1.0, 1.0, 1.0, 0.0])
    for masked_labels in (labels, np.eye(CLASSES)[labels]):
        actual = method.loss(padded, methods.Context(masked_labels, mask=mask))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), actual, expected)


def test_the_peers_divergence_teaches_the_attention_and_the_peers():
    norms = gradient_norms(term('peer_distillation'), 'okddip', 3)
    assert min(norms['trunk'], *norms['head'][:2]) > 0
    assert min(norms['aggregator/query'], norms['aggregator/key']) > 0
    assert norms['head'][2] == 0
    # Nothing is stopped: one peer's divergence pulls the peers that its target is made of.
    members, modules = gradient_flow(create('okddip'), term('peer_distillation', 0))
    assert min(*members[:3], *modules.values()) > 0
    assert members[3] == 0


def test_nothing_else_teaches_the_attention():
    members, modules = gradient_flow(create('okddip'), term('leader_distillation'))
    assert min(members) > 0
    assert modules == {'query': 0, 'key': 0}
    members, modules = gradient_flow(create('okddip'), term('branch_cross_entropy', 3))
    assert members[3] > 0
    assert members[:3] == [0, 0, 0]
    assert modules == {'query': 0, 'key': 0}


def test_detached_targets_teach_nobody():
    method = create('okddip', detach_targets=True)
    members, modules = gradient_flow(method, term('peer_distillation', 0))
    assert members[0] > 0
    assert members[1:] == [0, 0, 0]
    assert modules == {'query': 0, 'key': 0}
    members, _ = gradient_flow(method, term('leader_distillation'))
    assert members[3] > 0
    assert members[:3] == [0, 0, 0]


def test_whole_networks():
    settings = {'model.share_stages': 0, 'leader': False}
    norms = gradient_norms(term('peer_distillation', 0), 'okddip', 2, **settings)
    assert norms['trunk'] == 0
    assert min(*norms['head'], norms['aggregator/query'], norms['aggregator/key']) > 0


def test_what_is_deployed_and_how_many_members_there_are():
    method = create('okddip')
    assert (method.num_branches, method.num_peers) == (4, 3)
    assert (method.share_stages, method.deployed) == (2, 'branch 3')
    assert create('okddip', **{'model.num_branches': 6}).deployed == 'branch 5'


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'model.num_branches': 2}, r'model.num_branches=2 .*at least 3.*method.leader=False'),
        ({'model.num_branches': 1, 'leader': False}, r'model.num_branches=1 .*at least 2'),
        ({'model.members': 'resnet8,resnet8,resnet14'}, r'model.members=.*copies of one network'),
        ({'leader_weight': -1.0}, r'method.leader_weight=-1.0 .*at least 0'),
        ({'temperature': 0.0}, r'method.temperature=0.0 .*above 0'),
    ],
)
def test_errors(fields, message):
    with pytest.raises(ConfigError, match=message):
        create('okddip', **fields)
