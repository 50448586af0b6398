"""Names of TPU topologies; tests/slow compiles for real ones."""

import importlib.util
import math

import pytest

from one_jax.errors import ConfigError, UserError
from one_jax.runtime import topology


@pytest.mark.parametrize(
    'name', ['', 'v5e', 'v5e:', 'v5e:2', 'v9:2x2', 'v5e:0x2', 'v5e:32x32', 'v5e:2x2x2x2', 'v5e:ax2']
)
def test_devices_of_an_unknown_topology_is_an_error_with_an_example(name):
    with pytest.raises(ConfigError, match=r'^topology=.*v5e:2x4'):
        topology.devices(name)


def test_devices_without_libtpu_is_an_error_with_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'one_jax\[tpu\]'"):
        topology.devices('v5e:2x2')


@pytest.mark.parametrize('generation', topology.CHIPS)
def test_chip_peak_is_a_whole_number_of_matrix_units(generation):
    """A matrix unit multiplies and adds 128 x 128, or 256 x 256, numbers per cycle."""
    chip = topology.chip(f'{generation}:2x2')
    side = 256 if generation == 'v6e' else 128
    units = chip.flops / (2 * side**2 * chip.clock)
    assert math.isclose(units, round(units), rel_tol=0.01)
