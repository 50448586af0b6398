"""Exact evaluation of every branch, the teacher and the ensemble; also of an exported student.

python -m one_jax.evaluate --workdir=DIR
python -m one_jax.evaluate --student=DIR[,DIR...] [--config=configs/X.py]
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax import lax
from jax.sharding import Mesh
from ml_collections import config_flags

from one_jax import checkpoint, command, methods, metrics, models, parallel, report, workdir
from one_jax import config as config_lib
from one_jax import student as student_lib
from one_jax.data import augment, datasets, resident
from one_jax.errors import UserError
from one_jax.models.multibranch import Outputs
from one_jax.state import TrainState, evaluated_variables

MEASURES = ('top1', 'top5', 'nll', 'ece')


def predictor_logits(outputs: Outputs) -> jax.Array:
    """The logits of all that is evaluated: branches, teacher where there is one, mean ensemble.

    The ensemble is the mean of the branches' logits, as the methods' papers have it.

    Returns:
      [K + 1, B, C] or [K + 2, B, C].
    """
    logits = [*outputs.logits]
    if outputs.teacher_logits is not None:
        logits.append(outputs.teacher_logits)
    return jnp.stack([*logits, outputs.logits.mean(axis=0)])


def make_evaluation_step(
    predict: Callable[[Any, jax.Array], jax.Array],
    mesh: Mesh,
    num_branches: int = 1,
) -> Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]]:
    """The compiled evaluation of one batch, data-parallel over `mesh`.

    Args:
      predict: maps (variables, uint8 images [b, H, W, 3]) to logits [P, b, C].
      mesh: devices.
      num_branches: how many of the first predictors are branches, between which diversity is
        measured.

    Returns:
      A function of variables and a batch; it gives the masked sums of `metrics.prediction_sums`
      and, of several branches, `metrics.diversity_sums`.
    """

    def step(variables, batch):
        logits = predict(variables, batch['image'])
        sums = metrics.prediction_sums(logits, batch['label'], batch['mask'])
        if num_branches > 1:
            sums |= metrics.diversity_sums(logits[:num_branches], batch['mask'])
        return lax.psum(sums, parallel.DATA_AXIS)

    return parallel.data_parallel(step, mesh)


def evaluate_split(
    evaluation_step: Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]],
    variables: Any,
    batches: Iterable[resident.Batch],
    mesh: Mesh,
) -> dict[str, Any]:
    """Every example exactly once: `top1`, `top5`, `nll`, `ece` as lists over the predictors; of
    several branches, `pairwise_l2` and `disagreement` too.
    """
    sums = [evaluation_step(variables, parallel.shard_batch(batch, mesh)) for batch in batches]
    return metrics.summarise(metrics.add_sums(jax.device_get(sums)))


def name_predictors(
    summary: dict[str, Any], num_branches: int, has_teacher: bool, deployed: str
) -> dict[str, Any]:
    """The record of an evaluation: `branch_top1` [K], `teacher_top1`, `ensemble_top1`,
    `deployed_top1`, ...

    Args:
      summary: lists over the predictors, in the order of `predictor_logits`.
      num_branches: K.
      has_teacher: whether there is a teacher; without one its measures are None.
      deployed: 'branch N' or 'ensemble'.
    """
    record = {}
    for measure in MEASURES:
        values = summary[measure]
        record[f'branch_{measure}'] = values[:num_branches]
        record[f'teacher_{measure}'] = values[num_branches] if has_teacher else None
        record[f'ensemble_{measure}'] = values[-1]
        index = -1 if deployed == 'ensemble' else int(deployed.removeprefix('branch '))
        record[f'deployed_{measure}'] = values[index]
    for measure in ('pairwise_l2', 'disagreement'):
        if measure in summary:
            record[measure] = summary[measure]
    return record


def one_line(epoch: float, split: str, record: dict[str, Any]) -> str:
    """Top-1 of all predictors, for the log of a run."""
    branches = ' '.join(f'{top1:.2f}' for top1 in record['branch_top1'])
    teacher = record['teacher_top1']
    line = f'epoch {epoch:g}  {split} top-1: branches {branches}'
    return line if teacher is None else f'{line}  teacher {teacher:.2f}'


class Evaluator:
    """Evaluates a branched network on the splits of a data set.

    Args:
      config: resolved.
      method: that trained the network.
      network: a `MultiBranch`.
      dataset: with its splits.
      mesh: devices.
    """

    def __init__(
        self,
        config: Any,
        method: methods.Method,
        network: models.MultiBranch,
        dataset: datasets.Dataset | datasets.StreamedDataset,
        mesh: Mesh,
    ):
        self._config, self._method, self._dataset, self._mesh = config, method, dataset, mesh
        spec = dataset.spec

        def apply(variables: Any, images: jax.Array) -> Outputs:
            normalised = augment.normalise(images, spec.mean, spec.std, jnp.float32)
            return network.apply(variables, normalised, train=False)

        self._step = make_evaluation_step(
            lambda variables, images: predictor_logits(apply(variables, images)),
            mesh,
            method.num_branches,
        )

        def held_out_sums(variables: Any, batch: dict[str, jax.Array]) -> Any:
            logits = apply(variables, batch['image']).logits
            sums = method.held_out_sums(logits, batch['label'], batch['mask'])
            return lax.psum(sums, parallel.DATA_AXIS)

        self._held_out_step = parallel.data_parallel(held_out_sums, mesh)

    def splits(self, final: bool) -> list[str]:
        """What to evaluate: held-out images where there are some; in the end, all splits."""
        splits = self._dataset.evaluated_splits
        return list(splits if final else splits[:1])

    def __call__(self, variables: Any, split: str) -> dict[str, Any]:
        """The record of one split; see `name_predictors`."""
        summary = evaluate_split(
            self._step,
            variables,
            self._dataset.evaluation_batches(split, self._config.data.eval_batch_size),
            self._mesh,
        )
        num_branches = self._method.num_branches
        has_teacher = len(summary['top1']) == num_branches + 2
        return name_predictors(summary, num_branches, has_teacher, self._method.deployed)

    def refresh(self, state: TrainState) -> TrainState:
        """The state at the start of an epoch, its method's part made anew from held-out images."""
        batches = self._dataset.evaluation_batches('validation', self._config.data.eval_batch_size)
        sums = [
            self._held_out_step(state.variables, parallel.shard_batch(batch, self._mesh))
            for batch in batches
        ]
        fresh = self._method.refresh(jax.tree.map(lambda *values: sum(values), *sums))
        return state.replace(method=parallel.replicate(fresh, self._mesh))


def evaluate_workdir(directory: Path) -> dict[str, Any]:
    """Evaluates the newest checkpoint of a run on the test split."""
    config = workdir.read_config(directory)
    mesh = parallel.make_mesh()
    config_lib.validate(config, mesh.size)
    parallel.use_compilation_cache(config.train.compilation_cache_dir)
    dataset = datasets.load(config.data)
    method = methods.create(config)
    network = models.make_network(config.model, dataset.spec.num_classes, method)
    with checkpoint.Checkpoints(directory / workdir.CHECKPOINTS, read_only=True) as checkpoints:
        state, _, step = checkpoints.read()
    evaluator = Evaluator(config, method, network, dataset, mesh)
    record = evaluator(parallel.replicate(evaluated_variables(state), mesh), 'test')
    return {'step': step, 'split': 'test', **record}


def evaluate_students(directories: Sequence[Path], config: Any | None = None) -> dict[str, Any]:
    """Evaluates exported students on the test split of their own data set, or of `config`'s.

    Several students are the branches of a seed ensemble: each is evaluated, and so are the mean of
    their logits and the diversity between them.

    Raises:
      UserError: a folder holds no student, or the data set does not suit it.
    """
    students = [student_lib.load_student(directory) for directory in directories]
    mesh = parallel.make_mesh()
    if config is None:
        if 'data' not in students[0].config:
            raise UserError(f'{str(directories[0])!r} says no data set: give --config=configs/X.py')
        config = config_lib.default_config()
        config.data.update(students[0].config['data'])
    spec = config_lib.validate_data(config.data, mesh.size)
    for student in students:
        student.check_data(spec)
    dataset = datasets.load(config.data)

    def predict(variables, images):
        # Every student normalises by the statistics of its own training.
        each = [
            student.predict(own, images) for student, own in zip(students, variables, strict=True)
        ]
        return jnp.stack([*each, sum(each) / len(each)])

    summary = evaluate_split(
        make_evaluation_step(predict, mesh, len(students)),
        parallel.replicate([student.variables for student in students], mesh),
        dataset.evaluation_batches('test', config.data.eval_batch_size),
        mesh,
    )
    deployed = 'branch 0' if len(students) == 1 else 'ensemble'
    return {
        'split': 'test',
        **name_predictors(summary, len(students), False, deployed),
        'deployed': deployed,
    }


def main() -> None:
    """Evaluates what the flags name and prints the table."""
    directory, student = flags.FLAGS.workdir, flags.FLAGS.student
    if bool(directory) == bool(student):
        raise UserError(
            'give either --workdir=DIR, a run, or --student=DIR, an exported student (or several, '
            'separated by commas: a seed ensemble)'
        )
    if student:
        folders = [Path(folder) for folder in student.split(',')]
        record = evaluate_students(folders, flags.FLAGS.config)
    else:
        record = evaluate_workdir(Path(directory))
    print(report.run_table(record))


if __name__ == '__main__':
    flags.DEFINE_string('workdir', None, 'The directory of a run.')
    flags.DEFINE_string(
        'student', None, 'The folder of an exported student, or several, separated by commas.'
    )
    config_flags.DEFINE_config_file(
        'config', None, 'Whose data set to take for the student; its own by default.'
    )
    command.run(main)
