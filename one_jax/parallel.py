"""Data parallelism: one mesh axis, a step that is the same program on every device."""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

DATA_AXIS = 'data'
# The batch axis comes first, or second behind an axis of steps.
BATCH, STEPS_AND_BATCH = P(DATA_AXIS), P(None, DATA_AXIS)


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


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Puts a whole copy of every array on every device; all processes have the same arrays."""
    sharding = NamedSharding(mesh, P())
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    tree = jax.device_get(tree)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)


def shard_batch(batch: Any, mesh: Mesh, spec: P = BATCH) -> Any:
    """Splits the batch axis of every array over the devices.

    Args:
      batch: of several processes, this one's part.
      mesh: from `make_mesh`.
      spec: `BATCH` or `STEPS_AND_BATCH`.
    """
    sharding = NamedSharding(mesh, spec)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def data_parallel(
    step: Callable[..., Any], mesh: Mesh, batch_spec: P = BATCH, donate_state: bool = False
) -> Callable[..., Any]:
    """Compiles `step(replicated, batch, *constants)` to run on every device's share of the batch.

    Inside, the second argument is the device's part and all others are whole; what it returns must
    be equal on all devices, e.g. after `lax.pmean`. The checks of `shard_map` enforce that.

    Args:
      step: a function of a replicated tree, a batch, and any number of other replicated trees.
      mesh: from `make_mesh`.
      batch_spec: `BATCH` or `STEPS_AND_BATCH`.
      donate_state: give the first argument's buffers to the result.
    """

    def call(replicated, batch, *constants):
        in_specs = (P(), batch_spec, *(P() for _ in constants))
        sharded = jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=P())
        return sharded(replicated, batch, *constants)

    return jax.jit(call, donate_argnums=(0,) if donate_state else ())


def varying(tree: Any) -> Any:
    """Marks a replicated tree as the device's own copy, so that gradients are the device's own too.

    Without it, differentiating with respect to replicated parameters sums the gradient over devices
    already, and a `pmean` after that leaves it multiplied by their number.
    """
    return jax.tree.map(lambda x: lax.pcast(x, DATA_AXIS, to='varying'), tree)
