"""What a run can export: a branch, the ensemble or the teacher; and its accuracy."""

from collections.abc import Mapping
from typing import Any

from one_jax import methods, metrics
from one_jax.errors import require
from one_jax.models import cost, multibranch
from one_jax.students.config import ENSEMBLE, TEACHER, build_network, network_fields


def parse_branch(branch: int | str | None, method: methods.Method) -> int | str:
    """Returns a branch's number from 0, `ENSEMBLE` or `TEACHER`; for None what `method` deploys.

    Raises `ConfigError` if the method has no such branch, ensemble or teacher.
    """
    name = method.deployed.removeprefix('branch ') if branch is None else str(branch)
    allowed = f'0 to {method.num_branches - 1}'
    allowed += ''.join(f', or {whole!r}' for whole in _wholes(method))
    if name == TEACHER:
        allowed += f': with method.name={method.name!r} nothing weights the branches in this run'
    number = int(name) if name.isdecimal() else None
    exists = name in _wholes(method) or (number is not None and number < method.num_branches)
    require(exists, 'branch', branch, allowed)
    return name if number is None else number


def in_words(branch: int | str) -> str:
    """Describes an exported branch, ensemble or teacher."""
    ways = {
        ENSEMBLE: 'the mean of all branches',
        TEACHER: 'all branches weighted by the aggregator',
    }
    return f'{branch}, {ways[branch]}' if branch in ways else f'branch {branch}'


def _wholes(method: methods.Method) -> list[str]:
    """Returns the names of what is made of all branches."""
    if method.num_branches == 1:
        return []
    return [ENSEMBLE] if method.make_aggregator is None else [ENSEMBLE, TEACHER]


def select_variables(variables: Mapping[str, Any], branch: int | str) -> dict[str, Any]:
    """Selects the variables of a student from those of the network in training."""
    if isinstance(branch, int):
        return multibranch.student_variables(variables, branch)
    unused = 'aggregator' if branch == ENSEMBLE else None
    return {
        collection: {name: part for name, part in tree.items() if name != unused}
        for collection, tree in variables.items()
    }


def scores(evaluations: Mapping[str, Any], step: int, branch: int | str) -> dict[str, Any] | None:
    """Returns the 'split' and every measure of a branch, the ensemble or the teacher at `step`.

    `evaluations` has the run's last evaluation of each split; the test split is preferred. Returns
    None if none of them was at `step`.
    """
    for split in ('test', 'validation'):
        record = evaluations.get(split, {})
        if record.get('step') == step:
            kind = 'branch' if isinstance(branch, int) else branch
            values = {name: record[f'{kind}_{name}'] for name in metrics.MEASURES}
            if kind == 'branch':
                values = {name: each[branch] for name, each in values.items()}
            return {'split': split, **values}
    return None


def compare_choices(
    method: methods.Method,
    evaluations: Mapping[str, Any],
    step: int,
    description: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Compares what the method deploys with the ensemble and the teacher, if there are several.

    Returns for each 'branch', 'top1' in percent (None if not evaluated), 'parameters' and 'flops'.
    """
    rows = []
    for branch in dict.fromkeys([parse_branch(None, method), *_wholes(method)]):
        network = build_network(network_fields(method, branch, description['num_classes']))
        parameters, flops = cost.forward_cost(network, tuple(description['image_shape']))
        top1 = (scores(evaluations, step, branch) or {}).get('top1')
        rows.append({'branch': branch, 'top1': top1, 'parameters': parameters, 'flops': flops})
    return rows if len(rows) > 1 else []
