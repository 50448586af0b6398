"""MDE as reconstructed: its fusion modules, the diversity of its classifiers, and OKDDip in it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_fixtures import (
    BATCH,
    CLASSES,
    create,
    gradient_norms,
    kl_divergence,
    random_labels,
    softmax,
)
from test_okddip import attend, gradient_flow, numpy_targets, random_projections, term, wide_outputs

from one_jax import methods
from one_jax.errors import ConfigError
from one_jax.methods.mde import classifier_diversity
from one_jax.models.fusion import AttentionFusion, SelectiveFusion


def random_kernels(num_branches=4, width=16):
    return np.random.default_rng(7).normal(size=(num_branches, width, CLASSES))


def orthogonal_kernels(num_branches=3):
    """Classifiers whose classes are features of their own: all inner products of vectors are 0."""
    kernels = np.zeros((num_branches, num_branches * CLASSES, CLASSES))
    for branch, kernel in enumerate(kernels):
        kernel[branch * CLASSES : (branch + 1) * CLASSES] = (branch + 1) * np.eye(CLASSES)
    return kernels


def context(kernels, **fields):
    params = {'head': {'fc': {'kernel': kernels}}}
    return methods.Context(random_labels(), params=params, **fields)


@functools.cache
def _fuse(form):
    fusion = form(num_peers=3)
    return jax.jit(
        lambda variables, members: fusion.apply(
            variables, None, members, True, mutable=['batch_stats']
        )[0]
    )


def fuse(form, params, members):
    """The aggregate in training mode, from given parameters."""
    statistics = {'batch_stats': {'bn': {'mean': np.zeros(16), 'var': np.ones(16)}}}
    return jax.device_get(_fuse(form)({'params': params, **statistics}, members))


def random_fusion_params(scale=1.0):
    rng = np.random.default_rng(11)
    return {
        **random_projections(),
        'conv': {'kernel': rng.normal(size=(1, 1, 48, 16)) / 7},
        'bn': {'scale': scale * rng.normal(size=16), 'bias': scale * rng.normal(size=16)},
    }


def random_selection_params(scale=1.0):
    rng = np.random.default_rng(13)
    return {
        'reduce': {'kernel': rng.normal(size=(16, 4)) / 2},
        'select': {'kernel': scale * rng.normal(size=(4, 3 * CLASSES)) / 2},
    }


def test_attention_fusion_adds_one_fused_feature_to_all_peers():
    outputs, params = wide_outputs(), random_fusion_params()
    # Peers side by side along the channels, a matrix at every pixel, batch norm, ReLU, pooling.
    side_by_side = np.concatenate([outputs.maps[0], outputs.maps[1], outputs.maps[2]], axis=-1)
    fused = side_by_side @ params['conv']['kernel'][0, 0]
    mean, variance = fused.mean(axis=(0, 1, 2)), fused.var(axis=(0, 1, 2))
    fused = (fused - mean) / np.sqrt(variance + 1e-5) * params['bn']['scale'] + params['bn']['bias']
    fused = np.maximum(fused, 0).mean(axis=(1, 2))
    expected = numpy_targets(params, outputs.features[:3] + fused, outputs.logits[:3])
    aggregate = fuse(AttentionFusion, params, outputs)
    np.testing.assert_allclose(aggregate.targets, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        aggregate.teacher_logits, outputs.logits[:3].mean(axis=0), rtol=1e-5, atol=1e-6
    )
    # The fused feature matters: OKDDip's targets are others.
    assert np.abs(attend(outputs, random_projections()).targets - expected).max() > 0.1


def test_attention_fusion_of_nothing_is_okddip():
    outputs = wide_outputs()
    fused = fuse(AttentionFusion, random_fusion_params(scale=0.0), outputs)
    plain = attend(outputs, random_projections())
    np.testing.assert_array_equal(fused.targets, plain.targets)
    np.testing.assert_array_equal(fused.extra, plain.extra)


def test_selective_fusion_weighs_the_peers_class_by_class():
    outputs, params = wide_outputs(), random_selection_params()
    pooled = outputs.maps[:3].sum(axis=0).mean(axis=(1, 2))
    reduced = pooled @ params['reduce']['kernel']
    # W_a, the columns of peer a.
    by_peer = np.split(params['select']['kernel'], 3, axis=1)
    scores = np.stack([reduced @ kernel for kernel in by_peer], axis=-1)
    weights = softmax(scores)
    target = sum(weights[..., a] * outputs.logits[a] for a in range(3))
    aggregate = fuse(SelectiveFusion, params, outputs)
    assert aggregate.targets.shape == (3, BATCH, CLASSES)
    for peer_target in aggregate.targets:
        np.testing.assert_allclose(peer_target, target, rtol=1e-4, atol=1e-5)
    assert np.abs(target - outputs.logits[:3].mean(axis=0)).max() > 0.1


def test_selective_fusion_near_zero_is_the_mean():
    outputs = wide_outputs()
    mean = outputs.logits[:3].mean(axis=0)
    for peer_target in fuse(SelectiveFusion, random_selection_params(scale=0.0), outputs).targets:
        np.testing.assert_allclose(peer_target, mean, rtol=1e-5, atol=1e-6)
    # And that is where it starts, though not at zero itself, from which `reduce` could not learn.
    fusion = SelectiveFusion(num_peers=3)
    init = jax.jit(lambda key: fusion.init_with_output(key, None, outputs, True))
    aggregate, variables = init(jax.random.key(0))
    np.testing.assert_allclose(aggregate.targets[0], mean, atol=0.02)
    assert np.abs(variables['params']['select']['kernel']).min() > 0


@pytest.mark.parametrize(
    ('form', 'params'),
    [(AttentionFusion, random_fusion_params()), (SelectiveFusion, random_selection_params())],
)
def test_the_leader_is_in_no_target(form, params):
    outputs = wide_outputs()
    changed = jax.tree.map(lambda x: np.concatenate([x[:3], 9 - x[3:]]), outputs)
    before, after = fuse(form, params, outputs), fuse(form, params, changed)
    np.testing.assert_array_equal(before.targets, after.targets)
    np.testing.assert_array_equal(before.teacher_logits, after.teacher_logits)
    # The maps of every peer matter.
    for peer in range(3):
        changed = outputs.replace(maps=outputs.maps.copy())
        changed.maps[peer] *= np.linspace(-2, 2, 16)
        assert np.abs(fuse(form, params, changed).targets - before.targets).max() > 1e-3


def numpy_diversity(kernels, side, norm):
    """Entry by entry: inner products of class vectors (columns) or of features (rows)."""
    total = 0.0
    for a in range(len(kernels)):
        for b in range(a + 1, len(kernels)):
            first, second = kernels[a], kernels[b]
            vectors = (first.T, second.T) if side == 'class' else (first, second)
            products = [np.dot(v, w) for v in vectors[0] for w in vectors[1]]
            if norm == 'cosine':
                lengths = [
                    np.linalg.norm(v) * np.linalg.norm(w) for v in vectors[0] for w in vectors[1]
                ]
                products = np.divide(products, lengths)
            assert len(products) == (CLASSES if side == 'class' else kernels.shape[1]) ** 2
            size = np.sum(np.square(products))
            total += np.sqrt(size) if norm == 'fro' else size
    return total


CASES = [(s, n) for s in ('class', 'feature') for n in ('fro2', 'fro')] + [('class', 'cosine')]


@pytest.mark.parametrize(('side', 'norm'), CASES)
def test_classifier_diversity(side, norm):
    kernels = random_kernels()
    actual = jax.jit(functools.partial(classifier_diversity, side=side, norm=norm))(kernels)
    np.testing.assert_allclose(actual, numpy_diversity(kernels, side, norm), rtol=1e-5)


@pytest.mark.parametrize(('side', 'norm'), [case for case in CASES if case[0] == 'class'])
def test_orthogonal_classifiers_overlap_in_nothing(side, norm):
    diversity = functools.partial(classifier_diversity, side=side, norm=norm)
    value, gradient = jax.jit(jax.value_and_grad(diversity))(orthogonal_kernels())
    np.testing.assert_allclose(value, 0, atol=1e-6)
    # Finite, and 0: the Frobenius norm itself has no derivative there.
    np.testing.assert_array_equal(gradient, 0)


def test_the_two_sides_are_not_the_same():
    # Two classifiers that look at features of their own, in the same direction of classes.
    first = np.array([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    kernels = np.stack([first, np.roll(first, 1, axis=0)])
    # Class vectors (1, 0, 0) twice against (0, 1, 0) twice: orthogonal.
    assert classifier_diversity(kernels, 'class', 'fro2') == 0
    # Feature 0 of the one and feature 1 of the other both speak for (1, 1): one product, 2.
    assert classifier_diversity(kernels, 'feature', 'fro2') == 4
    assert classifier_diversity(kernels, 'feature', 'fro') == 2
    for side, norm in [('feature', 'cosine'), ('both', 'fro'), ('class', 'max')]:
        with pytest.raises(ValueError, match=f"side='{side}' with norm='{norm}'"):
            classifier_diversity(kernels, side, norm)


def as_network_gives(outputs, form=AttentionFusion, params=None):
    aggregate = fuse(form, params or random_fusion_params(), outputs)
    return outputs.replace(
        teacher_logits=aggregate.teacher_logits, targets=aggregate.targets, extra=aggregate.extra
    )


def test_loss_is_that_of_okddip_and_the_peers_diversity():
    outputs, kernels = as_network_gives(wide_outputs()), random_kernels()
    loss, terms = create('mde', diversity_weight=0.01).loss(outputs, context(kernels))
    okddip_loss, okddip_terms = create('okddip').loss(outputs, context(kernels))
    for name, value in okddip_terms.items():
        np.testing.assert_array_equal(terms[name], value)
    # The leader's classifier, the last, is in no pair.
    diversity = numpy_diversity(kernels[:3], 'class', 'fro2')
    np.testing.assert_allclose(terms['classifier_diversity'], diversity, rtol=1e-5)
    np.testing.assert_allclose(loss, okddip_loss + 0.01 * diversity, rtol=1e-5)
    # d/dA of the sum over pairs of |A^T B|^2 is 2 (sum over the others of B B^T) A.
    grams = [kernel @ kernel.T for kernel in kernels[:3]]
    gradient = [2 * (sum(grams) - grams[a]) @ kernels[a] for a in range(3)]
    ratio = 0.01 * np.linalg.norm(gradient) / np.linalg.norm(kernels[:3])
    np.testing.assert_allclose(terms['diversity_gradient_ratio'], ratio, rtol=1e-5)


def test_one_target_for_all_is_no_attention_and_is_masked():
    outputs = as_network_gives(wide_outputs(), SelectiveFusion, random_selection_params())
    mask, kernels = np.array([1.0, 1.0, 0.0, 1.0]), random_kernels()
    _, terms = create('mde', fusion='selective').loss(outputs, context(kernels, mask=mask))
    assert 'self_attention' not in terms
    kept = np.flatnonzero(mask)
    target = np.asarray(outputs.targets, np.float64)[0, kept]
    expected = [kl_divergence(target, logits[kept], 3.0) for logits in outputs.logits[:3]]
    np.testing.assert_allclose(terms['peer_distillation'], expected, rtol=1e-4)
    # Classifiers have no padding.
    diversity = numpy_diversity(kernels[:3], 'class', 'fro2')
    np.testing.assert_allclose(terms['classifier_diversity'], diversity, rtol=1e-5)


def test_without_fusion_and_diversity_it_is_okddip():
    outputs, kernels = wide_outputs(), random_kernels()

    def loss_and_gradients(method):
        aggregator = method.make_aggregator()
        params = aggregator.init(jax.random.key(0), None, outputs, False)['params']

        def scalar(params, logits, features, kernels):
            members = outputs.replace(logits=logits, features=features)
            aggregate = aggregator.apply({'params': params}, None, members, True)
            given = ('teacher_logits', 'targets', 'extra')
            members = members.replace(**{name: getattr(aggregate, name) for name in given})
            return method.loss(members, context(kernels))[0]

        arguments = params, jnp.asarray(outputs.logits), jnp.asarray(outputs.features), kernels
        return params, jax.value_and_grad(scalar, argnums=(0, 1, 2, 3))(*arguments)

    okddip, mde = create('okddip'), create('mde', fusion='none', diversity_weight=0.0)
    expected, actual = (jax.jit(functools.partial(loss_and_gradients, m))() for m in (okddip, mde))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    for name in ('members', 'share_stages', 'deployed', 'num_peers'):
        assert getattr(mde, name) == getattr(okddip, name)


@pytest.mark.parametrize(
    ('fusion', 'modules'), [('attention', {'conv', 'bn'}), ('selective', {'reduce', 'select'})]
)
def test_the_fusion_learns_from_the_peers_divergence_alone(fusion, modules):
    method = create('mde', fusion=fusion)
    members, norms = gradient_flow(method, term('peer_distillation'))
    assert min(norms[module] for module in modules) > 0
    assert min(members[:3]) > 0
    assert members[3] == 0
    for name in ('branch_cross_entropy', 'leader_distillation', 'classifier_diversity'):
        _, norms = gradient_flow(method, term(name))
        assert norms.keys() >= modules
        assert set(norms.values()) == {0}
    _, norms = gradient_flow(create('mde', fusion=fusion, detach_targets=True), _loss)
    assert set(norms.values()) == {0}


def _loss(method, outputs, context):
    return method.loss(outputs, context)[0]


def test_the_fusion_learns_in_the_network_too():
    norms = gradient_norms(term('peer_distillation'), 'mde', 3)
    modules = [norms[f'aggregator/{name}'] for name in ('conv', 'bn', 'query', 'key')]
    assert min(norms['trunk'], *norms['head'][:2], *modules) > 0
    assert norms['head'][2] == 0


def test_the_diversity_pulls_the_peers_classifiers_alone():
    method, kernels = create('mde'), random_kernels()
    outputs = as_network_gives(wide_outputs())
    gradient = jax.jit(
        jax.grad(lambda k: method.loss(outputs, context(k))[1]['classifier_diversity'])
    )(kernels)
    norms = np.linalg.norm(gradient, axis=(1, 2))
    assert min(norms[:3]) > 0
    assert norms[3] == 0
    # All are peers where there is no leader, and then all are in pairs.
    method = create('mde', leader=False, **{'model.num_branches': 3})
    outputs = as_network_gives(wide_outputs(3))
    _, terms = method.loss(outputs, context(kernels[:3]))
    expected = numpy_diversity(kernels[:3], 'class', 'fro2')
    np.testing.assert_allclose(terms['classifier_diversity'], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'fusion': 'sum'}, r"method.fusion='sum' .*'attention', 'selective', 'none'"),
        ({'diversity_weight': -1.0}, r'method.diversity_weight=-1.0 .*at least 0'),
        ({'diversity_side': 'rows'}, r"method.diversity_side='rows' .*'class', 'feature'"),
        ({'diversity_norm': 'l1'}, r"method.diversity_norm='l1' .*'fro2', 'fro', 'cosine'"),
        (
            {'diversity_side': 'feature', 'diversity_norm': 'cosine'},
            r"method.diversity_side='feature' .*'class' with method.diversity_norm='cosine'",
        ),
        ({'model.num_branches': 2}, r'model.num_branches=2 .*at least 3'),
    ],
)
def test_errors(fields, message):
    with pytest.raises(ConfigError, match=message):
        create('mde', **fields)
