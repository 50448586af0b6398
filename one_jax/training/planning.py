"""Plans a run: what it needs and costs, by the compiler of the devices that it will run on."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import config_dict

from one_jax import config as config_lib
from one_jax import data, models
from one_jax.data import table
from one_jax.data.source import ResidentSource, Source
from one_jax.models import cost
from one_jax.runtime import compiled_program, memory, parallel, topology
from one_jax.training import compiled_step, feed
from one_jax.training import step as step_lib
from one_jax.training.compiled_step import Memory
from one_jax.training.evaluation import Evaluator
from one_jax.training.experiment import Experiment, make_experiment


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run needs and costs. Estimates are the compiler's; they leave out communication.

    Attributes:
      parameters, student_parameters: scalars of the network in training and of what is deployed.
      flops, student_flops: of one image's forward pass, 2 per multiply-add.
      num_devices: that share a batch.
      batch_size: images per step, over all devices.
      total_steps, epochs: of the run.
      memory: of one device.
      all_reduces, all_reduce_bytes: per step.
      cycles: of one device and step, by part and direction; empty if the compiler estimates none.
      step_flops, step_bytes: of one device and step, as the compiler counts them.
      chip: of the topology, or None.
    """

    parameters: int
    student_parameters: int
    flops: int
    student_flops: int
    num_devices: int
    batch_size: int
    total_steps: int
    epochs: float
    memory: Memory
    all_reduces: int
    all_reduce_bytes: int
    cycles: dict[tuple[str, str], int]
    step_flops: float
    step_bytes: float
    chip: topology.Chip | None = None

    @property
    def step_seconds(self) -> float | None:
        """Estimated seconds of a step."""
        return sum(self.cycles.values()) / self.chip.clock if self.cycles else None

    def as_dict(self) -> dict[str, Any]:
        """Returns all of it as JSON values."""
        fields = dataclasses.asdict(self)
        fields['cycles'] = {' '.join(part): count for part, count in self.cycles.items()}
        fields['memory']['needed'] = self.memory.needed
        return fields | {'step_seconds': self.step_seconds}

    def __str__(self) -> str:
        deployed = f'{self.student_parameters:,} parameters, {_flops(self.student_flops)} deployed'
        calls = 'all-reduce' if self.all_reduces == 1 else 'all-reduces'
        lines = [
            f'{self.parameters:,} parameters, {_flops(self.flops)} in training; {deployed}',
            f'{self.total_steps:,} steps of {self.batch_size} images, {self.epochs:g} epochs, on '
            f'{self.num_devices} devices; {self.all_reduces} {calls} of '
            f'{memory.readable_size(self.all_reduce_bytes)} per step',
            str(self.memory),
        ]
        if self.cycles:
            lines += self._estimates()
        return '\n'.join(lines)

    def _estimates(self) -> list[str]:
        seconds, total = self.step_seconds, sum(self.cycles.values())
        floors = self.step_flops / self.chip.flops, self.step_bytes / self.chip.bandwidth
        rate = self.batch_size / seconds
        parts = dict.fromkeys(part for part, _ in sorted(self.cycles, key=self.cycles.get)[::-1])
        shares = [
            f'{part} '
            + ' + '.join(
                f'{self.cycles[part, way] / 1e6:.2f}'
                for way in (compiled_program.FORWARD, compiled_program.BACKWARD)
                if (part, way) in self.cycles
            )
            for part in parts
        ]
        return [
            f'estimated cycles per step: {total / 1e6:.2f} M (forward + backward: '
            f'{", ".join(shares)})',
            f'estimated time per step: {1000 * seconds:.2f} ms without communication; at least '
            f'{1000 * floors[0]:.2f} ms for its FLOPs and {1000 * floors[1]:.2f} ms for its bytes',
            f'estimated speed: {rate / self.num_devices:,.0f} images/s per device, {rate:,.0f} in '
            f'all; {self.total_steps * seconds / 3600:.2f} hours of training steps',
        ]


def make_plan(
    config: config_dict.ConfigDict,
    num_devices: int | None = None,
    name: str | None = None,
    num_slices: int = 1,
) -> Plan:
    """Compiles train step and evaluation of a run, and reads what the compiler reports.

    Args:
      config: a whole configuration. The files of a data set in `DATASETS` need not be there.
      num_devices: that share a batch on this machine; they need not be there.
      name: of a TPU topology to compile for in place of this machine, see `topology.devices`.
      num_slices: of that topology.

    Raises:
      UserError: the config is not valid, or does not fit; its data set is neither known nor on
        disk; or there is no such topology.
    """
    config, chip = config.copy_and_resolve_references(), None
    if name is None:
        num_devices = num_devices or jax.device_count()
        _validate(config, num_devices)
        # One device, with its share of a batch.
        config.data.batch_size //= num_devices
        config.data.eval_batch_size //= num_devices
        mesh = parallel.make_mesh(jax.local_devices()[:1])
        available = memory.device_bytes(jax.local_devices()[0])
    else:
        mesh, chip = parallel.make_mesh(topology.devices(name, num_slices)), topology.chip(name)
        num_devices, available = mesh.size, chip.memory
        _validate(config, num_devices)
    parallel.use_compilation_cache(config.train.compilation_cache_dir)
    source, config = _source(config), config_lib.resolve(config)
    # Of whole batches over all devices.
    batch_size = config.data.batch_size * num_devices // mesh.size
    steps_per_epoch = max(1, source.spec.num_train // batch_size)
    experiment = make_experiment(config, source.spec, source.label_names, steps_per_epoch)
    program, needed = _compile(experiment, source, mesh, available)
    analysis, text = program.cost_analysis() or {}, program.as_text()
    parameters, flops = cost.forward_cost(experiment.network, source.spec.image_shape)
    student = models.make_backbone(experiment.method.branch_networks[0], source.spec.num_classes)()
    deployed = cost.forward_cost(student, source.spec.image_shape)
    count, size = compiled_program.all_reduces(text)
    return Plan(
        parameters,
        deployed[0],
        flops,
        deployed[1],
        num_devices,
        batch_size,
        experiment.total_steps,
        experiment.total_epochs,
        needed,
        count,
        size,
        compiled_program.estimated_cycles(text),
        analysis.get('flops', 0.0),
        analysis.get('bytes accessed', 0.0),
        chip,
    )


def largest_batch(fits: Callable[[int], bool], step: int) -> int:
    """Finds the largest batch that fits, to an eighth: doubles, then bisects.

    Args:
      fits: whether a batch of that many images fits.
      step: the number of devices; the result is a multiple of it, or 0.
    """
    low, high = 0, 1
    while fits(high * step):
        low, high = high, 2 * high
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step


def _validate(config: config_dict.ConfigDict, num_devices: int) -> None:
    # Another evaluation batch of about that size does as well.
    config.data.eval_batch_size += -config.data.eval_batch_size % num_devices
    config_lib.validate(config, num_devices)


def _source(config: config_dict.ConfigDict) -> Source:
    known = data.DATASETS.get(config.data.name)
    if not known or not known.num_train or config.data.generated_examples:
        return data.open(config.data)
    side = config.data.image_size
    spec = dataclasses.replace(
        known,
        image_shape=(side, side, 3) if side else known.image_shape,
        # Values of the normalisation take no part in the costs.
        mean=known.mean or (0.5,) * 3,
        std=known.std or (0.5,) * 3,
    )
    return ResidentSource(spec, (), {})


def _compile(
    experiment: Experiment, source: Source, mesh: Mesh, available: int | None
) -> tuple[jax.stages.Compiled, Memory]:
    """Compiles the evaluation and the train step; returns the latter and the memory of both."""
    config, spec, platform = experiment.config, experiment.spec, parallel.platform(mesh)
    size = spec.num_train * math.prod(spec.image_shape)
    on_device = not table.is_streamed(config.data) and feed.goes_on_device(
        config.data.placement, size, platform, available
    )
    num_steps = feed.steps_per_call(config, on_device, experiment.steps_per_epoch, platform)
    state = jax.eval_shape(experiment.initial_state, jax.ShapeDtypeStruct((), jnp.uint32))
    state = step_lib.abstract_arguments(experiment, mesh, state)[0]
    evaluator = Evaluator(config, experiment.method, experiment.network, source, mesh)
    evaluation = evaluator.compile(state.evaluated_variables)
    programs, needed = compiled_step.compile_step(
        experiment, mesh, available, num_steps, spec.num_train if on_device else 0
    )
    (program,) = programs.values()
    needed = dataclasses.replace(needed, evaluation=evaluation)
    compiled_step.require_memory(config, mesh, needed)
    return program, needed


def _flops(flops: int) -> str:
    return f'{flops / 1e9:.3f} GFLOPs'
