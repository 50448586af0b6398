"""VGG-16 with batch normalisation for 32x32 images.

The thirteen convolutions of Simonyan & Zisserman 2015, configuration D, each followed by batch
normalisation and ReLU, in five groups that end in a 2x2 max-pool, and one linear layer: the usual
CIFAR version, with 14,728,266 parameters for ten classes. The convolutions keep a bias, which the
batch normalisation makes redundant, and are initialised as in torchvision. A stage is a group with
its pool. Layers have the names of torchvision's `vgg16_bn`: `features.0`, `features.1`,
`features.3`, ...; the classifier is `fc`, as in the other networks.
"""

import functools
from collections.abc import Callable

import jax
from flax import linen as nn

from one_jax.errors import UserError
from one_jax.models.backbone import Backbone


class VGG(Backbone):
    """Groups of 3x3 convolutions, each followed by a max-pool.

    Attributes:
      widths: of each convolution in each group.
    """

    widths: tuple[tuple[int, ...], ...] = (
        (64, 64),
        (128, 128),
        (256, 256, 256),
        (512, 512, 512),
        (512, 512, 512),
    )

    has_blocks = False
    can_scale = True

    @property
    def num_stages(self) -> int:
        return len(self.widths)

    def stem(self, x: jax.Array, conv: Callable, norm: Callable) -> jax.Array:
        """Returns the images: there are no layers before stage 1."""
        smallest, (height, width) = 2**self.num_stages, x.shape[1:3]
        if min(height, width) < smallest:
            raise UserError(
                f'VGG halves an image {self.num_stages} times and requires at least '
                f'{smallest}x{smallest} pixels, not {height}x{width}'
            )
        return x

    def stage(self, x: jax.Array, number: int, conv: Callable, norm: Callable) -> jax.Array:
        # The position in PyTorch's sequence of convolutions, normalisations, ReLUs and pools.
        position = sum(3 * len(group) + 1 for group in self.widths[: number - 1])
        for width in self.widths[number - 1]:
            x = conv(self.scaled(width), 3, use_bias=True, name=f'features_{position}')(x)
            x = nn.relu(norm(name=f'features_{position + 1}')(x))
            position += 3
        return nn.max_pool(x, (2, 2), strides=(2, 2))


NETWORKS: dict[str, Callable[..., Backbone]] = {
    'vgg16': VGG,
    # For tests and smoke runs.
    'vgg6_tiny': functools.partial(VGG, widths=((8,), (8,), (16,), (16,), (32,))),
}
