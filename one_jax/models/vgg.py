"""VGG-16 with batch normalisation for 32x32 images.

The thirteen convolutions of Simonyan & Zisserman 2015, configuration D, each followed by batch
normalisation and ReLU, in five groups that each end in a 2x2 max-pool: 512 numbers are left of a
32x32 image, and one linear layer classifies them in place of the three of the ImageNet network.
That is the usual CIFAR version, 14,728,266 parameters for ten classes. Like it, the convolutions
keep the bias that the batch normalisation after them makes idle. They start as torchvision's VGG:
He fan out, bias 0. A stage is a group with its pool.

The convolutions' and normalisations' names are torchvision's of `vgg16_bn`: `features.0`,
`features.1`, `features.3`, ...; the classifier is `fc`, as in the other networks.
"""

import functools
from collections.abc import Callable

import jax
from flax import linen as nn

from one_jax.errors import UserError
from one_jax.models.backbone import Backbone


class VGG(Backbone):
    """Groups of 3x3 convolutions, each group with a max-pool at its end.

    Attributes:
      widths: of every convolution in every group.
    """

    widths: tuple[tuple[int, ...], ...] = (
        (64, 64),
        (128, 128),
        (256, 256, 256),
        (512, 512, 512),
        (512, 512, 512),
    )

    @property
    def num_stages(self) -> int:
        return len(self.widths)

    def stem(self, x: jax.Array, conv: Callable, norm: Callable) -> jax.Array:
        """Nothing stands before stage 1.

        Raises:
          UserError: the image would vanish in the pools.
        """
        smallest = 2**self.num_stages
        if min(x.shape[1:3]) < smallest:
            raise UserError(
                f'VGG halves an image {self.num_stages} times: it needs at least {smallest}x'
                f'{smallest} pixels, and these are {x.shape[1]}x{x.shape[2]}'
            )
        return x

    def stage(self, x: jax.Array, number: int, conv: Callable, norm: Callable) -> jax.Array:
        # PyTorch's position in the sequence: convolution, normalisation and ReLU, and the pools.
        position = sum(3 * len(group) + 1 for group in self.widths[: number - 1])
        for width in self.widths[number - 1]:
            x = conv(self.scaled(width), 3, use_bias=True, name=f'features_{position}')(x)
            x = nn.relu(norm(name=f'features_{position + 1}')(x))
            position += 3
        return nn.max_pool(x, (2, 2), strides=(2, 2))


NETWORKS: dict[str, Callable[..., Backbone]] = {
    'vgg16': VGG,
    # For tests and smoke runs: one narrow convolution a group. Nobody published it.
    'vgg6_tiny': functools.partial(VGG, widths=((8,), (8,), (16,), (16,), (32,))),
}
