"""The memory of a train step: exact where shapes say it, the compiler's where it knows, refused
where it does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import run

from one_jax import checkpoint, device_memory, parallel, train
from one_jax import config as config_lib
from one_jax.data import datasets, memory
from one_jax.errors import ConfigError, UserError
from one_jax.recipe import make_recipe
from one_jax.train_step import make_train_step


def make_config(**fields):
    config = config_lib.default_config()
    config.update_from_flattened_dict(
        {
            'model.name': 'resnet8',
            'model.num_branches': 2,
            'data.name': 'image_folder',
            'data.image_size': 8,
            'data.generated_examples': 64,
            'data.batch_size': 32,
            'data.eval_batch_size': 16,
            'train.steps': 3,
            'train.log_every': 2,
            'train.compilation_cache_dir': '',
            **fields,
        }
    )
    return config


def make_steps(num_devices=1, **fields):
    config = make_config(**fields)
    dataset = datasets.load(config.data)
    recipe = make_recipe(config_lib.resolve(config), dataset.spec, 2)
    mesh = parallel.make_mesh(jax.devices()[:num_devices])
    return device_memory.CompiledSteps(make_train_step(recipe, mesh), recipe, mesh)


@pytest.fixture(scope='module')
def steps():
    """The step of two branches on one device, compiled once."""
    return make_steps()


@pytest.fixture(scope='module')
def measured(steps):
    return steps.estimate()


def test_what_shapes_say_is_exact(measured):
    """Against the bytes of a checkpoint's arrays and of a batch."""
    config = make_config()
    dataset = datasets.load(config.data)
    batches = dataset.train_batches(32, 0)
    recipe = make_recipe(config_lib.resolve(config), dataset.spec, 2)
    arguments = device_memory.abstract_arguments(recipe, parallel.make_mesh(jax.devices()[:1]))
    batch = batches.batch(0)
    assert measured.batch == sum(array.nbytes for array in batch.values())
    for name, abstract in arguments[1].items():
        assert (abstract.shape[1:], abstract.dtype) == (batch[name].shape, batch[name].dtype)
    # Parameters, and their momentum; statistics; the step twice (the schedule counts too); the key.
    params, statistics = (
        sum(leaf.size for leaf in jax.tree.leaves(tree))
        for tree in (arguments[0].params, arguments[0].batch_stats)
    )
    assert measured.state == 4 * (2 * params + statistics + 2 + 2)
    assert measured.teachers == 0


def test_averages_and_devices_count():
    one, four = (make_steps(n, **{'train.ema_decay': 0.9}) for n in (1, 4))
    one, four = one.estimate(compiles=False), four.estimate(2, compiles=False)
    assert one.state == four.state
    # A quarter of each of two batches, and how many of them are to be done.
    assert four.batch == one.batch / 2 + 4
    plain = make_steps().estimate(compiles=False)
    assert 1.3 * plain.state < one.state < 1.6 * plain.state


def test_the_compilers_number_and_the_one_without_it_are_close(steps, measured):
    assert measured.measured
    abstract = steps.estimate(compiles=False)
    assert not abstract.measured
    assert abstract.state == measured.state
    assert 0.7 < measured.temporaries / abstract.temporaries < 1.3


def test_peak_bytes_of_programs_known_by_hand():
    kilobyte = jax.ShapeDtypeStruct((256,), jnp.float32)

    def chain(x):
        for _ in range(5):
            x = jnp.sin(x)
        return x

    def kept(x):
        values = [jnp.sin(x + i) for i in range(4)]
        return sum(values[::-1])

    def peak(function):
        return device_memory.peak_bytes(jax.make_jaxpr(function)(kilobyte).jaxpr)

    # One value and the next; the first one is the argument.
    assert peak(chain) == 2 * 1024
    # Four, and the sum of the first two of them (with that, one more is there for a moment).
    assert 4 * 1024 <= peak(kept) <= 5 * 1024
    # The inner program's peak is the outer's: nothing counts twice.
    assert peak(jax.jit(chain)) == peak(chain)
    # A loop has its body's peak once, beside what it gives.
    looped = lambda x: jax.lax.scan(lambda carry, _: (chain(carry), None), x, length=9)[0]  # noqa: E731
    assert 2 * 1024 <= peak(looped) <= 4 * 1024
    key = jax.make_jaxpr(lambda seed: jax.random.uniform(jax.random.key(seed), (256,)))(0)
    assert device_memory.peak_bytes(key.jaxpr) >= 1024


def test_parts_of_a_batch_need_less():
    """By the count without a compiler, which keeps them apart as an accelerator does."""
    whole, parts = (
        make_steps(**{'train.accumulation_steps': n}).estimate(compiles=False) for n in (1, 4)
    )
    assert parts.temporaries < 0.8 * whole.temporaries


def test_the_compiled_steps_are_the_train_step(steps):
    """Bit for bit what the jitted function gives."""
    recipe, mesh = steps._recipe, steps._mesh
    batches = datasets.load(recipe.config.data).train_batches(32, 0)
    results = []
    for step in (make_train_step(recipe, mesh), steps):
        state = initial_state(recipe, mesh)
        for number in range(2):
            batch = {name: array[None] for name, array in batches.batch(number).items()}
            batch = parallel.shard_batch(batch, mesh, parallel.STEPS_AND_BATCH)
            state, scalars = step(state, batch)
        results.append(jax.device_get((state, scalars)))
    for expected, found in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(found, expected, strict=True)


def initial_state(recipe, mesh):
    state, *_ = device_memory.abstract_arguments(recipe, mesh)
    generator = np.random.default_rng(0)

    def draw(leaf):
        values = np.abs(generator.normal(size=leaf.shape, scale=0.1))
        return jax.device_put(np.asarray(values).astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(draw, state)


def test_what_does_not_fit_is_refused_and_leaves_no_config(monkeypatch, tmp_path, capsys):
    """The memory of the machine is faked; a smaller batch may then have the same workdir."""
    monkeypatch.setattr(memory, 'available_bytes', lambda: 4 * 2_000_000)
    config = make_config()
    with pytest.raises(ConfigError) as refused:
        train.train_and_evaluate(config, tmp_path / 'run')
    message = str(refused.value)
    assert message.startswith('data.batch_size=32 is not allowed: ')
    for words in (
        'of 2.0 MB',
        'temporaries',
        '--config.model.dtype=bfloat16',
        'a smaller --config.data.batch_size',
    ):
        assert words in message
    # Parts would not help on a CPU.
    assert 'accumulation' not in message
    assert '\n' not in message
    assert not (tmp_path / 'run/config.json').exists()
    with checkpoint.Checkpoints(tmp_path / 'run/checkpoints', read_only=True) as checkpoints:
        assert checkpoints.steps() == []

    monkeypatch.undo()
    config.data.batch_size = 16
    result = train.train_and_evaluate(config, tmp_path / 'run')
    assert result['step'] == 3
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('memory')]
    assert len(lines) == 2
    assert all('memory a device: ' in line and ' of ' in line for line in lines)


class Device:
    """What a device says of itself."""

    platform = 'gpu'

    def __init__(self, statistics):
        self._statistics = statistics

    def memory_stats(self):
        return self._statistics


def test_what_a_device_has():
    assert device_memory.available_bytes(Device({'bytes_limit': 80_000})) == 80_000
    assert device_memory.available_bytes(Device({'bytes_in_use': 1})) is None
    assert device_memory.available_bytes(Device(None)) is None
    # The CPU devices of these tests share the system's memory.
    assert 0 < device_memory.available_bytes(jax.devices()[0]) <= memory.available_bytes() / 3


def test_advice_on_an_accelerator(monkeypatch, steps):
    """Where parts of a batch are a loop, they are advised first; a compiler that gives up is a
    UserError too, and other errors of it are not."""
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')

    class Refusing:
        def __init__(self, reason):
            self.reason = reason

        def lower(self, *arguments):
            return self

        def compile(self):
            raise jax.errors.JaxRuntimeError(self.reason)

    reason = 'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.\nUsed 17.60G of 15.75G hbm'
    refusing = device_memory.CompiledSteps(Refusing(reason), steps._recipe, steps._mesh)
    with pytest.raises(ConfigError, match=r'Used 17\.60G of 15\.75G') as refused:
        refusing.require_memory(1)
    for field in ('train.accumulation_steps=2', 'model.keep_activations=blocks', 'model.dtype'):
        assert f'--config.{field}' in str(refused.value)
    assert '\n' not in str(refused.value)
    broken = device_memory.CompiledSteps(Refusing('INTERNAL: bug'), steps._recipe, steps._mesh)
    with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'):
        broken.require_memory(1)


def test_an_unmeasured_need_is_said_and_not_refused(capsys):
    unmeasured = device_memory.Estimate(2 * 10**9, 10**9, 10**6, 9 * 10**9, False, 10**9)
    assert unmeasured.needed == 12_001_000_000
    assert not unmeasured.too_large
    assert str(unmeasured) == (
        'memory a device: about 12.00 GB (state 2.00 GB, teachers 1.00 GB, batch 1.0 MB, '
        'temporaries about 9.00 GB) of 1.00 GB'
    )
    unknown = device_memory.Estimate(10**9, 0, 10**6, 10**9, True)
    assert not unknown.too_large
    assert str(unknown).endswith('(state 1.00 GB, batch 1.0 MB, temporaries 1.00 GB)')


def test_plans_of_data_that_are_not_there(tmp_path):
    """ImageNet on eight devices, and the same by the compiler for a small one."""
    flags = ('--config=configs/imagenet_resnet18.py', f'--config.data.data_dir={tmp_path}')
    output, _ = run('device_memory', *flags, '--devices=8', '--config.data.eval_batch_size=512')
    assert output.startswith('memory a device: about ')
    assert list(tmp_path.iterdir()) == []
    config = make_config(**{'data.name': 'cifar10', 'data.generated_examples': 0})
    eight = device_memory.plan(config, 8)
    one = device_memory.plan(config, 1)
    assert one.batch == 8 * eight.batch == 32 * (32 * 32 * 3 + 4 + 4)
    assert one.state == eight.state
    assert config.data.generated_examples == 0


def test_the_command_refuses_bad_input():
    _, errors = run('device_memory', status=1)
    assert errors == 'error: give --config=configs/X.py\n'
    with pytest.raises(UserError, match='--devices=-1 is not allowed'):
        device_memory.plan(make_config(), -1)
    with pytest.raises(ConfigError, match=r'data\.batch_size=32 .* multiple of the 5 devices'):
        device_memory.plan(make_config(), 5)
