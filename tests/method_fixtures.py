"""Shared by the tests of the methods: a tiny network, random outputs, formulas by NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from one_jax import config as config_lib
from one_jax import methods, models
from one_jax.models import multibranch
from one_jax.models.aggregators import Aggregate, PeerAttention
from one_jax.models.backbone import HeadOutputs
from one_jax.models.resnet_cifar import CifarResNet

BATCH, CLASSES = 4, 5
# A batch size that no other axis of `Case` has.
CASE_BATCH = 7


class _TinyBlock(nn.Module):
    width: int
    stride: int
    conv: object
    norm: object

    @nn.compact
    def __call__(self, x):
        return nn.relu(self.norm(name='bn')(self.conv(self.width, 1, self.stride, name='conv')(x)))


# A ResNet without a 3x3 convolution after the stem: compiled in a second.
models.NETWORKS['tiny_test_network'] = functools.partial(
    CifarResNet, stage_sizes=(1, 1, 1), width=4, block=_TinyBlock
)


def create(name, **fields):
    """The method `name`; `fields` are of `config.method`, or dotted names of any group."""
    config = config_lib.default_config()
    config.model.name = 'resnet8'
    config.method.name = name
    config.update_from_flattened_dict(
        {key if '.' in key else f'method.{key}': value for key, value in fields.items()}
    )
    return methods.create(config_lib.resolve(config))


def folders(number):
    """The value of `method.teachers` for so many teachers."""
    return ','.join(f'teacher{index}' for index in range(number))


def frozen_logits(number, batch_size=BATCH, seed=7):
    """Logits of frozen teachers, [N, B, C]."""
    return 3 * np.random.default_rng(seed).normal(size=(number, batch_size, CLASSES))


class Case:
    """A method with at most three branches in a tiny network, on 8x8 images in training mode."""

    def __init__(self, name, **fields):
        kind = methods.registered()[name]
        branches = min(kind.default_branches, 3)
        teachers = max(kind.min_teachers, branches) if kind.min_teachers else 0
        if teachers:
            fields = {'teachers': folders(teachers), **fields}
        network = {'model.name': 'tiny_test_network', 'model.num_branches': branches}
        self.method = create(name, **{**network, **fields})
        config = config_lib.default_config()
        config.model.share_stages = self.method.share_stages
        self.network = models.make_multibranch(config.model, CLASSES, self.method)
        rng = np.random.default_rng(5)
        shape = (CASE_BATCH, 8, 8, 3)
        shape = (self.method.num_branches, *shape) if self.method.augments_branches else shape
        images = jnp.asarray(rng.normal(size=shape), jnp.float32)
        self.context = methods.Context(
            labels=rng.integers(0, CLASSES, CASE_BATCH),
            progress=0.5,
            teacher_logits=frozen_logits(teachers, CASE_BATCH).astype(np.float32),
            method_state=self.method.initial_state(),
        )

        def draw(path, leaf):
            if path[-1].key in ('scale', 'var'):
                return np.ones(leaf.shape, leaf.dtype)
            return (rng.normal(size=leaf.shape) / 2).astype(leaf.dtype)

        template = jax.eval_shape(
            lambda key: self.network.init(key, images, train=False), jax.random.key(0)
        )
        variables = jax.tree_util.tree_map_with_path(draw, template)
        self.params = variables.pop('params')

        def loss_and_terms(params):
            outputs, _ = self.network.apply(
                {'params': params, **variables}, images, train=True, mutable=['batch_stats']
            )
            return self.method.loss(outputs, self.context.replace(params=params)), outputs

        def step(params):
            (loss, terms), pull_back, outputs = jax.vjp(loss_and_terms, params, has_aux=True)
            zeros = jax.tree.map(jnp.zeros_like, terms)
            gradients = {'loss': pull_back((jnp.ones_like(loss), zeros))[0]}
            for term, value in terms.items():
                first = jnp.ones_like(value) if value.ndim == 0 else zeros[term].at[0].set(1)
                (gradients[term],) = pull_back((jnp.zeros_like(loss), {**zeros, term: first}))
            return outputs, loss, terms, gradients

        self.traced = jax.jit(step).trace(self.params)
        self._loss = jax.jit(self.method.loss)

    @functools.cached_property
    def results(self):
        """(outputs, loss, terms, gradients): the gradients of 'loss' and of each term's first
        entry."""
        return jax.device_get(self.traced.lower().compile()(self.params))

    def loss(self, outputs, context):
        return jax.device_get(self._loss(outputs, context))

    def reach(self):
        """For each term, the parts of the network in which its first entry has a gradient."""
        *_, terms, gradients = self.results
        return {term: self._parts(gradients[term]) for term in terms}

    def _parts(self, gradient):
        parts = {name: gradient.get(name, {}) for name in ('trunk', 'aggregator')}
        for branch in range(self.method.num_branches):
            parts[f'head {branch}'] = multibranch.branch_variables(gradient, branch)
        return {name for name, tree in parts.items() if any(map(np.any, jax.tree.leaves(tree)))}


@functools.cache
def _case(name, fields):
    return Case(name, **dict(fields))


def case(name, **fields):
    """The `Case` of a method; each is made once."""
    return _case(name, tuple(sorted(fields.items())))


def random_heads(num_branches=3, seed=0, width=6):
    """Random logits [K, B, C], features [K, B, D] and maps [K, B, 2, 2, D], float64."""
    rng = np.random.default_rng(seed)
    shape = num_branches, BATCH
    return HeadOutputs(
        logits=2 * rng.normal(size=(*shape, CLASSES)),
        features=rng.normal(size=(*shape, width)),
        maps=rng.normal(size=(*shape, 2, 2, width)),
    )


def random_outputs(num_branches=3, seed=0, **aggregate):
    """The outputs of `random_heads`, with the given fields of an `Aggregate`."""
    return multibranch.Outputs(random_heads(num_branches, seed), Aggregate(**aggregate))


def with_logits(outputs, logits):
    """The outputs with the branches' logits replaced."""
    return outputs.replace(heads=outputs.heads.replace(logits=logits))


def random_labels(seed=0):
    return np.random.default_rng(seed + 100).integers(0, CLASSES, BATCH)


def softmax(logits):
    """By NumPy, over the last axis."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def cross_entropy(logits, labels):
    """By NumPy: the mean over the batch for logits [B, C]."""
    return -np.log(softmax(logits)[np.arange(len(labels)), labels]).mean()


def kl_divergence(teacher, student, temperature):
    """By NumPy: T^2 KL, the mean over the batch for logits [B, C]."""
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    return temperature**2 * (p * np.log(p / q)).sum(axis=-1).mean()


def random_projections():
    """Parameters of `PeerAttention` for features of width 16."""
    rng = np.random.default_rng(1)
    return {name: {'kernel': rng.normal(size=(16, 2)) / 2} for name in ('query', 'key')}


_attention = jax.jit(
    lambda params, heads: PeerAttention(3).apply({'params': params}, None, heads, True)
)


def attend(heads, params=None):
    """OKDDip's aggregate of three peers with features of width 16."""
    return jax.device_get(_attention(params or random_projections(), heads))


def numpy_targets(params, features, logits):
    """OKDDip's targets, peer by peer and example by example, from the definition."""
    targets = np.zeros_like(logits)
    for example in range(logits.shape[1]):
        for peer, feature in enumerate(features[:, example]):
            query = feature @ params['query']['kernel']
            scores = [query @ (other @ params['key']['kernel']) for other in features[:, example]]
            weights = softmax(np.array(scores))
            for weight, other in zip(weights, logits[:, example], strict=True):
                targets[peer, example] += weight * other
    return targets
