"""Every method's steps lowered for TPU and CUDA, on a machine that has neither.

JAX lowers for a platform that is not there; nothing is compiled. So an operation that only a CPU
has, or a computation in the wrong type, shows here and not on the first day on a cluster.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from one_jax import config as config_lib
from one_jax import device_memory, evaluate, guard, methods, models, parallel, recipe, train_step
from one_jax.data import datasets
from one_jax.student import Student

DEVICES = 8
BATCH = 16
# What the platforms' own compilers know. Where JAX's CUDA plugin is installed, random bits are a
# kernel of its own there.
CUSTOM_CALLS = {'tpu': set(), 'cuda': {'cu_threefry2x32_ffi'}}
MESH = AbstractMesh((DEVICES,), (parallel.DATA_AXIS,), axis_types=(AxisType.Auto,))


def make_teacher(spec):
    """A frozen ResNet-8 that nothing is computed with: all its variables are zero."""
    network = models.make_backbone('resnet8', spec.num_classes)()
    images = jax.ShapeDtypeStruct((1, *spec.image_shape), jnp.float32)
    shapes = jax.eval_shape(lambda x: network.init(jax.random.key(0), x, train=False), images)
    variables = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    return Student({'num_classes': spec.num_classes}, network, variables)


class Setting:
    """The recipe of a method on the mesh, and the abstract arguments of its train step."""

    def __init__(self, monkeypatch, method, **fields):
        config = config_lib.default_config()
        config.update_from_flattened_dict(
            {
                'model.name': 'resnet8',
                'method.name': method,
                'data.name': 'cifar100',
                'data.generated_examples': 1000,
                'data.batch_size': BATCH,
                'data.eval_batch_size': BATCH,
                **fields,
            }
        )
        kind = methods.registered()[method]
        if kind.min_teachers:
            number = max(kind.min_teachers, kind.default_branches)
            config.method.teachers = ','.join(f'teacher{i}' for i in range(number))
        if methods.create(config).needs_validation:
            config.data.validation_fraction = 0.1
        spec = config_lib.validate(config, DEVICES)
        # The folders of the teachers are not there; what is read from them does not matter here.
        teacher = make_teacher(spec) if kind.min_teachers else None
        monkeypatch.setattr(
            recipe.teachers, 'load', lambda method, *_: (teacher,) * len(method.teachers)
        )
        self.recipe = recipe.make_recipe(config_lib.resolve(config), spec, steps_per_epoch=4)
        self.num_steps = config.train.steps_per_call or 1
        self.arguments = device_memory.abstract_arguments(self.recipe, MESH, self.num_steps)

    def trace_train_step(self):
        return train_step.make_train_step(self.recipe, MESH).trace(*self.arguments)

    def trace_evaluation(self):
        """The evaluation step, and the one on held-out images where the method has it."""
        made = self.recipe
        dataset = datasets.Dataset(made.spec, (), {})
        evaluator = evaluate.Evaluator(made.config, made.method, made.network, dataset, MESH)
        state, batch, *_ = self.arguments
        sharding = NamedSharding(MESH, parallel.BATCH)
        batch = {
            name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=sharding)
            for name, x in batch.items()
            if name != 'count'
        }
        steps = [evaluator._step]
        if made.method.needs_validation:
            steps.append(evaluator._held_out_step)
        return [step.trace(state.variables, batch) for step in steps]

    def assert_trains(self, *platforms):
        """Lowers the train step and looks at donation and types; gives the last text."""
        traced, state = self.trace_train_step(), self.arguments[0]
        stepped, scalars = traced.out_info
        assert jax.tree.structure(stepped) == jax.tree.structure(state)
        for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(stepped), strict=True):
            assert (after.shape, after.dtype) == (before.shape, before.dtype)
            assert after.dtype in (jnp.float32, jnp.int32, jnp.uint32)
        for name, values in scalars.items():
            assert values.dtype == (jnp.int32 if name == guard.SKIPPED else jnp.float32), name
            assert values.shape[0] == self.num_steps, name
        for platform in platforms:
            text = lowered_text(traced, platform)
            # Of the state every buffer is given away, and nothing else is.
            assert text.count('jax.buffer_donor = true') == len(jax.tree.leaves(state))
            self.assert_convolutions(text)
        return text

    def assert_convolutions(self, text):
        """They are in the config's type, but for float32 where something makes the targets: frozen
        teachers, which stay as exported, and the aggregator."""
        types = convolution_types(text)
        assert all(len(one) == 1 for one in types)
        float32 = types.count({'f32'})
        if self.recipe.config.model.dtype == 'float32':
            assert 0 < float32 == len(types)
            return
        frozen = sum(count_kernels(teacher.variables) for teacher in self.recipe.teachers)
        aggregator = count_kernels(self.arguments[0].params.get('aggregator', {}))
        # Of a trained kernel there is the forward convolution and, traced for each of the two
        # gradients, that again and the gradient's own.
        assert float32 <= frozen + 5 * aggregator
        assert types.count({'bf16'}) == len(types) - float32 > float32


def lowered_text(traced, platform):
    """The StableHLO of a traced step, looked through for what all steps must have."""
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert f'mhlo.num_partitions = {DEVICES}' in text
    assert '"stablehlo.all_reduce"' in text
    assert custom_calls(text) <= CUSTOM_CALLS[platform]
    return text


def custom_calls(text):
    return set(re.findall(r'custom_call @(\w+)', text))


def convolutions(text):
    return [line for line in text.splitlines() if 'stablehlo.convolution' in line]


def convolution_types(text):
    """The types of the numbers of each convolution, of both operands and the result."""
    return [
        set(re.findall(r'x(f\d+|bf16)>', line.rpartition(' : ')[2])) for line in convolutions(text)
    ]


def count_kernels(variables):
    return sum(leaf.ndim == 4 for leaf in jax.tree.leaves(variables))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('method', methods.registered())
def test_every_method_trains_and_is_evaluated(monkeypatch, method, dtype):
    """ONE in both types for both platforms; the others, which differ from it in their losses, in
    float32 for TPU and in bfloat16 for CUDA."""
    platforms = ('tpu',) if dtype == 'float32' else ('cuda',)
    platforms = ('tpu', 'cuda') if method == 'one' else platforms
    setting = Setting(monkeypatch, method, **{'model.dtype': dtype})
    setting.assert_trains(*platforms)
    for traced in setting.trace_evaluation():
        sums = jax.tree.leaves(traced.out_info)
        assert all(values.dtype in (jnp.float32, jnp.int32) for values in sums)
        for platform in platforms:
            setting.assert_convolutions(lowered_text(traced, platform))


def test_loops_and_what_crosses_devices(monkeypatch):
    """On an accelerator the steps of a call are a loop, and so are the parts of a batch but the
    first."""
    monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
    fields = {'train.ema_decay': 0.99, 'data.mixup_alpha': 0.2, 'sync_batch_norm': True}
    once = Setting(monkeypatch, 'one', **fields).assert_trains('tpu')
    fields |= {'train.accumulation_steps': 2, 'train.steps_per_call': 3}
    looped = Setting(
        monkeypatch, 'one', **fields, **{'train.skip_nonfinite_steps': 1}
    ).assert_trains('cuda', 'tpu')
    # Two bodies, that of the first part and that of the others; equal convolutions may share a
    # function of the text, or not.
    assert 1.9 < len(convolutions(looped)) / len(convolutions(once)) < 2.1
    assert looped.count('stablehlo.while') >= once.count('stablehlo.while') + 2
    assert 'stablehlo.all_gather' in once


def test_seeds_at_once_and_images_on_the_device(monkeypatch):
    """What a GPU or TPU gets by default, with four seeds on four pairs of devices."""
    setting = Setting(monkeypatch, 'one', **{'train.steps_per_call': 10})
    mesh = AbstractMesh((4, 2), ('seed', 'data'), axis_types=(AxisType.Auto,) * 2)
    arguments = device_memory.abstract_arguments(setting.recipe, mesh, 10, 4, 640)
    traced = train_step.make_train_step(setting.recipe, mesh).trace(*arguments)
    state, scalars = traced.out_info
    for before, after in zip(*map(jax.tree.leaves, (arguments[0], state)), strict=True):
        assert (after.shape, after.dtype) == (before.shape, before.dtype)
    assert scalars['loss'].shape == (10, 4)
    for platform in ('tpu', 'cuda'):
        text = lowered_text(traced, platform)
        assert 'tensor<640x32x32x3xui8>' in text
        # Each pair averages over itself alone.
        assert '[[0, 1], [2, 3], [4, 5], [6, 7]]' in text


@pytest.mark.parametrize(
    ('network', 'data', 'dtype', 'platform'),
    [
        ('resnet32', 'cifar100', 'float32', 'cuda'),
        ('resnet18', 'imagenet2012', 'bfloat16', 'tpu'),
    ],
)
def test_the_networks_of_the_paper(monkeypatch, network, data, dtype, platform):
    fields = {'model.name': network, 'data.name': data, 'model.dtype': dtype}
    setting = Setting(monkeypatch, 'one', **fields)
    text = setting.assert_trains(platform)
    side = setting.recipe.spec.image_shape[0]
    assert f'tensor<1x{BATCH}x{side}x{side}x3xui8>' in text
    assert f'x{setting.recipe.spec.num_classes}xf32>' in text


def test_an_operation_of_the_cpu_alone_is_found():
    """Guards the tests above: LAPACK's eigenvalues are another program elsewhere."""
    step = parallel.data_parallel(
        lambda matrix, batch: lax.psum(jnp.linalg.eigh(matrix)[0].sum() * batch.sum(), 'data'), MESH
    )
    matrix = jax.ShapeDtypeStruct((4, 4), jnp.float32, sharding=NamedSharding(MESH, P()))
    batch = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=NamedSharding(MESH, parallel.BATCH))
    text = step.trace(matrix, batch).lower(lowering_platforms=('cpu',)).as_text()
    assert custom_calls(text) == {'lapack_ssyevd_ffi'}
