"""Makes a student of weights that were trained elsewhere."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from one_jax import data, methods, models
from one_jax.data import table
from one_jax.errors import UserError, explain, require
from one_jax.models.layers import EPSILON
from one_jax.models.resnet_cifar import CifarResNet
from one_jax.students import config as student_config
from one_jax.students import folder, selection, self_check, torch_interop, weights_file
from one_jax.students.student import Student, abstract_variables

# Each is the name of the method whose network in training the file holds.
LAYOUTS = ('plain', 'one')
# Names in other code for CIFAR ResNets, and ours.
_SYNONYMS = {r'^linear\.': 'fc.', r'\.shortcut\.(?=[01]\.)': '.downsample.'}


def import_student(
    weights: Path,
    network: str,
    data_config: Any,
    output: Path,
    layout: str = 'plain',
    branch: int | str | None = None,
) -> Student:
    """Writes a file of weights as a student folder, whole or not at all.

    Args:
      weights: a file for `weights_file.read_state_dict`.
      data_config: the config group `data` of the data set that the weights were trained for.
      output: a folder that does not exist, or is empty.
      layout: 'plain', one network under the names of `torch_interop.to_state_dict`; or 'one', ONE
        in training as its authors' code saves it, see `torch_interop.to_one_checkpoint`.
      branch: with layout 'one' a number from 0 (None is 0), 'ensemble' for the mean of all
        branches, or 'teacher' for their sum weighted by the gate.

    Returns:
      The student as read back from the folder. It is not evaluated: its metric is None.

    Raises:
      UserError: the network, layout or branch does not exist, `output` is not new, the weights do
        not fit the network, or the data set is not on disk.
    """
    require(layout in LAYOUTS, 'layout', layout, LAYOUTS)
    with explain(f'network={network!r}', UserError):
        cifar = isinstance(models.network(network)(num_classes=2), CifarResNet)
        allowed = "'plain', except for CIFAR ResNets and ResNeXts"
        require(layout == 'plain' or cifar, 'layout', layout, allowed)
    folder.require_new(output)
    state_dict = weights_file.read_state_dict(weights)
    method = _make_method(network, layout, state_dict)
    branch = selection.parse_branch(branch, method)
    description = data.open(data_config).description()
    known = table.DATASETS.get(data_config.name)
    if known is not None and known.streamed:
        # Generated images are not cropped, the images they stand in for are.
        description['crop'] = table.EVALUATION_CROP
    with explain(f'weights={str(weights)!r}, network={network!r}', UserError):
        variables = _read_variables(state_dict, method, branch, description)
    fields = student_config.network_fields(method, branch, description['num_classes'])
    config = {
        **fields,
        **student_config.data_fields(data_config, description),
        'metric': None,
        'method': layout,
        'branch': branch,
        'step': 0,
        'imported': {'file': weights.name, 'sha256': weights_file.digest(weights)},
    }
    # Generated images only stand in for those that the weights were trained on.
    config['data']['generated_examples'] = 0
    student = Student(config, student_config.build_network(fields), variables)
    examples = self_check.random_images(description['image_shape'], 8)
    finite = np.isfinite(student(examples.images)).all()
    require(finite, 'weights', str(weights), 'smaller numbers: logits are NaN or infinity')
    return folder.write_student(output, student, reference=student, examples=examples)


def _make_method(network: str, layout: str, names: Iterable[str]) -> methods.Method:
    """Makes the method that trained weights with these names, with as many branches."""
    method = methods.registered()[layout]
    if layout == 'plain':
        return method(branch_networks=(network,), share_stages=0)
    found = {match[1] for name in names if (match := re.match(r'layer3_(\d+)\.', name))}
    allowed = "'plain': the weights have no layer3_1, layer3_2, ..., so they are one network"
    require(len(found) > 1, 'layout', layout, allowed)
    # ONE's authors share two stages.
    return method(branch_networks=(network,) * len(found), share_stages=2)


def _read_variables(
    state_dict: torch_interop.StateDict,
    method: methods.Method,
    branch: int | str,
    description: Mapping[str, Any],
) -> dict[str, Any]:
    """Reads the float32 variables of `branch` from the weights of the network in training."""
    weights_file.check_values(state_dict)
    whole = student_config.TEACHER if method.num_branches > 1 else branch
    fields = student_config.network_fields(method, whole, description['num_classes'])
    network = student_config.build_network(fields)
    template = abstract_variables(network, description['image_shape'])
    if method.num_branches > 1:
        variables = torch_interop.from_one_checkpoint(state_dict, template, method.num_branches)
        variables = selection.select_variables(variables, branch)
    else:
        for theirs, ours in _SYNONYMS.items():
            renamed = {re.sub(theirs, ours, name): array for name, array in state_dict.items()}
            # Two of one name would be ambiguous.
            state_dict = renamed if len(renamed) == len(state_dict) else state_dict
        if isinstance(network, CifarResNet):
            state_dict = _add_shortcuts(state_dict)
        variables = torch_interop.from_state_dict(state_dict, template)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), variables)


def _add_shortcuts(state_dict: torch_interop.StateDict) -> dict[str, np.ndarray]:
    """Writes type A shortcuts (He et al. 2016), which have no weights, as projections, exactly.

    Every second pixel, with zeros for channels on both sides, is a 1x1 convolution with a kernel of
    zeros and ones, and a batch normalisation that changes nothing: in float32, var + epsilon is 1.
    """
    added = {}
    for block in ('layer2.0', 'layer3.0'):
        kernel = state_dict.get(f'{block}.conv1.weight', np.empty(0))
        basic = kernel.ndim == 4 and kernel.shape[0] == 2 * kernel.shape[1]
        if not basic or any(name.startswith(f'{block}.downsample') for name in state_dict):
            return dict(state_dict)
        width, inputs = kernel.shape[:2]
        identity = np.eye(width, inputs, -(width - inputs) // 2, dtype=np.float32)
        added[f'{block}.downsample.0.weight'] = identity[..., None, None]
        ones = np.ones(width, np.float32)
        norm = {
            'weight': ones,
            'bias': 0 * ones,
            'running_mean': 0 * ones,
            'running_var': ones - EPSILON,
        }
        added |= {f'{block}.downsample.1.{name}': values for name, values in norm.items()}
    print(
        'The weights have no shortcuts: taken as type A, every second pixel and zeros for new '
        'channels, half of them on each side'
    )
    return {**state_dict, **added}
