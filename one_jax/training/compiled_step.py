"""The train step compiled ahead of its first call, so that its memory is known before training."""

import collections
import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Mesh

from one_jax.errors import ConfigError
from one_jax.runtime import memory, parallel
from one_jax.students.evaluation import too_large
from one_jax.training import step as step_lib
from one_jax.training.experiment import Experiment
from one_jax.training.state import TrainState

# Calls that may be in flight: enough to keep the device busy, few enough that a signal is obeyed
# soon and that few batches wait in device memory.
MAX_CALLS_IN_FLIGHT = 4


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of one device in bytes; None is what the compiler or the device does not report."""

    # Parameters, running statistics, optimiser state and averages; the frozen teachers; the
    # device's share of the batches of one call; the training images in its memory.
    state: int
    teachers: int
    batch: int
    examples: int
    # Activations, gradients and everything else.
    temporaries: int | None
    # What the device has for this process.
    available: int | None
    # The batch and the temporaries of an evaluation, which takes the place of a step's.
    evaluation: int = 0

    @property
    def needed(self) -> int:
        step = self.batch + (self.temporaries or 0)
        return self.state + self.teachers + self.examples + max(step, self.evaluation)

    @property
    def is_too_large(self) -> bool:
        return self.available is not None and self.needed > self.available

    def __str__(self) -> str:
        parts = {
            'state': self.state,
            'teachers': self.teachers,
            'data set': self.examples,
            'batch': self.batch,
            'temporaries': self.temporaries,
        }
        shown = [f'{name} {memory.readable_size(size)}' for name, size in parts.items() if size]
        if self.evaluation:
            shown[-1] += f', or evaluation {memory.readable_size(self.evaluation)}'
        line = f'memory per device: {memory.readable_size(self.needed)} ({", ".join(shown)})'
        if self.temporaries is None:
            line += ' and temporaries that the compiler does not report'
        if self.available is None:
            return line
        return f'{line} of {memory.readable_size(self.available)}'


class CompiledStep:
    """The compiled train step of an experiment, with its frozen teachers' variables.

    The arguments and errors are those of `compile_step`.

    Attributes:
      memory: what one device needs and has.
    """

    def __init__(
        self,
        experiment: Experiment,
        mesh: Mesh,
        num_steps: int = 1,
        num_examples: int = 0,
        last_size: int = 0,
    ):
        self._config, self._mesh = experiment.config, mesh
        available = memory.device_bytes(jax.local_devices()[0])
        self._programs, self.memory = compile_step(
            experiment, mesh, available, num_steps, num_examples, last_size
        )
        variables = [teacher.variables for teacher in experiment.teachers]
        self._teacher_variables = parallel.replicate(variables, mesh)
        self._in_flight: collections.deque[jax.Array] = collections.deque()

    def __call__(self, state: TrainState, batches: dict[str, Any]) -> TrainState:
        """Makes the steps of one call and returns the new state; does not wait for the device."""
        program = self._programs[batches['mask'].shape]
        state, done = program(state, batches, *self._teacher_variables)
        self._in_flight.append(done)
        if len(self._in_flight) > MAX_CALLS_IN_FLIGHT:
            jax.block_until_ready(self._in_flight.popleft())
        return state

    def require_memory(self) -> None:
        """Raises `ConfigError`, with advice, if the device has too little memory."""
        require_memory(self._config, self._mesh, self.memory)


def compile_step(
    experiment: Experiment,
    mesh: Mesh,
    available: int | None,
    num_steps: int = 1,
    num_examples: int = 0,
    last_size: int = 0,
) -> tuple[dict[tuple[int, ...], jax.stages.Compiled], Memory]:
    """Compiles the train step for the devices of `mesh`, which need not be there.

    Args:
      experiment: of the run.
      mesh: of the run.
      available: bytes that one device has, if known.
      num_steps: n, steps per call.
      num_examples: of the data set in device memory; 0 if batches bring their images.
      last_size: of the batch that ends every epoch, if smaller, or 0; for calls of one step.

    Returns:
      The programs by the shape of a call's mask, and what the one needs that needs more memory.

    Raises:
      ConfigError: the compiler finds that a device has too little memory.
    """
    config = experiment.config
    initial_state = step_lib.make_initial_state(experiment, mesh)
    state = jax.eval_shape(initial_state, jax.ShapeDtypeStruct((), 'uint32'))
    train_step = step_lib.make_train_step(experiment, mesh)
    programs, memories = {}, []
    for shape in [(num_steps, config.data.batch_size)] + [(1, last_size)] * bool(last_size):
        steps, size = shape
        arguments = step_lib.abstract_arguments(experiment, mesh, state, steps, num_examples, size)
        try:
            programs[shape] = train_step.lower(*arguments).compile()
        except jax.errors.JaxRuntimeError as error:
            if 'RESOURCE_EXHAUSTED' not in str(error):
                raise
            reason = ' '.join(str(error).split())[:300]
            raise _too_large(config, mesh, f'the compiler reports: {reason}') from None
        memories.append(_memory(programs[shape], available, *arguments))
    return programs, max(memories, key=lambda memory: memory.needed)


def require_memory(config: Any, mesh: Mesh, memory: Memory) -> None:
    """Raises `ConfigError`, with advice, if a device has too little memory."""
    if dataclasses.replace(memory, evaluation=0).is_too_large:
        raise _too_large(config, mesh, str(memory))
    if memory.is_too_large:
        raise too_large(config.data.eval_batch_size, str(memory))


def _too_large(config: Any, mesh: Mesh, reason: str) -> ConfigError:
    advice = []
    # XLA's CPU compiler keeps the activations of all parts, and undoes rematerialisation.
    if parallel.platform(mesh) != 'cpu':
        share = config.data.batch_size // mesh.size
        parts = range(config.train.accumulation_steps + 1, share + 1)
        if finer := next((n for n in parts if share % n == 0), None):
            advice.append(f'--config.train.accumulation_steps={finer}')
        if config.model.remat != 'blocks':
            advice.append('--config.model.remat=blocks')
    if config.model.dtype != 'bfloat16':
        advice.append('--config.model.dtype=bfloat16')
    advice.append('a smaller --config.data.batch_size')
    return ConfigError(
        'data.batch_size',
        config.data.batch_size,
        f'few enough images for the step to fit ({reason}); give {" or ".join(advice)}',
    )


def _memory(
    compiled: jax.stages.Compiled,
    available: int | None,
    state: Any,
    batches: dict[str, Any],
    *teachers: Any,
) -> Memory:
    examples = _device_bytes(batches.get('examples', ()))
    sizes = {
        'state': _device_bytes(state),
        'teachers': _device_bytes(teachers),
        'batch': _device_bytes(batches) - examples,
        'examples': examples,
    }
    total = memory.program_bytes(compiled)
    temporaries = None if total is None else max(total - sum(sizes.values()), 0)
    return Memory(**sizes, temporaries=temporaries, available=available)


def _device_bytes(tree: Any) -> int:
    """One device's share of abstract arrays with shardings."""
    shapes = [(leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(tree)]
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)
