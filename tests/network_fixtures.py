"""Shared by the tests of the networks: a branched network, compiled calls, what a jaxpr has."""

import functools

import jax
import jax.numpy as jnp
from jax.extend import core

from one_jax import models
from one_jax.models import aggregators, multibranch


def branched(name, num_classes=10, num_branches=3, share_stages=2, **kwargs):
    """ONE's network: identical branches and a gate."""
    return multibranch.MultiBranch(
        (models.make_backbone(name, num_classes, **kwargs),),
        num_branches,
        share_stages,
        make_aggregator=functools.partial(aggregators.Gate, num_branches),
    )


def init(network, images):
    """Compiled, which is faster than hundreds of single operations."""
    return jax.jit(lambda x: network.init(jax.random.key(0), x, train=False))(images)


def abstract_variables(network, image_shape):
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return jax.eval_shape(lambda x: network.init(jax.random.key(0), x, train=False), images)


def feature_groups(jaxpr):
    """The number of groups of every convolution in a jaxpr, including called ones."""
    groups = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == 'conv_general_dilated':
            groups.append(
                equation.params['feature_group_count'] * equation.params['batch_group_count']
            )
        for called in core.jaxprs_in_params(equation.params):
            groups += feature_groups(called)
    return groups
