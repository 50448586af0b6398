"""What can be taken out of a run (a branch, the ensemble, the teacher), and its records."""

from collections.abc import Mapping
from typing import Any

from one_jax import evaluate, methods
from one_jax import student as student_lib
from one_jax.errors import ConfigError
from one_jax.models import cost
from one_jax.models.multibranch import (
    aggregator_variables,
    join_ensemble,
    split_ensemble,
    student_variables,
)

ENSEMBLE, TEACHER = 'ensemble', 'teacher'
# What of the config tells the data set apart, wherever it is: evaluation of the student takes it.
DATA_FIELDS = ('name', 'generated_examples', 'image_size', 'stream')


def parse_branch(branch: int | str | None, method: methods.Method) -> int | str:
    """What `branch` names: a number from 0, 'ensemble' or 'teacher'; None is what is deployed.

    Raises:
      ConfigError: the method has no such thing.
    """
    wanted = method.deployed.removeprefix('branch ') if branch is None else str(branch)
    if wanted in _predictors(method) or (wanted.isdecimal() and int(wanted) < method.num_branches):
        return int(wanted) if wanted.isdecimal() else wanted
    allowed = f'0 to {method.num_branches - 1}'
    allowed += ''.join(f', or {name!r}' for name in _predictors(method))
    if wanted == TEACHER:
        allowed += f': with method.name={method.name!r} nothing weighs the branches in this run'
    raise ConfigError('branch', branch, allowed)


def _predictors(method: methods.Method) -> list[str]:
    """What is made of all branches."""
    if method.num_branches == 1:
        return []
    return [ENSEMBLE] if method.make_aggregator is None else [ENSEMBLE, TEACHER]


def describe_network(method: methods.Method, branch: int | str, num_classes: int) -> dict[str, Any]:
    """The part of config.json that `student.make_network` reads."""
    if isinstance(branch, int):
        return {'network': method.members[branch], 'num_classes': num_classes}
    ensemble = {
        'members': list(method.members),
        'share_stages': method.share_stages,
        'share_stem': method.shares_stem,
    }
    if branch == TEACHER:
        ensemble['aggregator'] = {'method': method.name, 'settings': method.settings}
    # The network that the run is named after is the first member's.
    return {'network': method.members[0], 'num_classes': num_classes, 'ensemble': ensemble}


def describe_data(config: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """The part of config.json that says what images the network takes, and of which classes.

    Args:
      config: of the run.
      data: what the run noted of its data set.
    """
    return {
        'label_names': data['label_names'],
        'input_size': data['image_shape'][:2],
        'channels': 'RGB',
        # Of runs from before it was noted, the whole image.
        'crop': data.get('crop', 1.0),
        'mean': data['mean'],
        'std': data['std'],
        'data': {field: config.data[field] for field in DATA_FIELDS},
    }


def select_variables(
    variables: Mapping[str, Any], method: methods.Method, branch: int | str
) -> dict[str, Any]:
    """The variables of what is deployed, out of those of the network in training."""
    if isinstance(branch, int):
        return student_variables(variables, branch)
    parts = split_ensemble(variables, method.num_branches)
    selected = join_ensemble(parts, alike=len(set(method.members)) == 1)
    if branch == TEACHER:
        for name, tree in aggregator_variables(variables).items():
            selected[name] = {**selected.get(name, {}), 'aggregator': tree}
    return selected


def find_record(
    evaluations: Mapping[str, dict[str, Any]], step: int
) -> tuple[str, dict[str, Any]] | None:
    """The evaluation at this step, on the test split if there was one, and the split's name."""
    for split in ('test', 'validation'):
        record = evaluations.get(split)
        if record is not None and record['step'] == step:
            return split, record
    return None


def score(record: Mapping[str, Any], measure: str, branch: int | str) -> float:
    """What a branch, the ensemble or the teacher has of a measure in an evaluation."""
    if isinstance(branch, int):
        return record[f'branch_{measure}'][branch]
    return record[f'{branch}_{measure}']


def metric(found: tuple[str, dict[str, Any]] | None, branch: int | str) -> dict[str, Any] | None:
    """What `branch` scored, with its 'split'; `found` is from `find_record`."""
    if found is None:
        return None
    split, record = found
    return {'split': split, **{name: score(record, name, branch) for name in evaluate.MEASURES}}


def compare_predictors(
    method: methods.Method,
    found: tuple[str, dict[str, Any]] | None,
    num_classes: int,
    image_shape: tuple[int, int, int],
) -> list[dict[str, Any]]:
    """Accuracy and cost of what a run could deploy: what it does, the ensemble, and the teacher.

    Returns:
      For each its 'predictor' in words, 'top1' in percent (None, where it was not evaluated),
      'parameters' and 'flops'; nothing for a run of one network.
    """
    rows = []
    for branch in dict.fromkeys([parse_branch(None, method), *_predictors(method)]):
        network = student_lib.make_network(describe_network(method, branch, num_classes))
        parameters, flops = cost.forward_cost(network, image_shape)
        rows.append(
            {
                'predictor': in_words(branch),
                'top1': found and score(found[1], 'top1', branch),
                'parameters': parameters,
                'flops': flops,
            }
        )
    return rows if len(rows) > 1 else []


def in_words(branch: int | str) -> str:
    """What is deployed, for people."""
    words = {
        ENSEMBLE: 'ensemble, the mean of all branches',
        TEACHER: 'teacher, all branches weighed by the aggregator',
    }
    return words.get(branch, f'branch {branch}')
