"""Takes the student out of a run.

    python -m one_jax.export --workdir=DIR --output=DIR [--branch=N|ensemble]

The folder holds `student.safetensors` (PyTorch's names and layout), `config.json` and
`student.stablehlo`: the network as a program from uint8 images to logits, for any batch size, which
`jax.export.deserialize` loads without one_jax.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from absl import flags

from one_jax import checkpoint, command, evaluate, methods, torch_interop, workdir
from one_jax import student as student_lib
from one_jax.errors import ConfigError, UserError
from one_jax.models import cost
from one_jax.models.multibranch import join_ensemble, split_ensemble, student_variables
from one_jax.state import evaluated_variables

PLATFORMS = ('cpu', 'cuda', 'tpu')
# What of the config tells the data set apart, wherever it is: evaluation of the student takes it.
DATA_FIELDS = ('name', 'generated_examples', 'image_size', 'stream')


def export_student(
    directory: Path, output: Path, branch: int | str | None = None
) -> student_lib.Student:
    """Writes a branch of a run's newest checkpoint, or the ensemble of all branches, as a student
    folder, whole or not at all.

    Args:
      directory: the workdir of a run.
      output: a folder that does not exist yet, or is empty.
      branch: from 0, or 'ensemble'; None takes what the method deploys.

    Returns:
      The student as read back from the folder.

    Raises:
      UserError: no run, no checkpoint, no such branch, or something is in `output` already.
    """
    config = workdir.read_config(directory)
    method = methods.create(config)
    branch = _parse_branch(branch, method)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f'output={str(output)!r} exists: nothing is overwritten, give a new folder')
    with checkpoint.Checkpoints(directory / workdir.CHECKPOINTS, read_only=True) as checkpoints:
        state, progress, step = checkpoints.read()
    data = progress['data']
    kind = {'network': config.model.name, 'num_classes': data['num_classes']}
    if branch == 'ensemble':
        kind['ensemble'] = {
            'members': list(method.members),
            'share_stages': config.model.share_stages,
            'share_stem': method.shares_stem,
        }
    else:
        kind['network'] = method.members[branch]
    network = student_lib.make_network(kind)
    parameters, flops = cost.forward_cost(network, tuple(data['image_shape']))
    description = {
        **kind,
        'label_names': data['label_names'],
        'input_size': data['image_shape'][:2],
        'channels': 'RGB',
        'mean': data['mean'],
        'std': data['std'],
        'metric': _branch_metric(progress['evaluations'], step, branch),
        'data': {field: config.data[field] for field in DATA_FIELDS},
        'method': config.method.name,
        'branch': branch,
        'step': step,
        'seed': config.seed,
        'parameters': parameters,
        'flops': flops,
        'versions': workdir.versions(),
    }
    variables = evaluated_variables(state)
    if branch == 'ensemble':
        parts = split_ensemble(variables, method.num_branches)
        variables = join_ensemble(parts, alike=len(set(method.members)) == 1)
    else:
        variables = student_variables(variables, branch)
    variables = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), variables)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=output.parent, prefix=f'.{output.name}.'))
    try:
        _write_folder(temporary, student_lib.Student(description, network, variables), step)
        temporary.chmod(0o755)
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return student_lib.load_student(output)


def _parse_branch(branch: int | str | None, method: methods.Method) -> int | str:
    wanted = method.deployed.removeprefix('branch ') if branch is None else str(branch)
    if wanted == 'ensemble' and method.num_branches > 1:
        return wanted
    if not (wanted.isdecimal() and int(wanted) < method.num_branches):
        ensemble = ", or 'ensemble'" if method.num_branches > 1 else ''
        raise ConfigError('branch', branch, f'0 to {method.num_branches - 1}{ensemble}')
    return int(wanted)


def _branch_metric(
    evaluations: dict[str, dict[str, Any]], step: int, branch: int | str
) -> dict[str, Any] | None:
    """What the branch scored at this step, on the test split if it was evaluated there."""

    def score(record: dict[str, Any], measure: str) -> float:
        if branch == 'ensemble':
            return record[f'ensemble_{measure}']
        return record[f'branch_{measure}'][branch]

    for split in ('test', 'validation'):
        record = evaluations.get(split)
        if record is not None and record['step'] == step:
            measures = {name: score(record, name) for name in evaluate.MEASURES}
            return {'split': split, **measures}
    return None


def _write_folder(folder: Path, student: student_lib.Student, step: int) -> None:
    """Writes the files and reads them back: what is on disk must compute what the run computed."""
    if student.num_branches > 1:
        state_dict = torch_interop.ensemble_to_state_dict(student.variables, student.num_branches)
    else:
        state_dict = torch_interop.to_state_dict(student.variables)
    for name in [name for name in state_dict if name.endswith('.running_mean')]:
        counter = name.removesuffix('running_mean') + 'num_batches_tracked'
        state_dict[counter] = np.asarray(step, np.int64)
    weights = safetensors.numpy.save(state_dict, metadata={'format': 'pt'})
    (folder / student_lib.WEIGHTS).write_bytes(weights)
    workdir.write_json(folder / student_lib.CONFIG, student.config)
    program = export_program(student)
    (folder / student_lib.PROGRAM).write_bytes(program)

    height, width = student.config['input_size']
    images = np.random.default_rng(0).integers(0, 256, (4, height, width, 3), np.uint8)
    expected = np.asarray(student(images))
    for name, actual in (
        (student_lib.WEIGHTS, student_lib.load_student(folder)(images)),
        (student_lib.PROGRAM, jax.export.deserialize(bytearray(program)).call(images)),
    ):
        if not np.allclose(actual, expected, rtol=1e-4, atol=1e-4):
            difference = np.abs(np.asarray(actual) - expected).max()
            raise RuntimeError(f'{name} does not compute what the run does: {difference} apart')


def export_program(student: student_lib.Student) -> bytes:
    """A serialised `jax.export` program: uint8 [batch, H, W, 3] to float32 logits [batch, C]."""
    height, width = student.config['input_size']
    (batch,) = jax.export.symbolic_shape('batch')
    images = jax.ShapeDtypeStruct((batch, height, width, 3), jnp.uint8)
    predict = jax.jit(lambda images: student.predict(student.variables, images))
    exported = jax.export.export(predict, platforms=PLATFORMS)(images)
    return bytes(exported.serialize())


def _in_words(branch: int | str) -> str:
    return branch if branch == 'ensemble' else f'branch {branch}'


def main() -> None:
    """Exports what the flags name."""
    if not flags.FLAGS.workdir or not flags.FLAGS.output:
        raise UserError('give --workdir=DIR, the run, and --output=DIR, a new folder')
    output = Path(flags.FLAGS.output)
    student = export_student(Path(flags.FLAGS.workdir), output, flags.FLAGS.branch)
    metric = student.config['metric'] or {}
    score = f', {metric["split"]} top-1 {metric["top1"]:.2f} %' if metric else ''
    print(
        f'{output}: {student.config["network"]}, {_in_words(student.config["branch"])}, '
        f'{student.config["parameters"]:,} parameters{score}'
    )


if __name__ == '__main__':
    flags.DEFINE_string('workdir', None, 'The directory of a run.')
    flags.DEFINE_string('output', None, 'The folder to write; it must not exist, or be empty.')
    flags.DEFINE_string(
        'branch', None, "Which branch, from 0, or 'ensemble'; what the method deploys by default."
    )
    command.run(main)
