"""Several seeds at once: each array of the state has an axis of seeds in front."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from ml_collections import config_dict

from one_jax import parallel
from one_jax.checkpoint import Restored
from one_jax.errors import UserError
from one_jax.run import Run


def folder(seed: int) -> str:
    """The name of a seed's workdir, in that of all."""
    return f'seed-{seed}'


def config_of(config: Any, seed: int) -> config_dict.ConfigDict:
    """The config of one of the seeds, as if it were trained alone."""
    alone = config_dict.ConfigDict(config.to_dict())
    alone.update({'seed': seed, 'seeds': ()})
    return alone.lock()


def stack(states: Sequence[Any], mesh: Mesh) -> Any:
    """The state of all seeds, each of which has its place on the devices of its group.

    Args:
      states: of each seed, alike in their shapes.
      mesh: from `parallel.seeds_mesh`.
    """
    placed = NamedSharding(mesh, parallel.SEEDS)
    return jax.jit(
        lambda *trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees),
        out_shardings=placed,
    )(*states)


class Unstacker:
    """Takes single seeds out of the state of all, whole on every device.

    Args:
      mesh: from `parallel.make_mesh`.
      count: how many seeds there are; of one alone, the state has no such axis.
    """

    def __init__(self, mesh: Mesh, count: int):
        self._count = count
        self._take = jax.jit(
            lambda tree, index: jax.tree.map(lambda x: x[index], tree),
            out_shardings=NamedSharding(mesh, parallel.REPLICATED),
        )

    def __call__(self, tree: Any) -> Iterator[Any]:
        """One seed after the other, so that there is one copy at a time."""
        if self._count == 1:
            yield tree
            return
        for index in range(self._count):
            yield self._take(tree, index)


def restore(runs: Sequence[Run], template: Any) -> list[Restored | None]:
    """The checkpoints from which the runs can go on together: the newest step that all have.

    Killed between the saves of two of them, some are one save ahead: they make those steps again.

    Raises:
      UserError: they are further apart; or a checkpoint cannot be read.
    """
    newest = [run.checkpoints.restore_latest(template) for run in runs]
    steps = [0 if restored is None else restored.step for restored in newest]
    common = min(steps)
    for index, run in enumerate(runs):
        saved = run.checkpoints.steps()
        if steps[index] == common:
            continue
        if common in saved:
            newest[index] = run.checkpoints.restore(common, template)
        elif common == 0 and len(saved) == 1:
            newest[index] = None
        else:
            behind = runs[steps.index(common)].recipe.config.seed
            raise UserError(
                f'seeds={[run.recipe.config.seed for run in runs]} cannot go on together: '
                f'seed {run.recipe.config.seed} is at step {steps[index]}, seed {behind} at '
                f'{common}; train those behind alone, or in another --workdir'
            )
    return newest
