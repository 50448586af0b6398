"""Makes a student folder of weights that were trained elsewhere.

    python -m one_jax.import_weights --weights=FILE --network=NAME --config=configs/X.py \\
        --output=DIR [--layout=plain|one] [--branch=N|ensemble|teacher]

The folder may be a frozen teacher (`method.teachers`), a start for fine-tuning (`model.init_from`),
or a student to predict with. The config's data set is the one that the weights were trained for:
it gives the classes and their names, the image size, mean and standard deviation.
"""

import hashlib
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import config_flags

from one_jax import (
    command,
    deployment,
    imported_card,
    methods,
    models,
    result,
    self_check,
    student_folder,
    torch_interop,
    workdir,
)
from one_jax import config as config_lib
from one_jax import student as student_lib
from one_jax.data import datasets, jpeg
from one_jax.errors import ConfigError, UserError
from one_jax.models import cost
from one_jax.models.resnet_cifar import CifarResNet

# Each is the name of the method whose network in training the file holds.
LAYOUTS = ('plain', 'one')
# Of the networks of ONE's authors.
_SHARE_STAGES = 2
# Random images, for the check of what was written.
_NUM_CHECKED = 8


def import_student(
    weights: Path,
    network: str,
    config: Any,
    output: Path,
    layout: str = 'plain',
    branch: int | str | None = None,
) -> student_lib.Student:
    """Writes a file of weights as a student folder, whole or not at all.

    Args:
      weights: see `torch_interop.read_state_dict`.
      network: the name of the network, see `models`.
      config: its group `data` is the data set that the weights were trained for.
      output: a folder that does not exist yet, or is empty.
      layout: 'plain', one network under the names of `torch_interop.to_state_dict`; or 'one', ONE
        in training as its authors' code saves it, see `torch_interop.from_one_checkpoint`.
      branch: of the layout 'one': from 0 (None is 0), 'ensemble' for the mean of all branches, or
        'teacher' for their sum weighted by the gate.

    Returns:
      The student as read back from the folder. Nothing has evaluated it: its metric is None.

    Raises:
      ConfigError: no such network, layout or branch, or a field of the data set is not allowed.
      UserError: the file does not hold the weights of such a network with so many classes, the data
        set is not on disk, or something is in `output` already.
    """
    _check_network(network, layout)
    student_folder.require_new(output)
    state_dict = torch_interop.read_state_dict(weights)
    method = _make_method(network, layout, state_dict)
    branch = deployment.parse_branch(branch, method)
    data = describe_data(config)
    try:
        variables = _read_variables(state_dict, method, branch, data)
    except UserError as error:
        raise UserError(
            f'weights={str(weights)!r}, network={network!r}, {data["num_classes"]} classes of '
            f'data.name={config.data.name!r}: {error}'
        ) from None
    kind = deployment.describe_network(method, branch, data['num_classes'])
    module = student_lib.make_network(kind)
    parameters, flops = cost.forward_cost(module, tuple(data['image_shape']))
    description = {
        **kind,
        **deployment.describe_data(config, data),
        'weights': 'float32',
        'metric': None,
        'method': layout,
        'branch': branch,
        'step': 0,
        'parameters': parameters,
        'flops': flops,
        'imported': {
            'file': weights.name,
            'sha256': hashlib.sha256(weights.read_bytes()).hexdigest(),
        },
        'versions': workdir.versions(),
    }
    # Generated images only stand in for those that the weights were trained on.
    description['data']['generated_examples'] = 0
    return _write(student_lib.Student(description, module, variables), weights, output)


def describe_data(config: Any) -> dict[str, Any]:
    """What a run of `config` would note of its data set, see `result.describe_data`.

    Where images are generated, in place of a data set that is not on disk, the description is the
    table's, and the classes have numbers for names.

    Raises:
      ConfigError, UserError: as `datasets.load`.
    """
    data = result.describe_data(datasets.load(config.data))
    known = datasets.DATASETS.get(config.data.name)
    if known is not None and known.streamed:
        data['crop'] = jpeg.EVALUATION_CROP
    return data


def _check_network(network: str, layout: str) -> None:
    if layout not in LAYOUTS:
        raise ConfigError('layout', layout, LAYOUTS)
    try:
        constructor = models.network(network)
    except ConfigError as error:
        raise ConfigError('network', network, error.allowed) from None
    if layout == 'one' and not isinstance(constructor(num_classes=2), CifarResNet):
        raise ConfigError('network', network, 'a CIFAR ResNet or ResNeXt, for the layout of ONE')


def _make_method(network: str, layout: str, names: Iterable[str]) -> methods.Method:
    """The method that trained weights of these `names`, with as many branches as there are."""
    config = config_lib.default_config()
    config.model.name, config.method.name = network, layout
    if layout == 'one':
        found = {match[1] for name in names if (match := re.match(r'layer3_(\d+)\.', name))}
        if len(found) < 2:
            raise UserError(
                "layout='one' is not that of the weights: they have no layer3_1, layer3_2, ...; "
                "one network is layout='plain'"
            )
        config.model.num_branches, config.model.share_stages = len(found), _SHARE_STAGES
    return methods.create(config)


def _read_variables(
    state_dict: Mapping[str, np.ndarray],
    method: methods.Method,
    branch: int | str,
    data: Mapping[str, Any],
) -> dict[str, Any]:
    """The variables of `branch`, in float32, out of the weights of the network in training."""
    student_lib.check_values(state_dict)
    several = method.num_branches > 1
    whole = deployment.TEACHER if several else branch
    network = student_lib.make_network(
        deployment.describe_network(method, whole, data['num_classes'])
    )
    template = jax.eval_shape(
        lambda key, images: network.init(key, images, train=False),
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, *data['image_shape']), jnp.float32),
    )
    if several:
        variables = torch_interop.from_one_checkpoint(state_dict, template, method.num_branches)
        variables = deployment.select_variables(variables, method, branch)
    else:
        variables = torch_interop.from_state_dict(state_dict, template)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), variables)


def _write(student: student_lib.Student, weights: Path, output: Path) -> student_lib.Student:
    """Writes the folder; each file in it must compute what the student does."""
    config = student.config
    height, width = config['input_size']
    shape = (_NUM_CHECKED, height, width, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    if not np.isfinite(student(images)).all():
        raise UserError(
            f'weights={str(weights)!r}: the network says NaN or infinity of random images: numbers '
            'in the file are too large'
        )
    with student_folder.whole_or_not_at_all(output) as folder:
        written = student_folder.write_weights(folder, student, 'float32')
        programs = student_folder.write_programs(folder, written, onnx=False)
        formats = {student_lib.WEIGHTS: written, **programs}
        examples = self_check.Images(images, None)
        config['checks'] = self_check.compare(formats, student, False, examples)
        workdir.write_json(folder / student_lib.CONFIG, config)
        card = imported_card.render(config, student_folder.sizes(folder))
        (folder / student_lib.CARD).write_text(card)
    return student_lib.load_student(output)


def _evaluate_command(output: Path) -> str:
    """The command that evaluates what was written, on the real images of the config's data set."""
    given = flags.FLAGS
    config = given['config'].config_filename
    if given.config.data.generated_examples:
        # An option such as :smoke may have set it.
        config = config.partition(':')[0]
    overrides = [
        argument
        for argument in sys.argv[1:]
        if re.match(r'--?config\.data\.', argument) and 'generated_examples' not in argument
    ]
    arguments = [f'--student={output}', f'--config={config}', *overrides]
    return shlex.join(['python', '-m', 'one_jax.evaluate', *arguments])


def main() -> None:
    """Imports what the flags name."""
    given = flags.FLAGS
    if not (given.weights and given.network and given.config and given.output):
        raise UserError(
            'give --weights=FILE, --network=NAME, --config=configs/X.py (the data set that the '
            'weights were trained for) and --output=DIR, a new folder'
        )
    output = Path(given.output)
    student = import_student(
        Path(given.weights), given.network, given.config, output, given.layout, given.branch
    )
    print(
        f'{output}: {given.network}, {student.config["parameters"]:,} parameters. Evaluate it:\n'
        f'{_evaluate_command(output)}'
    )


if __name__ == '__main__':
    flags.DEFINE_string('weights', None, 'A file of weights: .safetensors, .pth or .pt.')
    flags.DEFINE_string('network', None, 'The network that they are of, as in model.name.')
    flags.DEFINE_string('output', None, 'The folder to write; it must not exist, or be empty.')
    flags.DEFINE_string('layout', 'plain', "'plain', or 'one': a checkpoint of ONE's authors.")
    flags.DEFINE_string(
        'branch', None, "Of the layout 'one': from 0, 'ensemble' or 'teacher' (with the gate)."
    )
    config_flags.DEFINE_config_file('config', None, 'Whose data set the weights were trained for.')
    command.run(main)
