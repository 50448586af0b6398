"""Exact evaluation of predictions on a split, and of exported students."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding

from one_jax import config as config_lib
from one_jax import data, metrics
from one_jax.data import table
from one_jax.errors import ConfigError, require
from one_jax.runtime import memory, parallel
from one_jax.students.student import load_student

Step = Callable[[Any, Mapping[str, jax.Array]], dict[str, jax.Array]]


def make_evaluation_step(
    predict: Callable[[Any, jax.Array], jax.Array], mesh: Mesh, num_branches: int = 1
) -> Step:
    """Compiles a function from variables and a batch to masked sums, data-parallel over `mesh`.

    `predict` maps variables and uint8 images [b, H, W, 3] to logits [P, b, C], branches first. With
    several branches their diversity is measured too.
    """

    def step(variables, batch):
        logits = predict(variables, batch['image'])
        sums = metrics.prediction_sums(logits, batch['label'], batch['mask'])
        if num_branches > 1:
            sums |= metrics.diversity_sums(logits[:num_branches], batch['mask'])
        return lax.psum(sums, parallel.DATA_AXIS)

    return parallel.data_parallel(step, mesh)


def compile_ahead(
    step: Step, variables: Any, source: data.Source, size: int, mesh: Mesh, available: int | None
) -> tuple[Step, int]:
    """Compiles an evaluation step for batches of `size`, ahead of the first one.

    Returns:
      The compiled step, and the bytes of its batch and temporaries on one device.

    Raises:
      ConfigError: the compiler, or `available` bytes of a device, has too little memory.
    """

    def sharded(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, parallel.BATCH)
        return jax.ShapeDtypeStruct((size, *shape), dtype, sharding=sharding)

    image = sharded(jnp.uint8, *source.spec.image_shape)
    batch = {'image': image, 'label': sharded(jnp.int32), 'mask': sharded(jnp.float32)}
    try:
        compiled = step.lower(variables, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        raise too_large(size, ' '.join(str(error).split())[:300]) from None
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(variables))
    needed = max((memory.program_bytes(compiled) or 0) - held, 0)
    if parallel.platform(mesh) == 'cpu':
        # Convolutions take memory that the compiler does not count: 27 % to 35 % with ResNet-8.
        needed = needed * 4 // 3
    if available is not None and needed > available:
        raise too_large(size, ' of '.join(map(memory.readable_size, (needed, available))))
    return compiled, needed


def too_large(size: int, reason: str) -> ConfigError:
    """Returns the error of an evaluation that does not fit into memory."""
    allowed = f'few enough images for an evaluation to fit ({reason}); give fewer'
    return ConfigError('data.eval_batch_size', size, allowed)


def evaluate_split(
    step: Step, variables: Any, batches: Iterable[Mapping[str, Any]], mesh: Mesh
) -> dict[str, Any]:
    """Evaluates every example exactly once; returns lists over the P logits by measure."""
    sums = [step(variables, parallel.shard_batch(batch, mesh)) for batch in batches]
    return metrics.summarise(metrics.add_sums(jax.device_get(sums)))


def evaluation_record(
    summary: Mapping[str, Any], num_branches: int, has_teacher: bool, deployed: str
) -> dict[str, Any]:
    """Names the entries of a summary: `branch_top1` [K], `teacher_top1`, `ensemble_top1`, ...

    The summary is in the order of `Outputs.evaluated_logits`; measures of no teacher are None, and
    `deployed` is 'branch N' or 'ensemble'.
    """
    index = -1 if deployed == 'ensemble' else int(deployed.removeprefix('branch '))
    record = {}
    for measure in metrics.MEASURES:
        values = summary[measure]
        record[f'branch_{measure}'] = values[:num_branches]
        record[f'teacher_{measure}'] = values[num_branches] if has_teacher else None
        record[f'ensemble_{measure}'] = values[-1]
        record[f'deployed_{measure}'] = values[index]
    diversity = ('pairwise_l2', 'disagreement')
    return record | {measure: summary[measure] for measure in diversity if measure in summary}


def evaluate_students(
    directories: Sequence[Path], config: Any | None = None, data_root: str | None = None
) -> dict[str, Any]:
    """Evaluates exported students on the test split of their own data set, or of `config`'s.

    Several students are the branches of an ensemble, which is evaluated too. `data_root` is where a
    folder of images is now. Raises `UserError` if a folder holds no student, the data set does not
    suit it, or its logits are not finite.
    """
    students = [load_student(directory) for directory in directories]
    mesh = parallel.make_mesh()
    if config is None:
        allowed = 'a student that names its data set; for this one give --config=configs/X.py'
        require('data' in students[0].config, 'student', str(directories[0]), allowed)
        config = config_lib.default_config()
        config.data.update(students[0].config['data'])
        names = ', '.join(map(repr, students[0].label_names[:5]))
        allowed = f'--data_root=DIR with it: the folder of images with the classes {names}, ...'
        folder = config.data.name == table.IMAGE_FOLDER and not config.data.generated_examples
        require(bool(data_root) or not folder, 'student', str(directories[0]), allowed)
    if data_root:
        config.data.root = data_root
    batch_size = config.data.eval_batch_size
    allowed = f'a multiple of the {mesh.size} devices'
    require(batch_size % mesh.size == 0, 'data.eval_batch_size', batch_size, allowed)
    source = data.open(config.data, students[0].config.get('crop'))
    for student in students:
        student.check_data(source.spec)
    students = [student.for_classes(source.label_names) for student in students]

    def predict(variables, images):
        # Every student normalises by the statistics of its own training.
        pairs = zip(students, variables, strict=True)
        logits = jnp.stack([student.predict(own, images) for student, own in pairs])
        return jnp.concatenate([logits, logits.mean(axis=0, keepdims=True)])

    variables = parallel.replicate([student.variables for student in students], mesh)
    step = make_evaluation_step(predict, mesh, len(students))
    available = memory.device_bytes(jax.local_devices()[0])
    step, _ = compile_ahead(step, variables, source, batch_size, mesh, available)
    batches = source.evaluation_batches('test', batch_size)
    summary = evaluate_split(step, variables, batches, mesh)
    for directory, nll in zip(directories, summary['nll'], strict=False):
        allowed = 'a student with finite logits: on these images some are NaN or infinite'
        require(math.isfinite(nll), 'student', str(directory), allowed)
    deployed = 'branch 0' if len(students) == 1 else 'ensemble'
    record = evaluation_record(summary, len(students), False, deployed)
    return {'split': 'test', **record, 'deployed': deployed}
