"""An exported student: reading its folder, and using it."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import safetensors.numpy
from flax import linen as nn

from one_jax import models, torch_interop, workdir
from one_jax.data import augment, datasets
from one_jax.errors import UserError

CONFIG, WEIGHTS, PROGRAM = 'config.json', 'student.safetensors', 'student.stablehlo'


@dataclasses.dataclass(frozen=True)
class Student:
    """A trained plain network that takes images as they are.

    Attributes:
      config: the content of the folder's `config.json`.
      network: called as `network.apply(variables, normalised_images, train=False)`.
      variables: `{'params': ..., 'batch_stats': ...}`.
    """

    config: dict[str, Any]
    network: nn.Module
    variables: dict[str, Any]

    @property
    def label_names(self) -> list[str]:
        """The name of every class."""
        return self.config['label_names']

    @property
    def mean(self) -> tuple[float, ...]:
        """What is subtracted from a channel in [0, 1]."""
        return tuple(self.config['mean'])

    @property
    def std(self) -> tuple[float, ...]:
        """What a channel is divided by after that."""
        return tuple(self.config['std'])

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps uint8 images [B, H, W, 3] to logits [B, C]."""
        return self._predict(self.variables, jnp.asarray(images))

    @functools.cached_property
    def _predict(self) -> Any:
        return jax.jit(self.predict)

    def predict(self, variables: Any, images: jax.Array) -> jax.Array:
        """The pure function behind the call: uint8 images [B, H, W, 3] to logits [B, C]."""
        normalised = augment.normalise(images, self.mean, self.std, jnp.float32)
        return self.network.apply(variables, normalised, train=False).logits

    def check_data(self, spec: datasets.DatasetSpec) -> None:
        """Raises `UserError` where the data set has other classes or another image size."""
        for field, ours, theirs in (
            ('num_classes', self.config['num_classes'], spec.num_classes),
            ('input_size', self.config['input_size'], list(spec.image_shape[:2])),
        ):
            if ours != theirs:
                raise UserError(
                    f'the student has {field} {ours}, the data set {spec.name!r} {theirs}: '
                    'give --config with the data set the student was trained for'
                )


def load_student(directory: str | Path) -> Student:
    """Reads a student's folder.

    Raises:
      UserError: the folder holds no student, or a damaged one.
    """
    directory = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise UserError(
                f'student={str(directory)!r} holds no student: there is no {name} in it'
            )
    config = workdir.read_json(directory / CONFIG)
    try:
        network = models.make_backbone(config['network'], config['num_classes'])()
        height, width = config['input_size']
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f'{str(directory / CONFIG)!r} describes no student: {error}') from None
    try:
        state_dict = safetensors.numpy.load_file(directory / WEIGHTS)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f'{str(directory / WEIGHTS)!r} is damaged: {error}') from None
    template = jax.eval_shape(
        lambda key, images: network.init(key, images, train=False),
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32),
    )
    variables = torch_interop.from_state_dict(state_dict, template)
    return Student(config, network, jax.tree.map(jnp.asarray, variables))
