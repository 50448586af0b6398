"""TPU topologies without a TPU: devices to compile for, with libtpu alone."""

import dataclasses
import importlib.util
import os
import re

import jax

from one_jax.errors import ConfigError, UserError, require


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device of a TPU generation, as Google Cloud documents it.

    Attributes:
      memory: bytes of HBM.
      flops: per second, of bfloat16 matrix products.
      bandwidth: bytes of HBM read or written per second.
      clock: cycles per second, which follow from `flops` and the number of matrix units.
    """

    memory: int
    flops: float
    bandwidth: float
    clock: float


_GIB = 2**30
# Without a TPU, libtpu counts the two cores of a v4 chip as two devices.
CHIPS = {
    'v4': Chip(16 * _GIB, 137.5e12, 614e9, 1.05e9),
    'v5e': Chip(16 * _GIB, 197e12, 819e9, 1.5e9),
    'v5p': Chip(95 * _GIB, 459e12, 2765e9, 1.75e9),
    'v6e': Chip(32 * _GIB, 918e12, 1640e9, 1.75e9),
}
MAX_CHIPS = 256
_HELP = (
    f'a TPU generation ({", ".join(CHIPS)}) and the shape of its slice, such as v5e:2x4, v5p:2x2x1 '
    f'or v5e:1x1, of at most {MAX_CHIPS} chips'
)
# libtpu would look for the TPU of this machine, and print that there is none.
_ENVIRONMENT = {
    'TPU_SKIP_MDS_QUERY': '1',
    # No chip is used: other processes may have them.
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_MIN_LOG_LEVEL': '3',
    'TPU_STDERR_LOG_LEVEL': '3',
}


def chip(topology: str) -> Chip:
    """Returns the chip of a topology such as 'v5e:4x4'."""
    return CHIPS[topology.partition(':')[0]]


def devices(topology: str, num_slices: int = 1) -> list[jax.Device]:
    """Returns the devices of slices of TPUs, for which programs can be compiled, not run.

    Args:
      topology: e.g. 'v5e:2x4'.
      num_slices: how many of them, connected by the data center's network.

    Raises:
      UserError: there is no such topology, or libtpu is not installed.
    """
    match = re.fullmatch(rf'({"|".join(CHIPS)}):(\d+)x(\d+)(?:x(\d+))?', topology)
    require(match is not None, 'topology', topology, _HELP)
    sides = tuple(int(side) for side in match.groups()[1:] if side)
    chips = num_slices
    for side in sides:
        chips *= side
    require(0 < chips <= MAX_CHIPS, 'topology', topology, _HELP)
    if importlib.util.find_spec('libtpu') is None:
        raise UserError(
            f"topology={topology!r} needs the TPU's compiler: pip install 'one_jax[tpu]' (no TPU "
            'is needed)'
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    # The compiler assumes hosts of 2x2 chips, which a single chip is not.
    options = {'chips_per_host_bounds': (1, 1, 1)} if set(sides) == {1} else {}
    if num_slices > 1:
        options['num_slices'] = num_slices
    try:
        found = topologies.get_topology_desc(topology, 'tpu', **options)
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        reason = str(error).partition('\n')[0]
        raise ConfigError('topology', topology, f'{_HELP} ({reason})') from None
    return list(found.devices)
