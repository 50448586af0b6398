"""The train step compiled ahead of its first call, so that its memory is known before training."""

import collections
import dataclasses
import math
from typing import Any, NoReturn

import jax
from jax.sharding import Mesh
from ml_collections import config_dict

from one_jax import config as config_lib
from one_jax import data
from one_jax.data.source import ResidentSource
from one_jax.errors import ConfigError
from one_jax.runtime import memory, parallel
from one_jax.students.evaluation import too_large
from one_jax.training import step as step_lib
from one_jax.training.evaluation import Evaluator
from one_jax.training.experiment import Experiment, make_experiment
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

    Args:
      experiment: of the run.
      mesh: of the run.
      num_steps: n, steps per call.
      num_examples: of the data set in device memory; 0 if batches bring their images.
      last_size: of the batch that ends every epoch, if smaller, or 0; for calls of one step.

    Attributes:
      memory: what one device needs and has, for the program that needs more.

    Raises:
      ConfigError: the compiler finds that the device has too little memory.
    """

    def __init__(
        self,
        experiment: Experiment,
        mesh: Mesh,
        num_steps: int = 1,
        num_examples: int = 0,
        last_size: int = 0,
    ):
        self._config, batch_size = experiment.config, experiment.config.data.batch_size
        self._share = batch_size // mesh.size
        initial_state = step_lib.make_initial_state(experiment, mesh)
        state = jax.eval_shape(initial_state, jax.ShapeDtypeStruct((), 'uint32'))
        train_step = step_lib.make_train_step(experiment, mesh)
        # By the shape of the mask.
        self._programs: dict[tuple[int, ...], jax.stages.Compiled] = {}
        memories = []
        for steps, size in [(num_steps, batch_size)] + [(1, last_size)] * bool(last_size):
            arguments = step_lib.abstract_arguments(
                experiment, mesh, state, steps, num_examples, size
            )
            program = self._compile(train_step.lower(*arguments))
            self._programs[steps, size] = program
            memories.append(_memory(program, *arguments))
        self.memory = max(memories, key=lambda memory: memory.needed)
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

    def _compile(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        try:
            return lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if 'RESOURCE_EXHAUSTED' not in str(error):
                raise
            reason = ' '.join(str(error).split())[:300]
            self._fail(f'the compiler reports: {reason}')

    def require_memory(self) -> None:
        """Raises `ConfigError`, with advice, if the device has too little memory."""
        if dataclasses.replace(self.memory, evaluation=0).is_too_large:
            self._fail(str(self.memory))
        if self.memory.is_too_large:
            raise too_large(self._config.data.eval_batch_size, str(self.memory))

    def _fail(self, reason: str) -> NoReturn:
        config, advice = self._config, []
        # XLA's CPU compiler keeps the activations of all parts, and undoes rematerialisation.
        if jax.default_backend() != 'cpu':
            parts = range(config.train.accumulation_steps + 1, self._share + 1)
            if finer := next((n for n in parts if self._share % n == 0), None):
                advice.append(f'--config.train.accumulation_steps={finer}')
            if config.model.remat != 'blocks':
                advice.append('--config.model.remat=blocks')
        if config.model.dtype != 'bfloat16':
            advice.append('--config.model.dtype=bfloat16')
        advice.append('a smaller --config.data.batch_size')
        raise ConfigError(
            'data.batch_size',
            config.data.batch_size,
            f'few enough images for the step to fit ({reason}); give {" or ".join(advice)}',
        )


def plan_memory(config: config_dict.ConfigDict, num_devices: int) -> Memory:
    """Compiles train step and evaluation for one device of this machine, with its share of a batch.

    Args:
      config: a whole configuration. The files of a data set in `DATASETS` need not be there.
      num_devices: devices that share the batch; they need not be there.

    Raises:
      UserError: the config is not valid, or its data set is neither known nor on disk.
    """
    config = config.copy_and_resolve_references()
    config.data.eval_batch_size += -config.data.eval_batch_size % num_devices
    config_lib.validate(config, num_devices)
    config.data.batch_size //= num_devices
    config.data.eval_batch_size //= num_devices
    parallel.use_compilation_cache(config.train.compilation_cache_dir)
    known = data.DATASETS.get(config.data.name)
    if known and known.num_train and not config.data.generated_examples:
        # Values of the normalisation take no part in the memory.
        statistics = {'mean': known.mean or (0.5,) * 3, 'std': known.std or (0.5,) * 3}
        source = ResidentSource(dataclasses.replace(known, **statistics), (), {})
    else:
        source = data.open(config.data)
    steps_per_epoch = max(1, source.spec.num_train // config.data.batch_size)
    config = config_lib.resolve(config)
    experiment = make_experiment(config, source.spec, source.label_names, steps_per_epoch)
    num_steps = min(config.train.steps_per_call or 1, config.train.log_every, steps_per_epoch)
    mesh = parallel.make_mesh(jax.local_devices()[:1])
    state = jax.eval_shape(experiment.initial_state, jax.ShapeDtypeStruct((), 'uint32'))
    evaluator = Evaluator(config, experiment.method, experiment.network, source, mesh)
    evaluation = evaluator.compile(state.evaluated_variables)
    memory = CompiledStep(experiment, mesh, num_steps).memory
    return dataclasses.replace(memory, evaluation=evaluation)


def _memory(
    compiled: jax.stages.Compiled, state: Any, batches: dict[str, Any], *teachers: Any
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
    available = memory.device_bytes(jax.local_devices()[0])
    return Memory(**sizes, temporaries=temporaries, available=available)


def _device_bytes(tree: Any) -> int:
    """One device's share of abstract arrays with shardings."""
    shapes = [(leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(tree)]
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)
