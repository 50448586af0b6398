"""Shared by the tests of the methods: a method with its settings, outputs, gradient flow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from one_jax import config as config_lib
from one_jax import methods, models
from one_jax.models import multibranch

BATCH, CLASSES = 4, 5


def create(name, **fields):
    """The method `name`; `fields` are of `config.method`, or dotted names of any group."""
    config = config_lib.default_config()
    config.model.name = 'resnet8'
    config.method.name = name
    config.update_from_flattened_dict(
        {key if '.' in key else f'method.{key}': value for key, value in fields.items()}
    )
    return methods.create(config_lib.resolve(config))


def random_outputs(num_branches=3, seed=0, **arrays):
    """Random logits [K, B, C], features [K, B, 6] and maps [K, B, 2, 2, 6], float64."""
    rng = np.random.default_rng(seed)
    shape = num_branches, BATCH
    return multibranch.Outputs(
        logits=2 * rng.normal(size=(*shape, CLASSES)),
        features=rng.normal(size=(*shape, 6)),
        maps=rng.normal(size=(*shape, 2, 2, 6)),
        **arrays,
    )


def random_labels(seed=0):
    return np.random.default_rng(seed + 100).integers(0, CLASSES, BATCH)


def softmax(logits):
    """By NumPy, over the last axis."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def cross_entropy(logits, labels):
    """By NumPy: of logits [B, C], the mean over the batch."""
    return -np.log(softmax(logits)[np.arange(len(labels)), labels]).mean()


def kl_divergence(teacher, student, temperature):
    """By NumPy: T^2 KL of logits [B, C], the mean over the batch."""
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    return temperature**2 * (p * np.log(p / q)).sum(axis=-1).mean()


@functools.cache
def _network(method_name, settings, num_branches):
    method = create(method_name, **dict(settings), **{'model.num_branches': num_branches})
    config = config_lib.default_config()
    config.model.update({'name': 'resnet8', 'num_branches': num_branches})
    config.model.share_stages = method.share_stages
    network = models.make_network(config.model, CLASSES, method)
    images = np.random.default_rng(5).normal(size=(BATCH, 16, 16, 3)).astype(np.float32)
    init = jax.jit(lambda x: network.init(jax.random.key(0), x, train=False))
    return method, network, init(images), images


def gradient_norms(term, name, num_branches, teacher_logits=None, **settings):
    """Who gets gradient from a term, in a real network (ResNet-8, 16x16 images, training mode).

    Args:
      term: function of (method, outputs, context) to a scalar.
      name: of the method.
      num_branches: K.
      teacher_logits: of frozen teachers, [N, BATCH, CLASSES].
      **settings: fields of `config.method`, or dotted names.

    Returns:
      Norms of the gradient by group: 'trunk', 'head' (a list over the branches), and one for each
      module of the aggregator, 'aggregator/<module>'.
    """
    method, network, variables, images = _network(
        name, tuple(sorted(settings.items())), num_branches
    )
    labels = jnp.asarray(random_labels())

    def scalar(params):
        outputs, _ = network.apply(
            {**variables, 'params': params}, images, train=True, mutable=['batch_stats']
        )
        context = methods.Context(labels=labels, teacher_logits=teacher_logits, params=params)
        return term(method, outputs, context)

    gradients = jax.jit(jax.grad(scalar))(variables['params'])
    norms = {'trunk': float(optax.tree.norm(gradients.get('trunk', {})))}
    norms['head'] = [
        float(optax.tree.norm(multibranch.branch_variables(gradients, branch)))
        for branch in range(num_branches)
    ]
    for module, tree in gradients.get('aggregator', {}).items():
        norms[f'aggregator/{module}'] = float(optax.tree.norm(tree))
    return norms
