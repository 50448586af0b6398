"""Data parallelism: one mesh axis, and a step that is the same program on every device."""

import os
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from one_jax.errors import ConfigError
from one_jax.fields import DEFAULT_CACHE

DATA_AXIS = 'data'
# The batch axis comes first, or second behind an axis of steps.
BATCH, STEPS_AND_BATCH, REPLICATED = P(DATA_AXIS), P(None, DATA_AXIS), P()


def use_compilation_cache(directory: str, required: bool = True) -> None:
    """Caches compiled programs in `directory` for later runs; '' keeps JAX's own setting.

    Raises:
      ConfigError: it is required, not the default, and cannot be written. Otherwise a note is
        printed, and nothing is cached.
    """
    path = os.path.expanduser(directory)
    try:
        if path and '://' not in path:  # JAX writes to buckets too.
            os.makedirs(path, exist_ok=True)
            with tempfile.TemporaryFile(dir=path) as file:
                file.write(bytes(4096))
    except (OSError, ValueError) as error:
        allowed = f"a folder that can be written ({error}), or '' for no cache"
        note = ConfigError('train.compilation_cache_dir', directory, allowed)
        if required and directory != DEFAULT_CACHE:
            raise note from None
        if jax.process_index() == 0:
            print(f'no cache of compiled programs: {note}')
        path = ''
    if path:
        jax.config.update('jax_compilation_cache_dir', path)


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """Returns a mesh with the axis `DATA_AXIS` over `devices`, or over those of all processes.

    Devices are ordered by process, so that each process holds a consecutive part of the batch;
    `jax.make_mesh` would order the devices of a TPU slice by their links.
    """
    devices = devices or sorted(jax.devices(), key=lambda x: (x.process_index, x.id))
    return Mesh(np.asarray(devices), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def platform(mesh: Mesh | AbstractMesh) -> str:
    """Returns what a program for `mesh` is compiled for: 'cpu', 'gpu' or 'tpu'.

    That is not this machine's if only the compiler is here. It is for an abstract mesh without a
    device.
    """
    if isinstance(mesh, Mesh):
        return mesh.devices.flat[0].platform
    device = mesh.abstract_device
    return jax.default_backend() if device is None else device.platform


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Copies every array to every device; all processes must pass equal arrays."""
    sharding = NamedSharding(mesh, REPLICATED)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    tree = jax.device_get(tree)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)


def shard_batch(batch: Any, mesh: Mesh, spec: P = BATCH) -> Any:
    """Splits the batch axis of every array over the devices; each process passes its own part."""
    sharding = NamedSharding(mesh, spec)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def data_parallel(
    step: Callable[..., Any],
    mesh: Mesh,
    batch_specs: P | Callable[[Any], Any] = BATCH,
    donate_state: bool = False,
) -> Callable[..., Any]:
    """Compiles `step(state, batch, *constants)` to run on every device's share of the batch.

    Inside, `batch` is the device's share, and everything else is replicated. The result must be
    equal on all devices, e.g. after `lax.pmean`; `shard_map` checks that.

    Args:
      step: a function of a tree, a batch and any number of other trees.
      mesh: devices.
      batch_specs: how to split the batch, or a function of the batch that returns it.
      donate_state: whether the result takes over the buffers of `state`.
    """

    def call(state, batch, *constants):
        split = batch_specs(batch) if callable(batch_specs) else batch_specs
        in_specs = (REPLICATED, split, *(REPLICATED for _ in constants))
        sharded = jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=REPLICATED)
        return sharded(state, batch, *constants)

    return jax.jit(call, donate_argnums=(0,) if donate_state else ())


def varying(tree: Any) -> Any:
    """Marks a replicated tree as local to each device, so that its gradients are local too.

    Otherwise differentiating with respect to replicated parameters already sums the gradient over
    devices, and a `pmean` after that leaves it multiplied by their number.
    """
    return jax.tree.map(lambda x: lax.pcast(x, DATA_AXIS, to='varying'), tree)
