"""An exported student: reading its folder, and using it."""

import dataclasses
import functools
import operator
from collections.abc import Mapping
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
    """A trained network that takes images as they are: a plain one, or an ensemble of branches.

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
        return self.logits(variables, normalised)

    def logits(self, variables: Any, normalised: jax.Array) -> jax.Array:
        """Maps normalised images [B, H, W, 3] to logits [B, C]; of an ensemble, its mean logits."""
        logits = self.network.apply(variables, normalised, train=False).logits
        return logits.mean(axis=0) if self.num_branches > 1 else logits

    @property
    def num_branches(self) -> int:
        """K of an ensemble, 1 of a plain network."""
        return len(self.config.get('ensemble', {}).get('members', [None]))

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
        operator.itemgetter('mean', 'std', 'label_names')(config)
        network = make_network(config)
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
    student = Student(config, network, template)
    if student.num_branches > 1:
        variables = torch_interop.ensemble_from_state_dict(
            state_dict, template, student.num_branches
        )
    else:
        variables = torch_interop.from_state_dict(state_dict, template)
    return dataclasses.replace(student, variables=jax.tree.map(jnp.asarray, variables))


def make_network(config: Mapping[str, Any]) -> nn.Module:
    """The network that a student's config.json describes.

    Args:
      config: 'network' and 'num_classes'; of an ensemble also 'ensemble', with its 'members',
        'share_stages' and 'share_stem'.
    """
    if 'ensemble' not in config:
        return models.make_backbone(config['network'], config['num_classes'])()
    ensemble = config['ensemble']
    members = ensemble['members']
    alike = len(set(members)) == 1
    return models.MultiBranch(
        make_backbones=tuple(
            models.make_backbone(name, config['num_classes'])
            for name in (members[:1] if alike else members)
        ),
        num_branches=len(members),
        share_stages=ensemble['share_stages'],
        share_stem=ensemble['share_stem'],
    )
