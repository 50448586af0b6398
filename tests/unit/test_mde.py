"""MDE as reconstructed: its fusion modules, the diversity of its classifiers, OKDDip within it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_fixtures import (
    BATCH,
    CLASSES,
    attend,
    create,
    numpy_targets,
    random_heads,
    random_labels,
    random_projections,
    softmax,
)

from one_jax import methods
from one_jax.errors import ConfigError
from one_jax.methods.mde import classifier_diversity
from one_jax.models.aggregators import AttentionFusion, SelectiveFusion
from one_jax.models.multibranch import Outputs

SIDES_AND_NORMS = [(s, n) for s in ('class', 'feature') for n in ('fro2', 'fro')]
SIDES_AND_NORMS += [('class', 'cosine')]


def random_kernels(num_branches=4, width=16):
    return np.random.default_rng(7).normal(size=(num_branches, width, CLASSES))


def context(kernels):
    return methods.Context(random_labels(), params={'head': {'fc': {'kernel': kernels}}})


@functools.cache
def _fuse(form):
    fusion = form(num_peers=3)
    return jax.jit(
        lambda variables, heads: fusion.apply(
            variables, None, heads, True, mutable=['batch_stats']
        )[0]
    )


def fuse(form, params, heads):
    """The aggregate in training mode, with given parameters."""
    statistics = {'batch_stats': {'bn': {'mean': np.zeros(16), 'var': np.ones(16)}}}
    return jax.device_get(_fuse(form)({'params': params, **statistics}, heads))


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
    heads, params = random_heads(4, width=16), random_fusion_params()
    # Peers side by side along the channels, a matrix at every pixel, batch norm, ReLU, pooling.
    side_by_side = np.concatenate([heads.maps[0], heads.maps[1], heads.maps[2]], axis=-1)
    fused = side_by_side @ params['conv']['kernel'][0, 0]
    mean, variance = fused.mean(axis=(0, 1, 2)), fused.var(axis=(0, 1, 2))
    fused = (fused - mean) / np.sqrt(variance + 1e-5) * params['bn']['scale'] + params['bn']['bias']
    fused = np.maximum(fused, 0).mean(axis=(1, 2))
    expected = numpy_targets(params, heads.features[:3] + fused, heads.logits[:3])
    aggregate = fuse(AttentionFusion, params, heads)
    np.testing.assert_allclose(aggregate.targets, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        aggregate.teacher_logits, heads.logits[:3].mean(axis=0), rtol=1e-5, atol=1e-6
    )
    # Without the fused feature it is OKDDip's attention, with other targets.
    plain = attend(heads)
    assert np.abs(plain.targets - expected).max() > 0.1
    without = fuse(AttentionFusion, random_fusion_params(scale=0.0), heads)
    np.testing.assert_array_equal(without.targets, plain.targets)
    np.testing.assert_array_equal(without.extra, plain.extra)


def test_selective_fusion_weights_the_peers_for_each_class():
    heads, params = random_heads(4, width=16), random_selection_params()
    pooled = heads.maps[:3].sum(axis=0).mean(axis=(1, 2))
    reduced = pooled @ params['reduce']['kernel']
    # W_a, the columns of peer a.
    by_peer = np.split(params['select']['kernel'], 3, axis=1)
    weights = softmax(np.stack([reduced @ kernel for kernel in by_peer], axis=-1))
    target = sum(weights[..., a] * heads.logits[a] for a in range(3))
    aggregate = fuse(SelectiveFusion, params, heads)
    assert aggregate.targets.shape == (3, BATCH, CLASSES)
    for peer_target in aggregate.targets:
        np.testing.assert_allclose(peer_target, target, rtol=1e-4, atol=1e-5)
    assert np.abs(target - heads.logits[:3].mean(axis=0)).max() > 0.1


def test_selective_fusion_starts_near_the_mean_of_the_peers():
    heads = random_heads(4, width=16)
    mean = heads.logits[:3].mean(axis=0)
    for peer_target in fuse(SelectiveFusion, random_selection_params(scale=0.0), heads).targets:
        np.testing.assert_allclose(peer_target, mean, rtol=1e-5, atol=1e-6)
    # Not at zero itself, from which `reduce` could not learn.
    fusion = SelectiveFusion(num_peers=3)
    init = jax.jit(lambda key: fusion.init_with_output(key, None, heads, True))
    aggregate, variables = init(jax.random.key(0))
    np.testing.assert_allclose(aggregate.targets[0], mean, atol=0.02)
    assert np.abs(variables['params']['select']['kernel']).min() > 0


@pytest.mark.parametrize(
    ('form', 'params'),
    [(AttentionFusion, random_fusion_params()), (SelectiveFusion, random_selection_params())],
)
def test_fusion_uses_the_maps_of_all_peers_and_not_the_leaders(form, params):
    heads = random_heads(4, width=16)
    changed = jax.tree.map(lambda x: np.concatenate([x[:3], 9 - x[3:]]), heads)
    before, after = fuse(form, params, heads), fuse(form, params, changed)
    np.testing.assert_array_equal(before.targets, after.targets)
    np.testing.assert_array_equal(before.teacher_logits, after.teacher_logits)
    for peer in range(3):
        changed = heads.replace(maps=heads.maps.copy())
        changed.maps[peer] *= np.linspace(-2, 2, 16)
        assert np.abs(fuse(form, params, changed).targets - before.targets).max() > 1e-3


def numpy_diversity(kernels, side, norm):
    """Entry by entry: inner products of class vectors (columns) or of features (rows)."""
    total = 0.0
    for a in range(len(kernels)):
        for b in range(a + 1, len(kernels)):
            first, second = kernels[a], kernels[b]
            first, second = (first.T, second.T) if side == 'class' else (first, second)
            products = [np.dot(v, w) for v in first for w in second]
            if norm == 'cosine':
                lengths = [np.linalg.norm(v) * np.linalg.norm(w) for v in first for w in second]
                products = np.divide(products, lengths)
            size = np.sum(np.square(products))
            total += np.sqrt(size) if norm == 'fro' else size
    return total


@pytest.mark.parametrize(('side', 'norm'), SIDES_AND_NORMS)
def test_classifier_diversity_equals_the_formula(side, norm):
    kernels = random_kernels()
    actual = jax.jit(functools.partial(classifier_diversity, side=side, norm=norm))(kernels)
    np.testing.assert_allclose(actual, numpy_diversity(kernels, side, norm), rtol=1e-5)


@pytest.mark.parametrize('norm', ['fro2', 'fro', 'cosine'])
def test_classifier_diversity_of_orthogonal_classifiers_is_0_with_gradient_0(norm):
    """Each class of each classifier uses its own feature."""
    kernels = np.zeros((3, 3 * CLASSES, CLASSES))
    for branch, kernel in enumerate(kernels):
        kernel[branch * CLASSES : (branch + 1) * CLASSES] = (branch + 1) * np.eye(CLASSES)
    diversity = functools.partial(classifier_diversity, side='class', norm=norm)
    value, gradient = jax.jit(jax.value_and_grad(diversity))(kernels)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    # The Frobenius norm itself has no derivative there.
    np.testing.assert_array_equal(gradient, 0)


def test_classifier_diversity_depends_on_the_side():
    # Two classifiers that use different features, in the same direction of classes.
    first = np.array([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    kernels = np.stack([first, np.roll(first, 1, axis=0)])
    # Class vectors (1, 0, 0) twice against (0, 1, 0) twice: orthogonal.
    assert classifier_diversity(kernels, 'class', 'fro2') == 0
    # Feature 0 of the first and feature 1 of the second have (1, 1): one product, 2.
    assert classifier_diversity(kernels, 'feature', 'fro2') == 4
    assert classifier_diversity(kernels, 'feature', 'fro') == 2


def test_loss_is_okddips_plus_the_peers_diversity():
    heads, kernels = random_heads(4, width=16), random_kernels()
    outputs = Outputs(heads, fuse(AttentionFusion, random_fusion_params(), heads))
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
    # Without a leader, all classifiers are in pairs.
    method = create('mde', leader=False, **{'model.num_branches': 3})
    heads = random_heads(3, width=16)
    outputs = Outputs(heads, fuse(AttentionFusion, random_fusion_params(), heads))
    _, terms = method.loss(outputs, context(kernels[:3]))
    np.testing.assert_allclose(terms['classifier_diversity'], diversity, rtol=1e-5)


def test_mde_without_fusion_and_diversity_is_okddip():
    heads, kernels = random_heads(4, width=16), random_kernels()

    def loss_and_gradients(method):
        aggregator = method.make_aggregator()
        params = aggregator.init(jax.random.key(0), None, heads, False)['params']

        def scalar(params, logits, features, kernels):
            changed = heads.replace(logits=logits, features=features)
            aggregate = aggregator.apply({'params': params}, None, changed, True)
            return method.loss(Outputs(changed, aggregate), context(kernels))[0]

        arguments = params, jnp.asarray(heads.logits), jnp.asarray(heads.features), kernels
        return params, jax.value_and_grad(scalar, argnums=(0, 1, 2, 3))(*arguments)

    okddip, mde = create('okddip'), create('mde', fusion='none', diversity_weight=0.0)
    expected, actual = (jax.jit(functools.partial(loss_and_gradients, m))() for m in (okddip, mde))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    for name in ('branch_networks', 'share_stages', 'deployed', 'num_peers', 'recipe'):
        assert getattr(mde, name) == getattr(okddip, name)


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
def test_field_with_a_wrong_value_is_an_error(fields, message):
    with pytest.raises(ConfigError, match=message):
        create('mde', **fields)
