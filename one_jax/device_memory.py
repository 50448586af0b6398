"""What a train step needs of one device's memory, and whether the device has it.

    python -m one_jax.device_memory --config=configs/X.py [--devices=8] [--compile]

plans a run: nothing is trained, and no data is read.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.extend import core
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import config_dict, config_flags

from one_jax import command, parallel, processes
from one_jax import config as config_lib
from one_jax.data import memory
from one_jax.data.table import DATASETS
from one_jax.errors import ConfigError, UserError
from one_jax.recipe import Recipe, make_recipe
from one_jax.train_step import make_train_step


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Memory of one device, in bytes.

    Attributes:
      state: parameters, running statistics, optimiser's state, averages: exact.
      teachers: the frozen teachers: exact.
      batch: the device's share of what one call of the step is given: exact.
      examples: the training images that wait in its memory: exact.
      temporaries: activations kept for the backward pass, gradients, and all else.
      measured: whether `temporaries` is the compiler's own number; if not, see `peak_bytes`.
      available: what the device has for this process, or None where it does not tell.
    """

    state: int
    teachers: int
    batch: int
    temporaries: int
    measured: bool
    available: int | None = None
    examples: int = 0

    @property
    def needed(self) -> int:
        """All of it."""
        return self.state + self.teachers + self.batch + self.examples + self.temporaries

    @property
    def too_large(self) -> bool:
        """Whether it is known that the step does not fit; an unmeasured one gets the benefit."""
        return self.measured and self.available is not None and self.needed > self.available

    def __str__(self) -> str:
        parts = {
            'state': self.state,
            'teachers': self.teachers,
            'data set': self.examples,
            'batch': self.batch,
        }
        shown = [f'{name} {memory.readable_size(size)}' for name, size in parts.items() if size]
        about = '' if self.measured else 'about '
        shown.append(f'temporaries {about}{memory.readable_size(self.temporaries)}')
        line = f'memory a device: {about}{memory.readable_size(self.needed)} ({", ".join(shown)})'
        if self.available is None:
            return line
        return f'{line} of {memory.readable_size(self.available)}'


def abstract_arguments(
    recipe: Recipe,
    mesh: Mesh | AbstractMesh,
    num_steps: int = 1,
    num_seeds: int = 1,
    num_examples: int = 0,
) -> tuple:
    """What the train step is called with, as shapes: state, batches and each teacher's variables.

    Args:
      recipe: of the run.
      mesh: of the run, or an abstract one.
      num_steps: steps a call.
      num_seeds: S, that train at once on a `parallel.seeds_mesh`.
      num_examples: of the data set that waits in device memory; 0: images come with every call.

    Returns:
      `jax.ShapeDtypeStruct`s with shardings, at the places of the arrays.
    """
    has_seeds = parallel.has_seeds(mesh)

    def placed(tree: Any, spec: P, front: tuple[int, ...] = ()) -> Any:
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((*front, *x.shape), x.dtype, sharding=sharding), tree
        )

    state = jax.eval_shape(recipe.random_state)
    size, shape = recipe.config.data.batch_size, recipe.spec.image_shape
    mask = jax.ShapeDtypeStruct((size,), jnp.float32)
    label = jax.ShapeDtypeStruct((size,), jnp.int32)
    image = jax.ShapeDtypeStruct((size, *shape), jnp.uint8)
    batch = {'mask': mask, 'index': label}
    if not num_examples:
        batch = {'mask': mask, 'label': label, 'image': image}
    if has_seeds:
        batch = placed(batch, parallel.STEPS_SEEDS_AND_BATCH, (num_steps, num_seeds))
        state = placed(state, parallel.SEEDS, (num_seeds,))
    else:
        batch = placed(batch, parallel.STEPS_AND_BATCH, (num_steps,))
        state = placed(state, parallel.REPLICATED)
    if num_examples:
        examples = {
            'image': jax.ShapeDtypeStruct((num_examples, *shape), jnp.uint8),
            'label': jax.ShapeDtypeStruct((num_examples,), jnp.int32),
        }
        batch['examples'] = placed(examples, parallel.REPLICATED)
    if num_steps > 1:
        batch['count'] = placed(jax.ShapeDtypeStruct((), jnp.int32), parallel.REPLICATED)
    teachers = [teacher.variables for teacher in recipe.teachers]
    return state, batch, *placed(teachers, parallel.REPLICATED)


class CompiledSteps:
    """A train step that is compiled before its arguments are there, so that its need is known.

    Called as the step itself, it does the same: each number of steps a call is compiled once.

    Args:
      train_step: from `make_train_step`.
      recipe: of the run.
      mesh: of the run; an abstract one will do for an estimate without the compiler.
      num_seeds: see `abstract_arguments`.
      num_examples: see there too.
    """

    def __init__(
        self,
        train_step: Callable[..., Any],
        recipe: Recipe,
        mesh: Mesh | AbstractMesh,
        num_seeds: int = 1,
        num_examples: int = 0,
    ):
        self._train_step, self._recipe, self._mesh = train_step, recipe, mesh
        self._num_seeds, self._num_examples = num_seeds, num_examples
        self._compiled: dict[int, jax.stages.Compiled] = {}

    def __call__(self, state: Any, batch: dict[str, Any], *teacher_variables: Any) -> Any:
        """Makes as many steps as there are batches, or as 'count' says."""
        return self._compile(len(batch['mask']))(state, batch, *teacher_variables)

    def estimate(self, num_steps: int = 1, compiles: bool = True) -> Estimate:
        """What one device needs, and what this machine's first one has.

        Args:
          num_steps: steps a call.
          compiles: whether to ask the compiler for the temporaries.

        Raises:
          ConfigError: the compiler itself finds that there is too little.
        """
        arguments = self._arguments(num_steps)
        state, batch, *teachers = (_device_bytes(argument) for argument in arguments)
        total = _compiled_bytes(self._compile(num_steps)) if compiles else None
        if total is None:
            temporaries = peak_bytes(self._train_step.trace(*arguments).jaxpr.jaxpr)
        else:
            temporaries = max(total - state - batch - sum(teachers), 0)
        available = available_bytes(jax.local_devices()[0])
        examples = _device_bytes(arguments[1].get('examples', ()))
        measured = total is not None
        return Estimate(
            state, sum(teachers), batch - examples, temporaries, measured, available, examples
        )

    def require_memory(self, num_steps: int) -> None:
        """Prints the estimate; all processes stop if the device of one has less.

        Raises:
          UserError: with advice.
        """
        error = None
        try:
            estimate = self.estimate(num_steps)
            if processes.is_first():
                print(estimate)
            if estimate.too_large:
                error = self._too_large(str(estimate))
        except ConfigError as raised:
            error = raised
        processes.agree({}, error)

    def _arguments(self, num_steps: int) -> tuple:
        return abstract_arguments(
            self._recipe, self._mesh, num_steps, self._num_seeds, self._num_examples
        )

    def _compile(self, num_steps: int) -> jax.stages.Compiled:
        if num_steps not in self._compiled:
            lowered = self._train_step.lower(*self._arguments(num_steps))
            try:
                self._compiled[num_steps] = lowered.compile()
            except jax.errors.JaxRuntimeError as error:
                if 'RESOURCE_EXHAUSTED' not in str(error):
                    raise
                reason = ' '.join(str(error).split())[:300]
                raise self._too_large(f'the compiler says: {reason}') from error
        return self._compiled[num_steps]

    def _too_large(self, reason: str) -> ConfigError:
        config = self._recipe.config
        parts = config.train.accumulation_steps
        share = config.data.batch_size // parallel.data_devices(self._mesh)
        advice = []
        finer = next((n for n in range(parts + 1, share + 1) if share % n == 0), None)
        # On CPU the parts are not in a loop, and XLA keeps the activations of all of them.
        if finer and jax.default_backend() != 'cpu':
            advice.append(f'--config.train.accumulation_steps={finer}')
        if config.model.keep_activations != 'blocks' and jax.default_backend() != 'cpu':
            advice.append('--config.model.keep_activations=blocks')
        if config.model.dtype != 'bfloat16':
            advice.append('--config.model.dtype=bfloat16')
        advice.append('a smaller --config.data.batch_size')
        return ConfigError(
            'data.batch_size',
            config.data.batch_size,
            f'so few images that the step fits ({reason}); give {" or ".join(advice)}',
        )


def available_bytes(device: jax.Device) -> int | None:
    """What `device` has for this process; None where it does not tell.

    An accelerator tells what JAX may take, which XLA_PYTHON_CLIENT_MEM_FRACTION changes. CPU
    devices of one process share what the system has left.
    """
    statistics = device.memory_stats() or {}
    if 'bytes_limit' in statistics:
        return statistics['bytes_limit']
    free = memory.available_bytes() if device.platform == 'cpu' else None
    return None if free is None else free // jax.local_device_count()


def peak_bytes(jaxpr: core.Jaxpr) -> int:
    """The most bytes alive at a time when a program runs line by line, without its arguments.

    A compiler fuses lines, which saves some, and reorders and pads, which costs some. Of train
    steps in float32, XLA's own number for CPU was 0.91 to 1.10 of this one (docs/clusters.md).
    Programs inside of the program count with their own peak; one inside of `shard_map` has one
    device's shapes.
    """
    last_use = {
        variable: index
        for index, equation in enumerate(jaxpr.eqns)
        for variable in equation.invars
        if not isinstance(variable, core.Literal)
    }
    last_use |= {
        variable: len(jaxpr.eqns)
        for variable in jaxpr.outvars
        if not isinstance(variable, core.Literal)
    }
    made: set[core.Var] = set()
    alive = peak = 0
    for index, equation in enumerate(jaxpr.eqns):
        used = [variable for variable in equation.outvars if variable in last_use]
        outputs = sum(_value_bytes(variable.aval) for variable in used)
        inside = max(map(peak_bytes, core.jaxprs_in_params(equation.params)), default=0)
        peak = max(peak, alive + max(inside, outputs))
        made.update(used)
        dead = {
            variable
            for variable in equation.invars
            if not isinstance(variable, core.Literal)
            and variable in made
            and last_use[variable] == index
        }
        alive += outputs - sum(_value_bytes(variable.aval) for variable in dead)
    return peak


def plan(config: config_dict.ConfigDict, num_devices: int, compiles: bool = False) -> Estimate:
    """The estimate of a config, without training or reading data.

    Args:
      config: a whole configuration.
      num_devices: devices that share the batch; they need not be there.
      compiles: whether to ask the compiler, for one device of this machine with its share of the
        batch. That takes as long as it takes the run.

    Raises:
      ConfigError, UserError: the config is not valid, or the data set is not known without its
        files and they are not there.
    """
    config = config.copy_and_resolve_references()
    known = DATASETS.get(config.data.name)
    if known and known.num_train and not (config.data.stream or config.data.generated_examples):
        # So that nothing is looked for on disk: shape and classes are those of the table.
        config.data.generated_examples = known.num_train
    if num_devices < 1:
        raise UserError(f'--devices={num_devices} is not allowed: at least 1')
    spec = config_lib.validate(config, num_devices)
    # Their values take no part in the memory.
    spec = dataclasses.replace(spec, mean=spec.mean or (0.5,) * 3, std=spec.std or (0.5,) * 3)
    steps_per_epoch = max(1, spec.num_train // config.data.batch_size)
    mesh = AbstractMesh((num_devices,), (parallel.DATA_AXIS,), axis_types=(AxisType.Auto,))
    if compiles:
        config.data.batch_size //= num_devices
        mesh = parallel.make_mesh(jax.local_devices()[:1])
        parallel.use_compilation_cache(config.train.compilation_cache_dir)
    recipe = make_recipe(config_lib.resolve(config), spec, steps_per_epoch)
    num_steps = min(config.train.steps_per_call or 1, config.train.log_every, steps_per_epoch)
    steps = CompiledSteps(make_train_step(recipe, mesh), recipe, mesh)
    return steps.estimate(num_steps, compiles)


def _device_bytes(tree: Any) -> int:
    """One device's part of abstract arrays with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _value_bytes(aval: Any) -> int:
    # Typed PRNG keys have a dtype of their own, of another kind; they are small.
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):
        return 0
    return math.prod(aval.shape) * aval.dtype.itemsize


def _compiled_bytes(compiled: jax.stages.Compiled) -> int | None:
    """All that a compiled program takes on a device; None where the compiler does not tell."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    return (
        analysis.argument_size_in_bytes
        # Results that do not take over the buffer of an argument.
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
        + analysis.generated_code_size_in_bytes
    )


def main() -> None:
    """Prints the estimate of the config that the flags name."""
    if flags.FLAGS.config is None:
        raise UserError('give --config=configs/X.py')
    num_devices = flags.FLAGS.devices or jax.device_count()
    print(plan(flags.FLAGS.config, num_devices, flags.FLAGS.compile))


if __name__ == '__main__':
    config_flags.DEFINE_config_file('config', None, 'The recipe, e.g. configs/X.py[:options].')
    flags.DEFINE_integer(
        'devices', None, 'How many share the batch; those of this machine if not given.'
    )
    flags.DEFINE_boolean('compile', False, 'Ask the compiler, for a device as this machine has.')
    command.run(main)
