"""The train and evaluation steps lowered for TPU and CUDA, on a machine that has neither.

Nothing is compiled. An operation that only a CPU has, or a computation in the wrong type, fails
here and not on the first day on a cluster. test_method_contract.py lowers the loss of each method.
"""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from one_jax import config as config_lib
from one_jax import methods, models
from one_jax.data.table import DATASETS
from one_jax.runtime import parallel
from one_jax.students.student import Student
from one_jax.training import experiment as experiment_lib
from one_jax.training.evaluation import Evaluator
from one_jax.training.step import abstract_arguments, make_initial_state, make_train_step

DEVICES = 8
BATCH = 16
# Known to the platforms' compilers. With JAX's CUDA plugin, random bits come from a kernel.
CUSTOM_CALLS = {'tpu': set(), 'cuda': {'cu_threefry2x32_ffi'}}
# Slices of the padded images.
GATHER_OF_CROPS = 'slice_sizes = array<i64: 1, 32, 32, 3>'
MESH = AbstractMesh((DEVICES,), (parallel.DATA_AXIS,), axis_types=(AxisType.Auto,))


def make_teacher(spec):
    """A frozen ResNet-8 whose variables are all zero."""
    network = models.make_backbone('resnet8', spec.num_classes)()
    images = jax.ShapeDtypeStruct((1, *spec.image_shape), jnp.float32)
    shapes = jax.eval_shape(lambda x: network.init(jax.random.key(0), x, train=False), images)
    variables = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    return Student({'num_classes': spec.num_classes}, network, variables)


class Setting:
    """A method on the mesh, and the abstract arguments of its train step."""

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
        if methods.create(config).uses_validation:
            config.data.validation_fraction = 0.1
        config_lib.validate(config, DEVICES)
        spec = DATASETS[config.data.name]
        teacher = make_teacher(spec) if kind.min_teachers else None
        monkeypatch.setattr(
            experiment_lib.teachers,
            'load',
            lambda method, *_: (teacher,) * len(method.teacher_folders),
        )
        self.experiment = experiment_lib.make_experiment(
            config_lib.resolve(config), spec, (), steps_per_epoch=4
        )
        seed = jax.ShapeDtypeStruct((), jnp.uint32)
        state = jax.eval_shape(make_initial_state(self.experiment, MESH), seed)
        num_steps = config.train.steps_per_call or 1
        self.arguments = abstract_arguments(self.experiment, MESH, state, num_steps)

    def trace_evaluation(self):
        """The evaluation step, and the step on held-out images if the method has one."""
        made = self.experiment
        source = types.SimpleNamespace(spec=made.spec)
        evaluator = Evaluator(made.config, made.method, made.network, source, MESH)
        state, batch, *_ = self.arguments
        sharding = NamedSharding(MESH, parallel.BATCH)
        batch = {
            name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=sharding)
            for name, x in batch.items()
            if name != 'count'
        }
        steps = [evaluator._step]
        if made.method.uses_validation:
            steps.append(evaluator._validation_step)
        return [step.trace(state.variables, batch) for step in steps]

    def assert_trains(self, *platforms):
        """Lowers the train step, checks donation and types, and returns the last text."""
        traced = make_train_step(self.experiment, MESH).trace(*self.arguments)
        state, (stepped, completed) = self.arguments[0], traced.out_info
        assert jax.tree.structure(stepped) == jax.tree.structure(state)
        for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(stepped), strict=True):
            assert (after.shape, after.dtype) == (before.shape, before.dtype)
            assert after.dtype in (jnp.float32, jnp.int32, jnp.uint32)
        assert (completed.shape, completed.dtype) == ((), jnp.int32)
        for platform in platforms:
            text = lowered_text(traced, platform)
            # Exactly the state's buffers are donated.
            assert text.count('jax.buffer_donor = true') == len(jax.tree.leaves(state))
            self.assert_convolutions(text)
        return text

    def assert_convolutions(self, text):
        """They have the config's type, except in frozen teachers, which stay as exported, and in
        the aggregator: float32."""
        types = convolution_types(text)
        assert all(len(one) == 1 for one in types)
        float32 = types.count({'f32'})
        if self.experiment.config.model.dtype == 'float32':
            assert 0 < float32 == len(types)
            return
        frozen = sum(count_kernels(teacher.variables) for teacher in self.experiment.teachers)
        aggregator = count_kernels(self.arguments[0].params.get('aggregator', {}))
        # A trained kernel has a forward convolution, and two for each of its gradients.
        assert float32 <= frozen + 5 * aggregator
        assert types.count({'bf16'}) == len(types) - float32 > float32


def lowered_text(traced, platform):
    """The StableHLO of a traced step, after the checks that all steps must pass."""
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
    """The element types of each convolution: of both operands and the result."""
    return [
        set(re.findall(r'x(f\d+|bf16)>', line.rpartition(' : ')[2])) for line in convolutions(text)
    ]


def count_kernels(variables):
    return sum(leaf.ndim == 4 for leaf in jax.tree.leaves(variables))


@pytest.mark.parametrize(
    ('method', 'fields', 'platforms'),
    [
        ('one', {}, ('tpu', 'cuda')),
        ('one', {'model.dtype': 'bfloat16'}, ('tpu', 'cuda')),
        # Frozen teachers.
        ('kd', {'model.dtype': 'bfloat16'}, ('tpu',)),
        # Held-out images, and crops for each branch.
        ('kdcl', {'method.teacher': 'general', 'model.dtype': 'bfloat16'}, ('tpu',)),
        # Convolutions in the aggregator.
        ('boc_kd', {'model.dtype': 'bfloat16', 'model.num_branches': 2}, ('tpu',)),
    ],
)
def test_steps_lower_in_the_configs_type(monkeypatch, method, fields, platforms):
    setting = Setting(monkeypatch, method, **fields)
    setting.assert_trains(*platforms)
    for traced in setting.trace_evaluation():
        sums = jax.tree.leaves(traced.out_info)
        assert all(values.dtype in (jnp.float32, jnp.int32) for values in sums)
        for platform in platforms:
            setting.assert_convolutions(lowered_text(traced, platform))


def mesh_of_tpus():
    """A mesh that says what it consists of, like one of a topology's devices."""
    device = jax.sharding.AbstractDevice(device_kind='TPU v5 lite', num_cores=1, platform='tpu')
    return MESH.update(abstract_device=device)


@pytest.mark.parametrize('method', ['one', 'dml'])
def test_step_for_tpus_has_one_convolution_for_all_branches(monkeypatch, method):
    two_parts = {'train.accumulation_steps': 2}
    dense = Setting(monkeypatch, method, **two_parts).assert_trains('tpu')
    assert not joint_convolutions(dense)
    assert GATHER_OF_CROPS in dense
    # This process runs on a CPU.
    assert 'stablehlo.while' not in dense
    monkeypatch.setitem(globals(), 'MESH', mesh_of_tpus())
    setting = Setting(monkeypatch, method, **two_parts)
    joint = setting.assert_trains('tpu')
    assert 'stablehlo.while' in joint
    kernels = sum(x.ndim == 5 for x in jax.tree.leaves(setting.arguments[0].params['head']))
    # The gradient of the images is not needed; the first part is not in the loop.
    assert len(joint_convolutions(joint)) == 2 * (3 * kernels - (method == 'dml'))
    assert GATHER_OF_CROPS not in joint


def joint_convolutions(text):
    """Those with three spatial dimensions."""
    return [line for line in convolutions(text) if re.search(r'dim_numbers = \[[^]]*2', line)]


def test_steps_and_parts_of_a_batch_are_loops_on_an_accelerator(monkeypatch):
    monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
    fields = {'train.ema_decay': 0.99, 'data.mixup_alpha': 0.2, 'sync_batch_norm': True}
    once = Setting(monkeypatch, 'one', **fields).assert_trains('tpu')
    fields |= {'train.accumulation_steps': 2, 'train.steps_per_call': 3}
    looped = Setting(
        monkeypatch, 'one', **fields, **{'train.skip_nonfinite_steps': 1}
    ).assert_trains('cuda', 'tpu')
    # Two bodies: of the first part and of the others.
    assert 1.9 < len(convolutions(looped)) / len(convolutions(once)) < 2.1
    assert looped.count('stablehlo.while') >= once.count('stablehlo.while') + 2
    assert 'stablehlo.all_gather' in once


@pytest.mark.parametrize(
    ('network', 'data', 'dtype', 'platform'),
    [
        ('resnet32', 'cifar100', 'float32', 'cuda'),
        ('resnet18', 'imagenet2012', 'bfloat16', 'tpu'),
    ],
)
def test_networks_of_the_paper_lower(monkeypatch, network, data, dtype, platform):
    fields = {'model.name': network, 'data.name': data, 'model.dtype': dtype}
    setting = Setting(monkeypatch, 'one', **fields)
    text = setting.assert_trains(platform)
    side = setting.experiment.spec.image_shape[0]
    assert f'tensor<1x{BATCH}x{side}x{side}x3xui8>' in text
    assert f'x{setting.experiment.spec.num_classes}xf32>' in text


def test_custom_calls_finds_an_operation_of_the_cpu():
    """Guards the tests above, with LAPACK's eigenvalues."""
    step = parallel.data_parallel(
        lambda matrix, batch: lax.psum(jnp.linalg.eigh(matrix)[0].sum() * batch.sum(), 'data'), MESH
    )
    matrix = jax.ShapeDtypeStruct((4, 4), jnp.float32, sharding=NamedSharding(MESH, P()))
    batch = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=NamedSharding(MESH, parallel.BATCH))
    text = step.trace(matrix, batch).lower(lowering_platforms=('cpu',)).as_text()
    assert custom_calls(text) == {'lapack_ssyevd_ffi'}
