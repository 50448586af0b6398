"""Starts training from an exported student instead of random weights: `config.model.init_from`."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from one_jax import methods
from one_jax.errors import require
from one_jax.students import classes
from one_jax.students.student import Student
from one_jax.training import teachers
from one_jax.training.state import TrainState

_CLASSIFIER = 'fc'


def load_student(config: Any, method: methods.Method, label_names: Sequence[str]) -> Student | None:
    """Loads the student that `config.model.init_from` names, if any.

    If it has the classes `label_names` in another order, its classifier gets their order.

    Raises:
      ConfigError: the folder holds no student, or one of another network.
    """
    directory = config.model.init_from
    if not directory:
        return None
    student = teachers.load_student('model.init_from', directory)
    require(
        student.config.get('batch_norm') != 'folded',
        'model.init_from',
        directory,
        'a student exported without --fold_batch_norm: training needs batch normalisation',
    )
    networks = set(method.branch_networks)
    found = 'an ensemble' if student.num_branches > 1 else student.config['network']
    allowed = f'a student that is {" and ".join(sorted(networks))}, not {found}'
    require(networks == {found}, 'model.init_from', directory, allowed)
    if set(label_names) == set(student.label_names):
        return student.for_classes(label_names, 'model.init_from')
    if label_names and method.num_branches == 1:
        classes.note(f'model.init_from={directory!r} has other classes: the classifier is random')
    return student


def from_student(state: TrainState, student: Student, label_names: tuple[str, ...]) -> TrainState:
    """Copies a student's parameters and statistics into the trunk and every branch of `state`.

    The classifiers are copied only to a single branch with the same classes. Otherwise they stay
    random: either the classes differ, or branches that start equal would learn the same.

    Args:
      state: of identical branches of the student's network.
      student: its image size may differ.
      label_names: of the data set.
    """
    num_branches = len(jax.tree.leaves(state.params['head'])[0])
    same_classes = list(label_names) == list(student.label_names)
    keeps_classifier = num_branches == 1 and same_classes

    def copy(collection: str, tree: dict[str, Any]) -> dict[str, Any]:
        source = dict(student.variables[collection])
        if student.order is not None and _CLASSIFIER in source:
            order = np.asarray(student.order)
            source[_CLASSIFIER] = jax.tree.map(lambda x: x[..., order], source[_CLASSIFIER])
        filled = dict(tree)
        for part in ('trunk', 'head'):
            for module, own in tree.get(part, {}).items():
                if module == _CLASSIFIER and not keeps_classifier:
                    continue
                new = jax.tree.map(
                    lambda old, new: jnp.broadcast_to(new, old.shape).astype(old.dtype),
                    own,
                    source[module],
                )
                filled[part] = {**filled[part], module: new}
        return filled

    return state.replace(
        params=copy('params', state.params), batch_stats=copy('batch_stats', state.batch_stats)
    )
