"""Frozen teachers: exported students whose logits a method distils."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from one_jax import methods
from one_jax.data.table import DatasetSpec
from one_jax.errors import ConfigError, UserError, require
from one_jax.students import student as student_lib
from one_jax.students import weights_file


def load_student(field: str, directory: str, dtype: Any = jnp.float32) -> student_lib.Student:
    """Loads the exported student that a config field names.

    Raises:
      ConfigError: the folder holds no student, or has no possible name.
    """
    try:
        return student_lib.load_student(directory, dtype)
    except (UserError, OSError) as error:
        raise ConfigError(field, directory, f'an exported student: {error}') from None


def load(
    method: methods.Method,
    spec: DatasetSpec,
    label_names: Sequence[str],
    dtype: Any = jnp.float32,
) -> tuple[student_lib.Student, ...]:
    """Loads the frozen teachers of a method, in the order of `config.method.teachers`.

    Args:
      method: names their folders.
      spec: the data set, with mean and standard deviation.
      label_names: of its classes, empty if unknown. Logits get their order.
      dtype: of their computation.

    Raises:
      ConfigError: a folder holds no student, or one with other classes, another image size or
        another normalisation than the data set.
    """
    teachers = []
    for directory in method.teacher_folders:
        teacher = load_student('method.teachers', directory, dtype)
        for field, its, ours in (
            ('num_classes', teacher.config['num_classes'], spec.num_classes),
            ('input_size', list(teacher.config['input_size']), list(spec.image_shape[:2])),
            ('mean', teacher.mean, spec.mean),
            ('std', teacher.std, spec.std),
        ):
            allowed = f'trained on data like {spec.name!r}: its {field} is {its}, not {ours}'
            same = np.shape(its) == np.shape(ours) and np.allclose(its, ours, rtol=0, atol=1e-6)
            require(same, 'method.teachers', directory, allowed)
        teachers.append(teacher.for_classes(label_names, 'method.teachers'))
    return tuple(teachers)


def logits(
    teachers: tuple[student_lib.Student, ...], variables: tuple[Any, ...], images: jax.Array
) -> jax.Array | None:
    """Computes the teachers' logits on a batch, in evaluation mode and without gradient.

    Args:
      teachers: N of them.
      variables: of each; arguments of the compiled step rather than constants in it.
      images: normalised, [B, H, W, 3].

    Returns:
      [N, B, C]; None without teachers.
    """
    if not teachers:
        return None
    each = [
        teacher.logits(values, images) for teacher, values in zip(teachers, variables, strict=True)
    ]
    return lax.stop_gradient(jnp.stack(each))


def describe(method: methods.Method, teachers: tuple[student_lib.Student, ...]) -> list[dict]:
    """Describes the teachers for the checkpoint: a resumed run must have the same weights."""
    return [
        {
            'network': teacher.config['network'],
            'method': teacher.config.get('method'),
            'seed': teacher.config.get('seed'),
            'top1': (teacher.config.get('metric') or {}).get('top1'),
            'sha256': digest(folder),
        }
        for folder, teacher in zip(method.teacher_folders, teachers, strict=True)
    ]


def digest(folder: str) -> str:
    """SHA-256 of the weights of the student in `folder`."""
    return weights_file.digest(Path(folder) / student_lib.WEIGHTS)
