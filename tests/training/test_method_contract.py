"""What every registered method must satisfy; a new method is tested without an edit here."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from method_fixtures import CASE_BATCH, CLASSES, case

from one_jax import methods
from one_jax.methods.base import defaults

# Settings beside the defaults: the method and its fields.
VARIANTS = {
    'one attached': ('one', {'detach_teacher': False}),
    'one mean': ('one', {'teacher': 'mean'}),
    'okddip detached': ('okddip', {'detach_targets': True}),
    'okddip whole': ('okddip', {'model.share_stages': 0, 'leader': False}),
    'mde selective': ('mde', {'fusion': 'selective'}),
    'kdcl linear': ('kdcl', {'teacher': 'linear'}),
    'kdcl general': ('kdcl', {'teacher': 'general'}),
}
# Variants whose teacher is computed by other operations are tested like methods.
METHODS = [*methods.registered(), 'kdcl linear', 'kdcl general', 'mde selective']
every_method = pytest.mark.parametrize('made', METHODS, indirect=True)
every_case = pytest.mark.parametrize('made', [*methods.registered(), *VARIANTS], indirect=True)

OWN = 'trunk, head 0'
ALL = 'trunk, all heads'
# The parts of the network that the gradient of a term (its first entry, for a term of each branch)
# reaches, and no others. A method that is not listed may send gradients anywhere.
POLICY = {
    'plain': {'branch_cross_entropy': OWN},
    'independent': {'branch_cross_entropy': OWN},
    'joint_average': {'ensemble_cross_entropy': ALL},
    'one': {
        'branch_cross_entropy': OWN,
        'teacher_cross_entropy': f'{ALL}, aggregator',
        'distillation': OWN,
        'distill_weight': '',
    },
    'one attached': {'distillation': f'{ALL}, aggregator'},
    'one mean': {'teacher_cross_entropy': ALL, 'distillation': OWN},
    'cl_ilr': {'branch_cross_entropy': OWN, 'distillation': ALL},
    'dml': {'branch_cross_entropy': 'head 0', 'distillation': 'head 0'},
    'kd': {'branch_cross_entropy': OWN, 'distillation': OWN},
    'meal': {'distillation': OWN},
    'kdcl': {'branch_cross_entropy': 'head 0', 'distillation': 'head 0'},
    'kdcl linear': {'distillation': 'head 0', 'teacher_weights': ''},
    'kdcl general': {'distillation': 'head 0', 'teacher_weights': ''},
    # The targets are attached: a peer's divergence teaches all peers and the attention.
    'okddip': {
        'branch_cross_entropy': OWN,
        'peer_distillation': 'trunk, head 0, head 1, aggregator',
        'leader_distillation': ALL,
    },
    'okddip detached': {
        'peer_distillation': OWN,
        'leader_distillation': 'trunk, head 2',
    },
    'okddip whole': {'peer_distillation': 'all heads, aggregator'},
    'mde': {
        'branch_cross_entropy': OWN,
        'peer_distillation': 'trunk, head 0, head 1, aggregator',
        'leader_distillation': ALL,
        'classifier_diversity': 'head 0, head 1',
        'diversity_gradient_ratio': '',
    },
    'mde selective': {'peer_distillation': 'trunk, head 0, head 1, aggregator'},
    'boc_kd': {
        'branch_cross_entropy': OWN,
        'distillation': OWN,
        # The first entry is of branch 1; the widest branch is a constant.
        'feature_squared_error': 'trunk, head 1, aggregator',
    },
    'ekd': {
        'branch_cross_entropy': OWN,
        'distillation': OWN,
        'squared_error': OWN,
        'ensemble_cross_entropy': ALL,
        'ensemble_distillation': ALL,
        'ensemble_squared_error': ALL,
    },
}


@pytest.fixture
def made(request):
    name, fields = VARIANTS.get(request.param, (request.param, {}))
    return case(name, **fields)


def along_batch(function, outputs):
    """`function(array, axis)` of every array of the outputs and its batch axis."""
    return jax.tree.map(lambda x: function(np.array(x), x.shape.index(CASE_BATCH)), outputs)


@every_case
def test_loss_in_a_network_is_finite_and_reaches_the_parts_in_the_table(made, request):
    _, loss, terms, gradients = made.results
    assert loss.shape == ()
    for value in terms.values():
        assert value.dtype == np.float32
        assert value.ndim == 0 or value.shape[0] <= made.method.num_branches
    for leaf in jax.tree.leaves((loss, terms, gradients)):
        assert np.isfinite(leaf).all()
    assert any(np.any(leaf) for leaf in jax.tree.leaves(gradients['loss']))

    wanted = POLICY.get(request.node.callspec.params['made'], {})
    reach = made.reach()
    heads = ', '.join(f'head {branch}' for branch in range(made.method.num_branches))
    for term, parts in wanted.items():
        parts = set(filter(None, parts.replace('all heads', heads).split(', ')))
        assert reach[term] == parts, term


@every_method
def test_padding_and_one_hot_labels_change_nothing(made):
    """Garbage in a masked row equals a batch without that row; also with extreme logits."""
    outputs, *_ = made.results
    context = made.context.replace(params=made.params)
    row = 2

    def poison(x, axis):
        x[(slice(None),) * axis + (row,)] = np.nan
        return x

    def without(tree):
        return along_batch(lambda x, axis: np.delete(x, row, axis), tree)

    labels, teachers = context.labels, context.teacher_logits
    kept = context.replace(labels=np.delete(labels, row), teacher_logits=without(teachers))
    expected = made.loss(without(outputs), kept)
    one_hot = kept.replace(labels=np.eye(CLASSES, dtype=np.float32)[kept.labels])
    masked = context.replace(mask=(np.arange(CASE_BATCH) != row).astype(np.float32))
    masked = masked.replace(teacher_logits=along_batch(poison, teachers))
    for actual in (
        made.loss(without(outputs), one_hot),
        made.loss(along_batch(poison, outputs), masked),
    ):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), actual, expected
        )


@every_method
def test_loss_of_extreme_logits_has_finite_gradients(made):
    outputs, *_ = made.results
    context = made.context.replace(params=made.params)

    def loss(logits):
        heads = outputs.heads.replace(logits=logits)
        return made.method.loss(outputs.replace(heads=heads), context)[0]

    logits = 1e4 * np.random.default_rng(0).choice([-1, 1], outputs.logits.shape)
    value, gradient = jax.jit(jax.value_and_grad(loss))(logits.astype(np.float32))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@every_method
def test_gradient_step_lowers_for_tpu(made):
    """An operation that only a CPU has would be a custom call."""
    text = made.traced.lower(lowering_platforms=('tpu',)).as_text()
    assert not re.findall(r'custom_call @(\w+)', text)
    assert 'f64' not in text


@every_method
def test_loss_of_a_batch_split_over_devices_is_traced(made):
    """As in the train step: loops must carry values that vary over the devices."""
    outputs, *_ = made.results
    mesh = AbstractMesh((1,), ('data',), axis_types=(AxisType.Auto,))
    arrays = outputs, made.context.labels, made.context.teacher_logits
    specs = along_batch(lambda x, axis: P(*axis * [None], 'data'), arrays)

    def loss_and_gradient(params, outputs, labels, teachers):
        context = made.context.replace(
            labels=labels,
            teacher_logits=teachers,
            params=jax.tree.map(lambda x: lax.pcast(x, 'data', to='varying'), params),
        )

        def loss(logits):
            heads = outputs.heads.replace(logits=logits)
            return made.method.loss(outputs.replace(heads=heads), context)[0]

        return lax.pmean(jax.value_and_grad(loss)(outputs.logits), 'data')

    split = jax.shard_map(loss_and_gradient, mesh=mesh, in_specs=(P(), *specs), out_specs=P())
    loss, _ = jax.eval_shape(split, made.params, *arrays)
    assert loss.shape == ()


@every_method
def test_state_from_validation_has_the_shape_of_the_initial_state(made):
    if not made.method.uses_validation:
        assert made.method.initial_state() is None
        return
    logits = made.results[0].logits
    statistics = made.method.validation_statistics(
        jnp.asarray(logits), made.context.labels, jnp.ones(CASE_BATCH)
    )
    state = made.method.state_from_validation(jax.device_get(statistics))
    for new, old in zip(*map(jax.tree.leaves, (state, made.method.initial_state())), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
        assert np.isfinite(new).all()


@every_method
def test_deployed_names_a_branch_or_the_ensemble(made):
    number = made.method.num_branches
    assert made.method.deployed in ('ensemble', *(f'branch {i}' for i in range(number)))
    assert hash(made.method) == hash(dataclasses.replace(made.method))


def test_fields_of_one_name_have_one_type():
    for name, kind in methods.registered().items():
        assert kind.name == name
        for field, default in defaults(kind).items():
            assert methods.fields()[field] is type(default), (name, field)
