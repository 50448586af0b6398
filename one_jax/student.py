"""An exported student: reading its folder, and using it."""

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import config_dict

from one_jax import methods, models, quantisation, student_config, torch_interop, workdir
from one_jax.batch_norm_folding import FoldedNetwork
from one_jax.data import augment, datasets
from one_jax.errors import ConfigError, UserError
from one_jax.models import multibranch

CONFIG, WEIGHTS, PROGRAM = 'config.json', 'student.safetensors', 'student.stablehlo'
MODEL, CARD = 'student.onnx', 'README.md'
BATCH_NORM = ('separate', 'folded')
_AGGREGATOR = 'aggregator.'
# Tensors that a message about their numbers names.
_NAMED = 5


@dataclasses.dataclass(frozen=True)
class Student:
    """A trained network that takes images as they are: a plain one, an ensemble of branches, or one
    with the aggregator that weighs them.

    Attributes:
      config: the content of the folder's `config.json`.
      network: called as `network.apply(variables, normalised_images, train=False)`.
      variables: `{'params': ..., 'batch_stats': ...}`.
    """

    config: dict[str, Any]
    network: nn.Module | FoldedNetwork
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
        """Maps normalised images [B, H, W, 3] to logits [B, C]: of an ensemble its mean logits, or
        those of its aggregator.
        """
        outputs = self.network.apply(variables, normalised, train=False)
        if 'aggregator' in self.config.get('ensemble', {}):
            return outputs.teacher_logits
        return outputs.logits.mean(axis=0) if self.num_branches > 1 else outputs.logits

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


def load_student(directory: str | Path, dtype: Any = jnp.float32) -> Student:
    """Reads a student's folder.

    Args:
      directory: the folder.
      dtype: of the network's computation; the variables are float32.

    Raises:
      UserError: the folder holds no student, or a damaged one.
    """
    directory = Path(directory)
    for name in (CONFIG, WEIGHTS):
        # In a folder that may not be read, `Path.is_file` raises an error.
        if not os.path.isfile(directory / name):
            raise UserError(
                f'student={str(directory)!r} holds no student: there is no {name} in it'
            )
    try:
        config = workdir.read_json(directory / CONFIG)
    except (OSError, RecursionError) as error:
        raise UserError(f'{str(directory / CONFIG)!r} cannot be read: {error}') from None
    try:
        student_config.check(config)
        network = make_network(config, dtype)
        height, width = config['input_size']
        template = jax.eval_shape(
            lambda key, images: network.init(key, images, train=False),
            jax.random.key(0),
            jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32),
        )
    except KeyError as error:
        raise UserError(f'{str(directory / CONFIG)!r} describes no student: no {error}') from None
    # What networks of values that do not go together raise, among others.
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        reason = str(error).partition('\n')[0]
        raise UserError(f'{str(directory / CONFIG)!r} describes no student: {reason}') from None
    weights = directory / WEIGHTS
    state_dict = quantisation.decode(torch_interop.read_safetensors(weights, repr(str(weights))))
    try:
        check_values(state_dict)
    except UserError as error:
        raise UserError(f'{str(directory / WEIGHTS)!r} is damaged: {error}') from None
    student = Student(config, network, template)
    variables = from_state_dict(state_dict, template, student.num_branches)
    if missing := [name for name in ('mean', 'std', 'label_names') if name not in config]:
        raise UserError(
            f'{str(directory / CONFIG)!r} describes no student: it has no {", ".join(missing)}'
        )
    return dataclasses.replace(student, variables=jax.tree.map(jnp.asarray, variables))


def to_state_dict(variables: Mapping[str, Any], num_branches: int) -> dict[str, np.ndarray]:
    """A student's variables under PyTorch's names: those of branch i of an ensemble behind
    'branches.i.', its aggregator's behind 'aggregator.'.

    Args:
      variables: of `Student.network`.
      num_branches: K; 1 of a plain network.
    """
    if num_branches == 1:
        return torch_interop.to_state_dict(variables)
    aggregator = torch_interop.to_state_dict(multibranch.aggregator_variables(variables))
    return {
        **torch_interop.ensemble_to_state_dict(variables, num_branches),
        **{_AGGREGATOR + name: array for name, array in aggregator.items()},
    }


def from_state_dict(
    state_dict: Mapping[str, np.ndarray], template: Mapping[str, Any], num_branches: int
) -> dict[str, Any]:
    """The inverse of `to_state_dict`; see `torch_interop.from_state_dict`."""
    if num_branches == 1:
        return torch_interop.from_state_dict(state_dict, template)
    own = {name: x for name, x in state_dict.items() if name.startswith(_AGGREGATOR)}
    others = {name: x for name, x in state_dict.items() if name not in own}
    variables = torch_interop.ensemble_from_state_dict(others, template, num_branches)
    aggregator = torch_interop.from_state_dict(
        {name.removeprefix(_AGGREGATOR): x for name, x in own.items()},
        multibranch.aggregator_variables(template),
    )
    for name, tree in aggregator.items():
        variables.setdefault(name, {})['aggregator'] = tree
    return variables


def check_values(state_dict: Mapping[str, np.ndarray]) -> None:
    """Makes sure that a network can have these numbers, in float32.

    Args:
      state_dict: PyTorch's names.

    Raises:
      UserError: NaN, infinity, what float32 cannot hold, a negative running variance, or no real
        numbers; some of the tensors are named.
    """
    problems: dict[str, list[str]] = {}
    for name, array in state_dict.items():
        with np.errstate(over='ignore'):
            rounded = array.astype(np.float32) if array.dtype.kind in 'fiu' else None
        if rounded is None:
            problems.setdefault(f'{array.dtype} in place of real numbers', []).append(name)
        elif not np.isfinite(rounded).all():
            problems.setdefault('NaN or infinity', []).append(name)
        elif name.endswith('.running_var') and (rounded < 0).any():
            problems.setdefault('negative variances', []).append(name)
    if problems:
        raise UserError('; '.join(f'{what} in {_some(names)}' for what, names in problems.items()))


def _some(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ', '.join(names[:_NAMED]) + (f' and {more} more' if more > 0 else '')


def make_network(config: Mapping[str, Any], dtype: Any = jnp.float32) -> nn.Module | FoldedNetwork:
    """The network that a student's config.json describes.

    Args:
      config: 'network' and 'num_classes'; of an ensemble also 'ensemble', with its 'members',
        'share_stages' and 'share_stem', and, where it has an aggregator, 'aggregator': the 'method'
        it is of and the method's 'settings'. 'batch_norm', one of `BATCH_NORM`, may be left out.
      dtype: of the computation.

    Raises:
      ConfigError: a value that is not allowed.
      KeyError: something is missing.
    """
    batch_norm = config.get('batch_norm', BATCH_NORM[0])
    if batch_norm not in BATCH_NORM:
        raise ConfigError('batch_norm', batch_norm, BATCH_NORM)
    if 'ensemble' in config:
        network = _make_ensemble(config['ensemble'], config['num_classes'], dtype)
    else:
        network = models.make_backbone(config['network'], config['num_classes'], dtype)()
    return FoldedNetwork(network) if batch_norm == 'folded' else network


def _make_ensemble(ensemble: Mapping[str, Any], num_classes: int, dtype: Any) -> models.MultiBranch:
    members, make_aggregator = ensemble['members'], None
    if 'aggregator' in ensemble:
        method = methods.create(
            config_dict.ConfigDict(
                {
                    'model': {
                        'name': members[0],
                        'members': ','.join(members),
                        'num_branches': None,
                        'share_stages': ensemble['share_stages'],
                    },
                    'method': {
                        'name': ensemble['aggregator']['method'],
                        **ensemble['aggregator']['settings'],
                    },
                }
            )
        )
        make_aggregator = functools.partial(method.make_aggregator, dtype=jnp.dtype(dtype))
    alike = len(set(members)) == 1
    return models.MultiBranch(
        make_backbones=tuple(
            models.make_backbone(name, num_classes, dtype)
            for name in (members[:1] if alike else members)
        ),
        num_branches=len(members),
        share_stages=ensemble['share_stages'],
        share_stem=ensemble['share_stem'],
        make_aggregator=make_aggregator,
    )
