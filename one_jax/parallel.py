"""Data parallelism: one mesh axis, a step that is the same program on every device.

Several seeds that train at once have a second axis, in front of it.
"""

import math
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

DATA_AXIS, SEED_AXIS = 'data', 'seed'
# The batch axis comes first, or second behind an axis of steps.
BATCH, STEPS_AND_BATCH = P(DATA_AXIS), P(None, DATA_AXIS)
# The same of several seeds.
STEPS_SEEDS_AND_BATCH = P(None, SEED_AXIS, DATA_AXIS)
# Whole on every device; and with an axis of seeds in front.
REPLICATED, SEEDS, STEPS_AND_SEEDS = P(), P(SEED_AXIS), P(None, SEED_AXIS)


def use_compilation_cache(directory: str) -> None:
    """Keeps compiled programs in `directory` for later runs; '' leaves JAX's own setting."""
    if directory:
        jax.config.update('jax_compilation_cache_dir', os.path.expanduser(directory))


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with the one axis `DATA_AXIS` over `devices`, or over all devices of all processes.

    Process by process, so that each has a consecutive part of the batch; `jax.make_mesh` would
    order the devices of a TPU slice by their links.
    """
    devices = devices or sorted(jax.devices(), key=lambda x: (x.process_index, x.id))
    return Mesh(np.asarray(devices), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def seeds_mesh(mesh: Mesh, num_seeds: int) -> Mesh:
    """The devices of `mesh` as a grid for several seeds: `SEED_AXIS`, then `DATA_AXIS`.

    The devices are as many groups as divide both numbers: with 4 seeds, 8 devices are 4 pairs; with
    5 seeds they stay together, and each does a part of every seed's batch. So they do in several
    processes, each of which has its consecutive part of every seed's batch.
    """
    several = len({device.process_index for device in mesh.devices.flat}) > 1
    groups = 1 if several else math.gcd(num_seeds, mesh.size)
    devices = mesh.devices.reshape(groups, mesh.size // groups)
    return Mesh(devices, (SEED_AXIS, DATA_AXIS), axis_types=(AxisType.Auto,) * 2)


def data_devices(mesh: Mesh | AbstractMesh) -> int:
    """How many devices share a batch."""
    return mesh.shape[DATA_AXIS]


def has_seeds(mesh: Mesh | AbstractMesh) -> bool:
    """Whether `mesh` is of several seeds."""
    return SEED_AXIS in mesh.axis_names


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Puts a whole copy of every array on every device; all processes have the same arrays."""
    sharding = NamedSharding(mesh, REPLICATED)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    tree = jax.device_get(tree)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)


def shard_batch(batch: Any, mesh: Mesh, spec: P = BATCH) -> Any:
    """Splits the batch axis of every array over the devices.

    Args:
      batch: of several processes, this one's part.
      mesh: from `make_mesh` or `seeds_mesh`.
      spec: `BATCH`, `STEPS_AND_BATCH` or `STEPS_SEEDS_AND_BATCH`.
    """
    sharding = NamedSharding(mesh, spec)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def data_parallel(
    step: Callable[..., Any],
    mesh: Mesh,
    batch_specs: P | Callable[[Any], Any] = BATCH,
    state_spec: P = REPLICATED,
    out_specs: Any = REPLICATED,
    donate_state: bool = False,
) -> Callable[..., Any]:
    """Compiles `step(state, batch, *constants)` to run on every device's share of the batch.

    Inside, the second argument is the device's part and the constants are whole; what it returns
    must be equal on all devices that share a batch, e.g. after `lax.pmean`. The checks of
    `shard_map` enforce that.

    Args:
      step: a function of a tree, a batch, and any number of other replicated trees.
      mesh: from `make_mesh` or `seeds_mesh`.
      batch_specs: how the batch is cut, or a function of the batch that says so.
      state_spec: how the first argument is cut: not at all, or `SEEDS`.
      out_specs: of the result; see `jax.shard_map`.
      donate_state: give the first argument's buffers to the result.
    """

    def call(state, batch, *constants):
        cut = batch_specs(batch) if callable(batch_specs) else batch_specs
        in_specs = (state_spec, cut, *(REPLICATED for _ in constants))
        sharded = jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
        return sharded(state, batch, *constants)

    return jax.jit(call, donate_argnums=(0,) if donate_state else ())


def varying(tree: Any) -> Any:
    """Marks a replicated tree as the device's own copy, so that gradients are the device's own too.

    Without it, differentiating with respect to replicated parameters sums the gradient over devices
    already, and a `pmean` after that leaves it multiplied by their number.
    """
    return jax.tree.map(lambda x: lax.pcast(x, DATA_AXIS, to='varying'), tree)
