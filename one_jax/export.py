"""Takes the student out of a run.

    python -m one_jax.export --workdir=DIR --output=DIR [--branch=N|ensemble|teacher]
        [--fold_batch_norm] [--weights=float32|float16|bfloat16|int8] [--onnx] [--latency]
        [--data_dir=DIR] [--data_root=DIR]

The folder holds `student.safetensors` (PyTorch's names and layout), `config.json`, a model card
(`README.md`) and `student.stablehlo`: the network as a program from uint8 images to logits, for any
batch size, which `jax.export.deserialize` loads without one_jax; with --onnx also `student.onnx`,
the same for ONNX Runtime. Every file is checked against the network in training on test images of
the run before the folder appears.
"""

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import config_dict

from one_jax import (
    batch_norm_folding,
    checkpoint,
    command,
    deployment,
    latency,
    methods,
    model_card,
    onnx_export,
    quantisation,
    self_check,
    student_folder,
    workdir,
)
from one_jax import student as student_lib
from one_jax.errors import ConfigError, UserError
from one_jax.models import cost
from one_jax.state import evaluated_variables


@dataclasses.dataclass(frozen=True)
class Options:
    """How a student is written.

    Attributes:
      fold_batch_norm: whether batch normalisations become part of the convolutions.
      weights: how kernels are stored, one of `quantisation.TYPES`.
      onnx: whether to write an ONNX model too.
      latency: whether to measure latencies for the model card.
      data_dir: where the run's data set is now, in place of the run's `data.data_dir`.
      data_root: the same for `data.root`.
    """

    fold_batch_norm: bool = False
    weights: str = 'float32'
    onnx: bool = False
    latency: bool = False
    data_dir: str | None = None
    data_root: str | None = None

    def check(self) -> None:
        """Raises `UserError` for what is not allowed, or not installed."""
        if self.weights not in quantisation.TYPES:
            raise ConfigError('weights', self.weights, quantisation.TYPES)
        if self.onnx:
            onnx_export.require_packages()


def export_student(
    directory: Path,
    output: Path,
    branch: int | str | None = None,
    options: Options = Options(),
) -> student_lib.Student:
    """Writes a branch of a run's newest checkpoint, or all branches, as a student folder, whole or
    not at all.

    Args:
      directory: the workdir of a run.
      output: a folder that does not exist yet, or is empty.
      branch: from 0; 'ensemble', the mean of the branches' logits; 'teacher', the branches with the
        aggregator that weighs them; None takes what the method deploys.
      options: how it is written.

    Returns:
      The student as read back from the folder.

    Raises:
      UserError: no run, no checkpoint, no such branch, something is in `output` already, or an
        option that does not suit.
      RuntimeError: a file does not compute what the run does.
    """
    config = workdir.read_config(directory)
    method = methods.create(config)
    branch = deployment.parse_branch(branch, method)
    options.check()
    student_folder.require_new(output)
    with checkpoint.Checkpoints(directory / workdir.CHECKPOINTS, read_only=True) as checkpoints:
        state, progress, step = checkpoints.read()
    data, found = progress['data'], deployment.find_record(progress['evaluations'], step)
    image_shape, num_classes = tuple(data['image_shape']), data['num_classes']
    trained = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), evaluated_variables(state))
    student = _take_out(trained, method, branch, data, options)
    parameters, flops = cost.forward_cost(student.network, image_shape)
    description = {
        **student.config,
        **deployment.describe_data(config, data),
        'weights': options.weights,
        'metric': deployment.metric(found, branch),
        'method': config.method.name,
        'branch': branch,
        'step': step,
        'seed': config.seed,
        'parameters': parameters,
        'flops': flops,
        'versions': workdir.versions(),
    }
    examples = _load_images(config, data, options)
    reference = self_check.training_logits(config, method, trained, branch, data)
    with student_folder.whole_or_not_at_all(output) as folder:
        student = dataclasses.replace(student, config=description)
        student = student_folder.write_weights(folder, student, options.weights)
        programs = student_folder.write_programs(folder, student, options.onnx)
        formats = {student_lib.WEIGHTS: student, **programs}
        rounded = options.weights != 'float32'
        description['checks'] = self_check.compare(formats, reference, rounded, examples)
        if options.latency:
            ensemble = None
            if isinstance(branch, int) and method.num_branches > 1:
                ensemble = _take_out(trained, method, deployment.ENSEMBLE, data, options)
            description['latency'] = _measure_latency(description, formats, ensemble)
        workdir.write_json(folder / student_lib.CONFIG, description)
        card = model_card.render(
            description,
            student_folder.sizes(folder),
            model_card.Training.of_run(directory, config, method.settings),
            deployment.compare_predictors(method, found, num_classes, image_shape),
        )
        (folder / student_lib.CARD).write_text(card)
    return student_lib.load_student(output)


def _take_out(
    trained: Mapping[str, Any],
    method: methods.Method,
    branch: int | str,
    data: Mapping[str, Any],
    options: Options,
) -> student_lib.Student:
    """A branch, or all of them, of the trained variables; its config is the network's only."""
    kind = deployment.describe_network(method, branch, data['num_classes'])
    variables = deployment.select_variables(trained, method, branch)
    if options.fold_batch_norm:
        images = jax.ShapeDtypeStruct((1, *data['image_shape']), jnp.float32)
        variables = batch_norm_folding.fold(student_lib.make_network(kind), variables, images)
        kind['batch_norm'] = 'folded'
    return student_lib.Student(kind, student_lib.make_network(kind), variables)


def _measure_latency(
    description: Mapping[str, Any],
    formats: Mapping[str, self_check.Predict],
    ensemble: student_lib.Student | None,
) -> dict[str, Any]:
    """The latency of what was written, and of the ensemble in the same formats."""
    size = tuple(description['input_size'])
    if ensemble is None:
        return latency.measure(formats, size)
    ensemble = dataclasses.replace(ensemble, config={**description, **ensemble.config})
    with tempfile.TemporaryDirectory() as folder:
        programs = student_folder.write_programs(
            Path(folder), ensemble, student_lib.MODEL in formats
        )
        return latency.measure(formats, size, {student_lib.WEIGHTS: ensemble, **programs})


def _load_images(config: Any, data: Mapping[str, Any], options: Options) -> self_check.Images:
    elsewhere = {'data_dir': options.data_dir, 'root': options.data_root}
    elsewhere = {field: value for field, value in elsewhere.items() if value is not None}
    data_config = config_dict.ConfigDict({**config.data.to_dict(), **elsewhere})
    return self_check.load_images(data_config, data, required=bool(elsewhere))


def main() -> None:
    """Exports what the flags name."""
    values = flags.FLAGS
    if not values.workdir or not values.output:
        raise UserError('give --workdir=DIR, the run, and --output=DIR, a new folder')
    output = Path(values.output)
    options = Options(
        **{field.name: values[field.name].value for field in dataclasses.fields(Options)}
    )
    student = export_student(Path(values.workdir), output, values.branch, options)
    metric = student.config['metric'] or {}
    score = f', {metric["split"]} top-1 {metric["top1"]:.2f} %' if metric else ''
    print(
        f'{output}: {student.config["network"]}, {deployment.in_words(student.config["branch"])}, '
        f'{student.config["parameters"]:,} parameters{score}'
    )
    print(self_check.summary(student.config['checks']))


if __name__ == '__main__':
    flags.DEFINE_string('workdir', None, 'The directory of a run.')
    flags.DEFINE_string('output', None, 'The folder to write; it must not exist, or be empty.')
    flags.DEFINE_string(
        'branch',
        None,
        "Which branch, from 0, 'ensemble' or 'teacher'; what the method deploys by default.",
    )
    flags.DEFINE_boolean(
        'fold_batch_norm', False, 'Make batch normalisations part of the convolutions before them.'
    )
    flags.DEFINE_string(
        'weights', 'float32', f'How weights are stored: {", ".join(quantisation.TYPES)}.'
    )
    flags.DEFINE_boolean('onnx', False, "Write student.onnx too; pip install 'one_jax[onnx]'.")
    flags.DEFINE_boolean('latency', False, 'Measure latencies on this machine for the model card.')
    flags.DEFINE_string('data_dir', None, 'Where the data set of the run is now, for the check.')
    flags.DEFINE_string('data_root', None, 'The same for a folder of images.')
    command.run(main)
