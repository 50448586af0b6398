"""An exported student: reading its folder and predicting with it."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from one_jax.data import augment, table
from one_jax.errors import UserError, explain, require
from one_jax.runtime import files
from one_jax.students import classes, quantisation, torch_interop, weights_file
from one_jax.students import config as student_config
from one_jax.students.batch_norm_folding import FoldedNetwork

CONFIG, WEIGHTS, PROGRAM = 'config.json', 'student.safetensors', 'student.stablehlo'
MODEL, CARD = 'student.onnx', 'README.md'
# What networks raise, among others, that are built from values that do not go together.
_INCONSISTENT = (AttributeError, IndexError, KeyError, TypeError, ValueError)


@dataclasses.dataclass(frozen=True)
class Student:
    """A trained classifier of uint8 images: one network, an ensemble, or a teacher.

    Attributes:
      config: the content of the folder's `config.json`.
      network: called as `network.apply(variables, normalised_images, train=False)`.
      variables: `{'params': ..., 'batch_stats': ...}`.
      folder: that it was read from.
      order: places [C] of the network's logits among the student's; None if they are the same.
    """

    config: dict[str, Any]
    network: nn.Module | FoldedNetwork
    variables: dict[str, Any]
    folder: str = ''
    order: tuple[int, ...] | None = None

    @property
    def label_names(self) -> list[str]:
        """The names of the C classes."""
        return self.config['label_names']

    @property
    def mean(self) -> tuple[float, ...]:
        """The mean of each channel, on the [0, 1] scale."""
        return tuple(self.config['mean'])

    @property
    def std(self) -> tuple[float, ...]:
        """The standard deviation of each channel, on the [0, 1] scale."""
        return tuple(self.config['std'])

    @property
    def num_branches(self) -> int:
        """K for an ensemble or a teacher, 1 for one network."""
        return len(self.config.get('ensemble', {}).get('members', [None]))

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps uint8 images [B, H, W, 3] to logits [B, C]."""
        return self._compiled(self.variables, jnp.asarray(images))

    @functools.cached_property
    def _compiled(self) -> Any:
        return jax.jit(self.predict)

    def predict(self, variables: Any, images: jax.Array) -> jax.Array:
        """Maps uint8 images [B, H, W, 3] to logits [B, C]: the pure function behind the call."""
        normalised = augment.normalise(images, self.mean, self.std, jnp.float32)
        return self.logits(variables, normalised)

    def logits(self, variables: Any, normalised: jax.Array) -> jax.Array:
        """Maps normalised images [B, H, W, 3] to logits [B, C]."""
        outputs = self.network.apply(variables, normalised, train=False)
        if 'aggregator' in self.config.get('ensemble', {}):
            logits = outputs.teacher_logits
        else:
            logits = outputs.logits.mean(axis=0) if self.num_branches > 1 else outputs.logits
        return logits if self.order is None else logits[:, np.asarray(self.order)]

    def for_classes(self, label_names: Sequence[str], field: str = 'student') -> Self:
        """Returns the student with its logits in the order of a data set's classes.

        Raises `ConfigError` for `field` if the classes differ; see `classes.match`.
        """
        order = classes.match(self.label_names, label_names, field, self.folder)
        if order is None:
            return self
        if self.order is not None:
            order = tuple(self.order[place] for place in order)
        config = {**self.config, 'label_names': list(label_names)}
        return dataclasses.replace(self, config=config, order=order)

    def check_data(self, spec: table.DatasetSpec) -> None:
        """Raises `UserError` if the data set has other classes or another image size."""
        theirs = {'num_classes': spec.num_classes, 'input_size': list(spec.image_shape[:2])}
        own = {field: self.config[field] for field in theirs}
        if own != theirs:
            raise UserError(
                f'the student has {own}, the data set {spec.name!r} {theirs}: '
                'give --config with the data set the student was trained for'
            )


def abstract_variables(network: Any, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Returns the variables of a network as `ShapeDtypeStruct`s, without computing them."""
    return jax.eval_shape(
        lambda key, images: network.init(key, images, train=False),
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, *image_shape), jnp.float32),
    )


def load_student(directory: str | Path, dtype: Any = jnp.float32) -> Student:
    """Reads a student's folder. The network computes in `dtype`; its variables are float32.

    Raises `UserError` if the folder holds no student, or a damaged one.
    """
    config_path, weights_path = Path(directory) / CONFIG, Path(directory) / WEIGHTS
    for path in (config_path, weights_path):
        # Unlike `Path.is_file`, this returns False in a folder without read permission.
        if not os.path.isfile(path):
            found = f'holds no student: there is no {path.name} in it'
            if config_path.is_file() and os.path.isdir(Path(directory) / 'checkpoints'):
                command = f'python -m one_jax.export --workdir={directory} --output=NEW_DIR'
                found = f'is a run, not a student: {command}'
            raise UserError(f'student={str(directory)!r} {found}')
    config = files.read_json(config_path)
    with explain(f'{str(config_path)!r} describes no student', *_INCONSISTENT):
        student_config.check(config)
        network = student_config.build_network(config, dtype)
        template = abstract_variables(network, (*config['input_size'], 3))
    student = Student(config, network, template, str(directory))
    with explain(f'{str(weights_path)!r} is damaged', UserError, OSError):
        found, expected = weights_file.digest(weights_path), config.get('weights_sha256')
        allowed = f'{expected}, as in {CONFIG}: copy the folder again'
        require(expected in (None, found), 'its SHA-256', found, allowed)
    state_dict = weights_file.read_safetensors(weights_path)
    with explain(f'{str(weights_path)!r} is damaged', UserError):
        state_dict = quantisation.decode(state_dict)
        weights_file.check_values(state_dict)
        variables = torch_interop.from_state_dict(state_dict, template, student.num_branches)
    return dataclasses.replace(student, variables=jax.tree.map(jnp.asarray, variables))
