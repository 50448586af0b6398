"""OKDDip: its attention, its terms and its leader."""

import jax
import numpy as np
import pytest
from method_fixtures import (
    BATCH,
    attend,
    create,
    cross_entropy,
    kl_divergence,
    numpy_targets,
    random_heads,
    random_labels,
    random_projections,
)

from one_jax import methods
from one_jax.errors import ConfigError
from one_jax.models.aggregators import PeerAttention
from one_jax.models.multibranch import Outputs


def test_targets_are_the_attention_mixtures():
    heads, params = random_heads(4, width=16), random_projections()
    aggregate = attend(heads)
    expected = numpy_targets(params, heads.features[:3], heads.logits[:3])
    np.testing.assert_allclose(aggregate.targets, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        aggregate.teacher_logits, heads.logits[:3].mean(axis=0), rtol=1e-5, atol=1e-6
    )
    assert aggregate.extra.shape == (3, BATCH, 3)
    np.testing.assert_allclose(aggregate.extra.sum(axis=-1), 1, rtol=1e-5)
    # Queries and keys differ: exchanged, they make other targets.
    exchanged = {'query': params['key'], 'key': params['query']}
    assert np.abs(attend(heads, exchanged).targets - expected).max() > 0.1


def test_projections_have_an_eighth_of_the_width_and_no_bias():
    heads = random_heads(4, width=64)
    init = jax.eval_shape(
        lambda key: PeerAttention(3).init(key, None, heads, False), jax.random.key(0)
    )
    shapes = jax.tree.map(lambda leaf: leaf.shape, init)
    assert shapes == {'params': {'query': {'kernel': (64, 8)}, 'key': {'kernel': (64, 8)}}}


def test_leader_is_part_of_no_target_and_a_peer_of_all():
    heads = random_heads(4, width=16)
    changed = heads.replace(
        logits=np.concatenate([heads.logits[:3], -5 * heads.logits[3:]]),
        features=np.concatenate([heads.features[:3], -5 * heads.features[3:]]),
    )
    before, after = attend(heads), attend(changed)
    np.testing.assert_array_equal(before.targets, after.targets)
    np.testing.assert_array_equal(before.teacher_logits, after.teacher_logits)
    changed = heads.replace(logits=np.concatenate([-5 * heads.logits[:1], heads.logits[1:]]))
    after = attend(changed)
    assert (np.abs(before.targets - after.targets).max(axis=(1, 2)) > 0.01).all()


@pytest.mark.parametrize('progress', [0.1, 1.0])
def test_loss_equals_the_formula(progress):
    method = create('okddip', leader_weight=2.0)
    heads, labels = random_heads(4, width=16), random_labels()
    aggregate = attend(heads)
    context = methods.Context(labels, progress=progress)
    loss, terms = method.loss(Outputs(heads, aggregate), context)
    z, mixtures = heads.logits, np.asarray(aggregate.targets, np.float64)
    branch = [cross_entropy(logits, labels) for logits in z]
    peers = [kl_divergence(mixtures[a], z[a], 3.0) for a in range(3)]
    leader = kl_divergence(z[:3].mean(axis=0), z[3], 3.0)
    # 80 of 300 epochs.
    ramp = np.exp(-5 * (1 - min(progress * 300, 80) / 80) ** 2)
    np.testing.assert_allclose(terms['branch_cross_entropy'], branch, rtol=1e-5)
    np.testing.assert_allclose(terms['peer_distillation'], peers, rtol=1e-4)
    np.testing.assert_allclose(terms['leader_distillation'], leader, rtol=1e-5)
    np.testing.assert_allclose(terms['distill_weight'], ramp, rtol=1e-5)
    own = [aggregate.extra[a, :, a].mean() for a in range(3)]
    np.testing.assert_allclose(terms['self_attention'], own, rtol=1e-5)
    np.testing.assert_allclose(loss, sum(branch) + ramp * (sum(peers) + 2 * leader), rtol=1e-5)


def test_without_a_leader_all_branches_are_peers():
    method = create('okddip', leader=False, **{'model.num_branches': 3})
    assert (method.num_peers, method.deployed) == (3, 'branch 0')
    heads, labels = random_heads(3, width=16), random_labels()
    loss, terms = method.loss(Outputs(heads, attend(heads)), methods.Context(labels))
    assert 'leader_distillation' not in terms
    assert terms['peer_distillation'].shape == terms['branch_cross_entropy'].shape == (3,)
    expected = terms['branch_cross_entropy'].sum() + terms['peer_distillation'].sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_leader_is_the_last_branch_and_deployed():
    method = create('okddip')
    assert (method.num_branches, method.num_peers) == (4, 3)
    assert (method.share_stages, method.deployed) == (2, 'branch 3')
    assert create('okddip', **{'model.num_branches': 6}).deployed == 'branch 5'


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'model.num_branches': 2}, r'model.num_branches=2 .*at least 3.*method.leader=False'),
        ({'model.num_branches': 1, 'leader': False}, r'model.num_branches=1 .*at least 2'),
        (
            {'model.branch_networks': 'resnet8,resnet8,resnet14'},
            r'model.branch_networks=.*copies of one network',
        ),
        ({'leader_weight': -1.0}, r'method.leader_weight=-1.0 .*at least 0'),
    ],
)
def test_field_with_a_wrong_value_is_an_error(fields, message):
    with pytest.raises(ConfigError, match=message):
        create('okddip', **fields)
