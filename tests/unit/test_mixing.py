"""Mixup and CutMix, and the cross-entropy of the soft labels they make."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from one_jax import config as config_lib
from one_jax import losses
from one_jax.data import augment


def test_cross_entropy_of_soft_labels_is_their_weighted_mean():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(3, 4, 5)).astype(np.float32)
    targets = generator.dirichlet(np.ones(5), size=4).astype(np.float32)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.einsum('bc,kbc->kb', targets, log_probabilities)
    np.testing.assert_allclose(losses.cross_entropy(logits, targets), expected, rtol=1e-5)
    labels = np.array([1, 4, 0, 2])
    hard = losses.cross_entropy(logits, labels)
    np.testing.assert_allclose(losses.cross_entropy(logits, np.eye(5)[labels]), hard, rtol=1e-5)


def test_mixup_returns_a_convex_combination():
    images, partners = jnp.ones((2, 4, 4, 3)), jnp.zeros((2, 4, 4, 3))
    ratios = []
    for seed in range(50):
        mixed, ratio = augment.mix(jax.random.key(seed), images, partners, 0.4, 0.0)
        np.testing.assert_allclose(mixed, ratio, rtol=1e-5)
        ratios.append(float(ratio))
    # Beta(0.4, 0.4) has the mean 1/2 and the standard deviation 0.373.
    assert abs(np.mean(ratios) - 0.5) < 3 * 0.373 / 50**0.5
    assert np.std(ratios) > 0.25


def test_cutmix_pastes_a_box_whose_area_is_the_ratio():
    images, partners = jnp.ones((1, 16, 12, 3)), jnp.zeros((1, 16, 12, 3))
    ratios = []
    for seed in range(50):
        mixed, ratio = augment.mix(jax.random.key(seed), images, partners, 0.0, 1.0)
        assert float(ratio) == pytest.approx(float(mixed.mean()), abs=1e-6)
        rows, columns = np.nonzero(np.asarray(mixed[0, :, :, 0]) == 0)
        if len(rows):
            height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
            assert len(rows) == height * width
        ratios.append(float(ratio))
    assert min(ratios) < 0.4
    assert max(ratios) > 0.9


@pytest.mark.parametrize('alpha', [1e-12, 1e-3, 1.0, 999.0])
def test_mix_at_the_ends_of_alpha_is_finite(alpha):
    """The range in `config.RANGES`; Beta's standard deviation is (8 alpha + 4) ** -0.5."""
    least, bound = config_lib.RANGES['data.mixup_alpha']
    assert (least, bound) == config_lib.RANGES['data.cutmix_alpha'] == (0, 1000)
    images, partners = jnp.ones((1, 4, 4, 1)), jnp.zeros((1, 4, 4, 1))
    keys = jax.random.split(jax.random.key(0), 2000)
    for alphas in ((alpha, 0.0), (0.0, alpha)):
        mixed, ratios = jax.vmap(lambda key: augment.mix(key, images, partners, *alphas))(keys)  # noqa: B023
        assert np.isfinite(mixed).all()
        if alphas[0]:
            assert np.std(ratios) == pytest.approx((8 * alpha + 4) ** -0.5, rel=0.1)


def test_draw_box_inside_the_image_has_the_drawn_area():
    inside = [
        float(1 - augment.draw_box(jax.random.key(seed), jnp.float32(0.75), 64, 64).mean())
        for seed in range(40)
    ]
    assert max(inside) == pytest.approx(0.25, abs=1e-6)
    assert min(inside) < 0.24


def test_mix_with_both_alphas_uses_each_about_half_the_time():
    images, partners = jnp.ones((1, 16, 16, 1)), jnp.zeros((1, 16, 16, 1))
    boxes = 0
    for seed in range(40):
        mixed, _ = augment.mix(jax.random.key(seed), images, partners, 1.0, 1.0)
        boxes += set(np.unique(mixed)) <= {0.0, 1.0}
    assert 8 < boxes < 32
