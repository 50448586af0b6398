"""The plain network, the baseline."""

from one_jax.methods.base import Method, register


@register('plain')
class Plain(Method):
    """One network that learns from the labels."""

    default_branches = 1
    max_branches = 1
