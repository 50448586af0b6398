"""Starting from an exported student instead of from random numbers: `config.model.init_from`."""

from typing import Any

import jax
import jax.numpy as jnp

from one_jax import methods
from one_jax import student as student_lib
from one_jax.errors import ConfigError, UserError
from one_jax.state import TrainState

_CLASSIFIER = 'fc'


def load(config: Any, method: methods.Method) -> student_lib.Student | None:
    """The student that `config.model.init_from` names, or None.

    Raises:
      ConfigError: the folder holds no student, or one of another network.
    """
    directory = config.model.init_from
    if not directory:
        return None
    try:
        student = student_lib.load_student(directory)
    except UserError as error:
        raise ConfigError('model.init_from', directory, f'an exported student: {error}') from None
    kinds = set(method.members)
    if student.config.get('batch_norm') == 'folded':
        allowed = 'a student that was exported without --fold_batch_norm: training needs it'
        raise ConfigError('model.init_from', directory, allowed)
    if student.num_branches > 1 or kinds != {student.config['network']}:
        found = 'an ensemble' if student.num_branches > 1 else student.config['network']
        allowed = f'a student that is {" and ".join(sorted(kinds))}: it is {found}'
        raise ConfigError('model.init_from', directory, allowed)
    return student


def start_from(
    state: TrainState, student: student_lib.Student, label_names: tuple[str, ...]
) -> TrainState:
    """A fresh state with the student's parameters and statistics in the trunk and in every branch.

    The classifiers are the student's only where there is one branch and the classes are the same.
    Otherwise they stay random: classes differ, and branches that start equal would learn the same.

    Args:
      state: from `init_state`, of copies of the student's network.
      student: its image size may be another.
      label_names: of the data set.
    """
    params = state.params
    num_branches = len(jax.tree.leaves(params['head'])[0])
    keep = num_branches == 1 and list(label_names) == list(student.label_names)

    def fill(collection: str, tree: dict[str, Any]) -> dict[str, Any]:
        source = student.variables[collection]
        filled = dict(tree)
        if 'trunk' in tree:
            filled['trunk'] = _like(tree['trunk'], source)
        filled['head'] = {
            module: own
            if module == _CLASSIFIER and not keep
            else jax.tree.map(
                lambda old, new: jnp.broadcast_to(new, old.shape).astype(old.dtype),
                own,
                source[module],
            )
            for module, own in tree['head'].items()
        }
        return filled

    state = state.replace(
        params=fill('params', params), batch_stats=fill('batch_stats', state.batch_stats)
    )
    return state.with_fresh_averages()


def _like(tree: dict[str, Any], source: dict[str, Any]) -> dict[str, Any]:
    return {
        module: jax.tree.map(lambda old, new: new.astype(old.dtype), own, source[module])
        for module, own in tree.items()
    }
