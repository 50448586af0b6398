"""Exports a run: a branch, the ensemble or the teacher as a student folder."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import config_dict

from one_jax import models
from one_jax.data import augment
from one_jax.errors import require
from one_jax.reporting import runs
from one_jax.students import batch_norm_folding, folder, quantisation, selection, self_check
from one_jax.students import config as student_config
from one_jax.students import onnx as onnx_export
from one_jax.students.student import Student
from one_jax.training import saved, workdir

# The config fields on the model card, if set: how the network was trained, without local paths.
_CARD_FIELDS = {
    'model': 'name num_branches share_stages dtype',
    'data': 'augment batch_size examples_per_class validation_fraction mixup_alpha cutmix_alpha',
    'optimizer': 'learning_rate momentum nesterov weight_decay schedule',
    'train': 'epochs steps label_smoothing ema_decay',
}


@dataclasses.dataclass(frozen=True)
class Options:
    """How a student is written: the flags of `one_jax.export`, which describe them."""

    fold_batch_norm: bool = False
    weights: str = 'float32'
    onnx: bool = False
    latency: bool = False
    data_dir: str | None = None
    data_root: str | None = None


def export_student(
    directory: Path, output: Path, branch: int | str | None = None, options: Options = Options()
) -> Student:
    """Writes a run's newest checkpoint as a student folder, whole or not at all.

    Args:
      directory: the workdir of the run.
      output: a folder that does not exist, or is empty.
      branch: a number from 0; 'ensemble', the mean of the branches' logits; 'teacher', the branches
        with the aggregator that weights them; None for what the method deploys.
      options: how to write it.

    Returns:
      The student as read back from the folder.

    Raises:
      UserError: there is no run, checkpoint or such branch, `output` is not new, or an option does
        not suit the run.
      RuntimeError: a file differs from the network in training.
    """
    require(options.weights in quantisation.TYPES, 'weights', options.weights, quantisation.TYPES)
    if options.onnx:
        onnx_export.require_packages()
    folder.require_new(output)
    run = saved.load(directory)
    variables = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), run.variables)
    run = dataclasses.replace(run, variables=variables)
    branch = selection.parse_branch(branch, run.method)
    description, evaluations = run.progress.data, run.progress.evaluations
    student = _take_out(run, branch, options)
    config = {
        **student.config,
        **student_config.data_fields(run.config.data, description),
        'metric': selection.scores(evaluations, run.step, branch),
        'method': run.method.name,
        'branch': branch,
        'step': run.step,
        'seed': run.config.seed,
    }
    places = {'data_dir': options.data_dir, 'root': options.data_root}
    places = {field: value for field, value in places.items() if value is not None}
    data_config = config_dict.ConfigDict({**run.config.data.to_dict(), **places})
    timed = options.latency and isinstance(branch, int) and run.method.num_branches > 1
    return folder.write_student(
        output,
        dataclasses.replace(student, config=config),
        reference=_training_logits(run, branch),
        examples=self_check.load_images(data_config, description, required=bool(places)),
        weights=options.weights,
        onnx=options.onnx,
        latency=options.latency,
        ensemble=_take_out(run, student_config.ENSEMBLE, options) if timed else None,
        training=_describe_training(directory, run),
        choices=selection.compare_choices(run.method, evaluations, run.step, description),
    )


def _take_out(run: saved.SavedRun, branch: int | str, options: Options) -> Student:
    """Takes a branch, or all of them, out of the run; the config describes the network only."""
    fields = student_config.network_fields(run.method, branch, run.progress.data['num_classes'])
    variables = selection.select_variables(run.variables, branch)
    if options.fold_batch_norm:
        images = jax.ShapeDtypeStruct((1, *run.progress.data['image_shape']), jnp.float32)
        network = student_config.build_network(fields)
        variables = batch_norm_folding.fold(network, variables, images)
        fields['batch_norm'] = 'folded'
    return Student(fields, student_config.build_network(fields), variables)


def _training_logits(run: saved.SavedRun, branch: int | str) -> self_check.Predict:
    """Returns the network in training, in float32, as a function of uint8 images [B, H, W, 3]."""
    model_config = config_dict.ConfigDict({**run.config.model.to_dict(), 'dtype': 'float32'})
    description = run.progress.data
    network = models.make_multibranch(model_config, description['num_classes'], run.method)
    mean, std = tuple(description['mean']), tuple(description['std'])
    # The order of `evaluated_logits`: branches, teacher, ensemble.
    wholes = {student_config.ENSEMBLE: -1, student_config.TEACHER: run.method.num_branches}
    index = wholes.get(branch, branch)

    @jax.jit
    def predict(variables: Any, images: jax.Array) -> jax.Array:
        normalised = augment.normalise(images, mean, std, jnp.float32)
        return network.apply(variables, normalised, train=False).evaluated_logits()[index]

    return functools.partial(predict, run.variables)


def _describe_training(directory: Path, run: saved.SavedRun) -> dict[str, Any]:
    """Returns what `model_card.render` reads about a run."""
    fields = {
        f'{group}.{name}': run.config[group][name]
        for group, names in _CARD_FIELDS.items()
        for name in names.split()
        if run.config[group].get(name) not in (None, '', 0)
    }
    settings = run.method.settings
    fields |= {f'method.{name}': settings[name] for name in settings if name != 'teachers'}
    path = directory / workdir.RESULT
    return {'fields': fields, **(runs.read_result(path) if path.exists() else {})}
