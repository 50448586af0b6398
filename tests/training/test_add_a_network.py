"""docs/add_a_network.md: its code is run as it stands on the page."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from network_fixtures import abstract_variables, branched
from page_fixtures import REPOSITORY, code_blocks, executed

from one_jax import config as config_lib
from one_jax import methods, models
from one_jax.models import cost, multibranch

NAME = 'plain_cnn5'


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    (code,) = code_blocks('add_a_network.md').values()
    networks = executed(code, 'plain_cnn')['NETWORKS']
    monkeypatch.setattr(models, 'NETWORKS', {**models.NETWORKS, **networks})


def test_page_names_files_that_exist():
    page = (REPOSITORY / 'docs/add_a_network.md').read_text()
    for path in re.findall(r'`([\w/]+\.py)`', page):
        assert path == 'one_jax/models/plain_cnn.py' or (REPOSITORY / path).is_file(), path
    assert 'import' in page
    assert '**plain_cnn.NETWORKS' in page


def test_network_has_the_parameters_of_its_layers():
    convolutions = [(3, 16), (16, 16), (16, 32), (32, 64)]
    expected = sum(9 * c * d + 2 * d for c, d in convolutions) + 65 * 10
    network = models.make_backbone(NAME, 10)()
    assert cost.forward_cost(network, (32, 32, 3))[0] == expected


@pytest.mark.parametrize('share_stages', [0, 1, 2])
def test_branch_at_every_cut_is_the_plain_network(share_stages):
    variables = abstract_variables(branched(NAME, share_stages=share_stages), (8, 8, 3))
    student = jax.eval_shape(lambda v: multibranch.student_variables(v, 1), variables)
    plain = abstract_variables(models.make_backbone(NAME, 10)(), (8, 8, 3))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), student) == jax.tree.map(
        lambda x: (x.shape, x.dtype), plain
    )


def test_network_learns_with_a_method_and_remat():
    config = config_lib.default_config()
    config.model.update(name=NAME, remat='convolutions')
    config = config_lib.resolve(config)
    method = methods.create(config)
    network = models.make_multibranch(config.model, 5, method)
    images = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)

    @jax.jit
    def losses():
        variables = network.init(jax.random.key(0), images, train=False)

        def loss(params):
            outputs, _ = network.apply(
                {**variables, 'params': params}, images, train=True, mutable=['batch_stats']
            )
            return method.loss(outputs, methods.Context(jnp.arange(4)))[0]

        before, gradient = jax.value_and_grad(loss)(variables['params'])
        stepped = jax.tree.map(lambda p, g: p - 0.01 * g, variables['params'], gradient)
        return before, loss(stepped)

    before, after = losses()
    assert after < before
