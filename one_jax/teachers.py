"""Frozen teachers: exported students whose logits a method distils."""

import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from one_jax import methods
from one_jax import student as student_lib
from one_jax.data import datasets
from one_jax.errors import ConfigError, UserError


def load(
    method: methods.Method, spec: datasets.DatasetSpec, dtype: Any = jnp.float32
) -> tuple[student_lib.Student, ...]:
    """Reads the frozen teachers of a method, in the order of `config.method.teachers`.

    Args:
      method: with its settings.
      spec: the data set's description, mean and standard deviation included.
      dtype: in which they compute.

    Raises:
      ConfigError: a folder holds no student, or one of other classes, another image size or another
        normalisation than the data set's.
    """
    teachers = []
    for directory in method.teachers:
        try:
            teacher = student_lib.load_student(directory, dtype)
        except UserError as error:
            raise ConfigError('method.teachers', directory, f'exported students: {error}') from None
        for field, its, ours in (
            ('num_classes', teacher.config['num_classes'], spec.num_classes),
            ('input_size', list(teacher.config['input_size']), list(spec.image_shape[:2])),
            ('mean', teacher.mean, spec.mean),
            ('std', teacher.std, spec.std),
        ):
            if its != ours and not (field in ('mean', 'std') and _close(its, ours)):
                raise ConfigError(
                    'method.teachers',
                    directory,
                    f'trained on such data as {spec.name!r}: its {field} is {its}, not {ours}',
                )
        teachers.append(teacher)
    return tuple(teachers)


def _close(first: tuple[float, ...], second: tuple[float, ...]) -> bool:
    return len(first) == len(second) and all(
        abs(a - b) < 1e-6 for a, b in zip(first, second, strict=True)
    )


def logits(
    teachers: tuple[student_lib.Student, ...], variables: tuple[Any, ...], images: jax.Array
) -> jax.Array | None:
    """What the teachers say of a batch, in evaluation mode and without gradient.

    Args:
      teachers: N of them.
      variables: of each; arguments of the compiled step, not constants in it.
      images: normalised, [B, H, W, 3].

    Returns:
      [N, B, C], or None without teachers.
    """
    if not teachers:
        return None
    each = [
        teacher.logits(values, images) for teacher, values in zip(teachers, variables, strict=True)
    ]
    return lax.stop_gradient(jnp.stack(each))


def describe(method: methods.Method, teachers: tuple[student_lib.Student, ...]) -> list[dict]:
    """What a run keeps of its teachers: enough to see that they are the same when it resumes."""
    return [
        {
            'network': teacher.config['network'],
            'method': teacher.config.get('method'),
            'seed': teacher.config.get('seed'),
            'top1': (teacher.config.get('metric') or {}).get('top1'),
            'sha256': hashlib.sha256((Path(folder) / student_lib.WEIGHTS).read_bytes()).hexdigest(),
        }
        for folder, teacher in zip(method.teachers, teachers, strict=True)
    ]
