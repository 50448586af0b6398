"""Writing a student's folder: weights, programs, config.json, model card, and their self-check."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from one_jax import onnx_export, quantisation, workdir
from one_jax import student as student_lib
from one_jax.errors import UserError
from one_jax.self_check import Predict

PLATFORMS = ('cpu', 'cuda', 'tpu')


def require_new(output: Path) -> None:
    """Raises `UserError` if something is in `output` already."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f'output={str(output)!r} exists: nothing is overwritten, give a new folder')


@contextmanager
def whole_or_not_at_all(output: Path) -> Iterator[Path]:
    """A new folder beside `output` that takes its place when the block has ended without error."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=output.parent, prefix=f'.{output.name}.'))
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_weights(folder: Path, student: student_lib.Student, weights: str) -> student_lib.Student:
    """Writes config.json and the weights, and reads them back.

    Args:
      folder: exists.
      student: with float32 variables; 'step' is in its config.
      weights: one of `quantisation.TYPES`.

    Returns:
      The student in the folder, whose weights are float32 again, rounded.
    """
    state_dict = student_lib.to_state_dict(student.variables, student.num_branches)
    state_dict = quantisation.encode(state_dict, weights)
    for name in [name for name in state_dict if name.endswith('.running_mean')]:
        counter = name.removesuffix('running_mean') + 'num_batches_tracked'
        state_dict[counter] = np.asarray(student.config['step'], np.int64)
    content = safetensors.numpy.save(state_dict, metadata={'format': 'pt'})
    (folder / student_lib.WEIGHTS).write_bytes(content)
    workdir.write_json(folder / student_lib.CONFIG, student.config)
    return student_lib.load_student(folder)


def write_programs(folder: Path, student: student_lib.Student, onnx: bool) -> dict[str, Predict]:
    """Writes the StableHLO program and, if asked to, the ONNX model.

    Returns:
      The function in each file, read back, by the file's name.
    """
    program, model = folder / student_lib.PROGRAM, folder / student_lib.MODEL
    program.write_bytes(export_program(student))
    formats = {program.name: load_program(program)}
    if onnx:
        model.write_bytes(onnx_export.export_model(student))
        formats[model.name] = onnx_export.load_model(model)
    return formats


def export_program(student: student_lib.Student) -> bytes:
    """A serialised `jax.export` program: uint8 [batch, H, W, 3] to float32 logits [batch, C]."""
    height, width = student.config['input_size']
    (batch,) = jax.export.symbolic_shape('batch')
    images = jax.ShapeDtypeStruct((batch, height, width, 3), jnp.uint8)
    predict = jax.jit(lambda images: student.predict(student.variables, images))
    exported = jax.export.export(predict, platforms=PLATFORMS)(images)
    return bytes(exported.serialize())


def load_program(path: Path) -> Predict:
    """The program in a file as a compiled function."""
    return jax.jit(jax.export.deserialize(bytearray(path.read_bytes())).call)


def sizes(folder: Path) -> dict[str, int]:
    """The bytes of every file, by name."""
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
