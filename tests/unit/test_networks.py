"""All families of networks: sizes and costs counted by hand, the cut, blocks, PyTorch's names."""

import dataclasses
import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from network_fixtures import abstract_variables, branched, feature_groups, init

from one_jax import models
from one_jax.errors import ConfigError, UserError
from one_jax.models import convolution, cost, densenet, layers, multibranch
from one_jax.models.resnet import BasicBlock
from one_jax.models.resnet_cifar import CifarResNet
from one_jax.models.resnet_imagenet import ImageNetResNet
from one_jax.models.wide_resnet import PreActivationBlock
from one_jax.students import torch_interop

# resnet10_tiny and resnet14_tiny are parts of the last two.
TINY = [
    'resnext11_2x8d',
    'densenet16_4',
    'wrn10_1',
    'vgg6_tiny',
    'seresnet10_tiny',
    'resnext14_tiny',
]


@dataclasses.dataclass
class Segment:
    """Parameters and multiply-adds of a part of a network, added up layer by layer.

    From the papers' tables; `size` is the side of a layer's output.
    """

    parameters: int = 0
    multiply_adds: int = 0

    def conv(self, channels_in, channels, kernel, size, groups=1, bias=False):
        weights = kernel * kernel * channels_in // groups * channels
        self.parameters += weights + bias * channels
        self.multiply_adds += weights * size * size

    def norm(self, channels):
        self.parameters += 2 * channels

    def conv_norm(self, *args, **kwargs):
        self.conv(*args, **kwargs)
        self.norm(args[1])

    def linear(self, channels_in, channels):
        self.parameters += (channels_in + 1) * channels
        self.multiply_adds += channels_in * channels


def hand_resnet(num_classes, sizes, width, inner_ratio=None, groups=1, imagenet=True, se=None):
    """Segments of a post-activation ResNet; bottlenecks where there is an inner ratio."""
    stem = Segment()
    stem.conv_norm(3, width, *((7, 112) if imagenet else (3, 32)))
    segments, channels_in, side = [stem], width, 56 if imagenet else 32
    for number, blocks in enumerate(sizes):
        segment = Segment()
        for index in range(blocks):
            size_in = side
            if number > 0 and index == 0:
                side //= 2
            if inner_ratio is None:
                channels = width
                segment.conv_norm(channels_in, channels, 3, side)
                segment.conv_norm(channels, channels, 3, side)
            else:
                channels, inner = 4 * width, inner_ratio * width
                segment.conv_norm(channels_in, inner, 1, size_in)
                segment.conv_norm(inner, inner, 3, side, groups)
                segment.conv_norm(inner, channels, 1, side)
            if se is not None:
                segment.linear(channels, channels // se)
                segment.linear(channels // se, channels)
            if channels_in != channels or size_in != side:
                segment.conv_norm(channels_in, channels, 1, side)
            channels_in = channels
        segments.append(segment)
        width *= 2
    head = Segment()
    head.linear(channels_in, num_classes)
    return [*segments, head]


def hand_densenet(num_classes, depth, growth):
    stem = Segment()
    channels = 2 * growth
    stem.conv(3, channels, 3, 32)
    segments = [stem]
    for side in (32, 16, 8):
        segment = Segment()
        for _ in range((depth - 4) // 6):
            segment.norm(channels)
            segment.conv_norm(channels, 4 * growth, 1, side)
            segment.conv(4 * growth, growth, 3, side)
            channels += growth
        if side > 8:
            segment.norm(channels)
            segment.conv(channels, channels // 2, 1, side)
            channels //= 2
        segments.append(segment)
    head = Segment()
    head.norm(channels)
    head.linear(channels, num_classes)
    return [*segments, head]


def hand_wide_resnet(num_classes, blocks, widening):
    stem = Segment()
    stem.conv(3, 16, 3, 32)
    segments, channels_in = [stem], 16
    for side, channels in ((32, 16 * widening), (16, 32 * widening), (8, 64 * widening)):
        segment = Segment()
        for _ in range(blocks):
            segment.norm(channels_in)
            segment.conv_norm(channels_in, channels, 3, side)
            segment.conv(channels, channels, 3, side)
            if channels_in != channels:
                segment.conv(channels_in, channels, 1, side)
            channels_in = channels
        segments.append(segment)
    head = Segment()
    head.norm(channels_in)
    head.linear(channels_in, num_classes)
    return [*segments, head]


def hand_vgg16(num_classes):
    segments, channels_in = [Segment()], 3
    for side, channels, convolutions in (
        (32, 64, 2),
        (16, 128, 2),
        (8, 256, 3),
        (4, 512, 3),
        (2, 512, 3),
    ):
        segment = Segment()
        for _ in range(convolutions):
            segment.conv_norm(channels_in, channels, 3, side, bias=True)
            channels_in = channels
        segments.append(segment)
    head = Segment()
    head.linear(512, num_classes)
    return [*segments, head]


def hand_branched(segments, share_stages, gate_channels):
    """Three branches and a gate: linear layer to 3 scores, and their batch normalisation."""
    total = Segment()
    for index, segment in enumerate(segments):
        copies = 1 if index <= share_stages else 3
        total.parameters += copies * segment.parameters
        total.multiply_adds += copies * segment.multiply_adds
    total.linear(gate_channels, 3)
    total.norm(3)
    return total


@dataclasses.dataclass
class Case:
    """A published network: its count by hand, and what is printed elsewhere.

    `parameters` are the literature's exact number; `plain` and `branches` are the specification's
    millions; `multiply_adds` are 1e9 an image, as torchvision's documentation or the papers round.
    """

    name: str
    by_hand: Callable[[int], list[Segment]]
    classes: int
    share_stages: int
    shared_channels: int
    multiply_adds: str | None
    parameters: int | None = None
    plain: str | None = None
    branches: str | None = None

    def __str__(self):
        return f'{self.name}-{self.classes}-{self.share_stages}'


RESNEXT29 = functools.partial(
    hand_resnet, sizes=(3, 3, 3), width=64, inner_ratio=8, groups=8, imagenet=False
)
DENSENET190 = functools.partial(hand_densenet, depth=190, growth=40)
DENSENET40 = functools.partial(hand_densenet, depth=40, growth=12)
WRN16 = functools.partial(hand_wide_resnet, blocks=2, widening=2)
WRN40 = functools.partial(hand_wide_resnet, blocks=6, widening=2)
WRN20 = functools.partial(hand_wide_resnet, blocks=3, widening=8)
WRN20_BOTTLENECK = functools.partial(
    hand_resnet, sizes=(2, 2, 2), width=16, inner_ratio=8, imagenet=False
)
RESNET18 = functools.partial(hand_resnet, sizes=(2, 2, 2, 2), width=64)
RESNET34 = functools.partial(hand_resnet, sizes=(3, 4, 6, 3), width=64)
CASES = [
    Case('resnext29_8x64d', RESNEXT29, 10, 2, 512, '5.4', 34_426_698, '34.43', '86.9'),
    Case('resnext29_8x64d', RESNEXT29, 100, 2, 512, '5.4', None, '34.52', '87.2'),
    Case('densenet190_40', DENSENET190, 10, 2, 950, '9.3', None, '25.62', '44.8'),
    Case('densenet40_12', DENSENET40, 10, 2, 60, None, 176_122),
    Case('wrn16_2', WRN16, 100, 2, 64, '0.10', 703_284),
    Case('wrn40_2', WRN40, 100, 2, 64, '0.33', 2_255_156),
    Case('wrn20_8', WRN20, 100, 1, 128, None),
    Case('wrn20_8_bottleneck', WRN20_BOTTLENECK, 100, 2, 128, None),
    Case('vgg16', hand_vgg16, 10, 3, 256, '0.31', 14_728_266),
    Case('resnet18', RESNET18, 1000, 2, 128, '1.81', 11_689_512, '11.69', '33.7'),
    Case('resnet18', RESNET18, 1000, 3, 256, '1.81', 11_689_512, '11.69', '29.5'),
    Case('resnet34', RESNET34, 1000, 2, 128, '3.66', 21_797_672),
    Case(
        *('resnet50', functools.partial(RESNET34, inner_ratio=1), 1000, 2, 512),
        *('4.09', 25_557_032),
    ),
    Case(
        *('resnext50_32x4d', functools.partial(RESNET34, inner_ratio=2, groups=32), 1000, 2, 512),
        *('4.23', 25_028_904, '25.03', '72.3'),
    ),
    Case(
        *('seresnet18', functools.partial(RESNET18, se=16), 1000, 2, 128),
        *(None, None, '11.78', '34.0'),
    ),
]


@pytest.mark.parametrize('case', CASES, ids=str)
def test_cost_equals_the_count_by_hand(case):
    image_shape = (224, 224, 3) if case.classes == 1000 else (32, 32, 3)
    segments = case.by_hand(case.classes)
    parameters = sum(segment.parameters for segment in segments)
    multiply_adds = sum(segment.multiply_adds for segment in segments)
    branches = hand_branched(segments, case.share_stages, case.shared_channels)
    assert case.parameters in (None, parameters)
    assert case.plain in (None, f'{parameters / 1e6:.2f}')
    assert case.branches in (None, f'{branches.parameters / 1e6:.1f}')
    if case.multiply_adds is not None:
        decimals = len(case.multiply_adds.split('.')[1])
        assert f'{multiply_adds / 1e9:.{decimals}f}' == case.multiply_adds

    network = models.make_backbone(case.name, case.classes)()
    assert cost.forward_cost(network, image_shape) == (parameters, 2 * multiply_adds)
    network = branched(case.name, case.classes, share_stages=case.share_stages)
    assert cost.forward_cost(network, image_shape) == (
        branches.parameters,
        2 * branches.multiply_adds,
    )


def test_densenet190_for_100_classes_has_the_published_size():
    """The traced network is compared above, for 10 classes; tracing it takes seconds."""
    segments = DENSENET190(100)
    assert f'{sum(segment.parameters for segment in segments) / 1e6:.2f}' == '25.82'
    assert f'{hand_branched(segments, 2, 950).parameters / 1e6:.1f}' == '45.4'


# The maps that every stage leaves, side and channels.
MAPS = {
    'resnext29_8x64d': [(32, 256), (16, 512), (8, 1024)],
    'densenet40_12': [(16, 48), (8, 60), (8, 132)],
    'wrn16_2': [(32, 32), (16, 64), (8, 128)],
    'vgg16': [(16, 64), (8, 128), (4, 256), (2, 512), (1, 512)],
    'resnet18': [(56, 64), (28, 128), (14, 256), (7, 512)],
    'resnet50': [(56, 256), (28, 512), (14, 1024), (7, 2048)],
    'seresnet18': [(56, 64), (28, 128), (14, 256), (7, 512)],
}


@pytest.mark.parametrize('name', MAPS)
def test_segment_at_every_cut_has_the_maps_of_the_papers(name):
    side = 224 if name in models.resnet_imagenet.NETWORKS else 32
    make_backbone = models.make_backbone(name, 7)
    assert make_backbone().num_stages == len(MAPS[name])
    x = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    for number, (size, channels) in enumerate(MAPS[name], start=1):
        segment = make_backbone(begin=number - 1 or None, end=number)
        x, _ = jax.eval_shape(
            lambda maps, segment=segment: segment.init_with_output(jax.random.key(0), maps, False),
            x,
        )
        assert x.shape == (2, size, size, channels)
    outputs, _ = jax.eval_shape(
        lambda maps: make_backbone(begin=len(MAPS[name])).init_with_output(
            jax.random.key(0), maps, False
        ),
        x,
    )
    assert outputs.logits.shape == (2, 7)
    assert outputs.features.shape == (2, channels)
    assert outputs.maps.shape == x.shape


def random_network_variables(network, image_shape):
    """Random parameters and running statistics that keep activations near 1."""
    generator = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key in ('scale', 'var'):
            return generator.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)
        deviation = (leaf.shape[-1] / leaf.size) ** 0.5 if path[-1].key == 'kernel' else 0.1
        return (deviation * generator.normal(size=leaf.shape)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract_variables(network, image_shape))


@pytest.mark.parametrize(
    ('name', 'share_stages'),
    [('resnet8', 0), ('resnet11_bottleneck', 1), *((name, 2) for name in TINY)],
)
def test_branch_equals_the_plain_network_and_survives_pytorchs_names(name, share_stages):
    """As exported: trunk + head i are the variables of the plain network."""
    network = branched(name, num_classes=5, share_stages=share_stages)
    images = np.random.default_rng(1).normal(size=(4, 32, 32, 3)).astype(np.float32)
    variables = random_network_variables(network, images.shape[1:])
    outputs = jax.jit(lambda v, x: network.apply(v, x, train=False))(variables, images)
    plain = models.make_backbone(name, 5)()
    template = abstract_variables(plain, images.shape[1:])
    predict = jax.jit(lambda v, x: plain.apply(v, x, train=False))
    for branch in range(3):
        student = multibranch.student_variables(variables, branch)
        chex.assert_trees_all_equal_shapes_and_dtypes(student, template)
        alone = predict(student, images)
        assert jnp.abs(alone.logits).max() > 0.1
        for field in ('logits', 'features', 'maps'):
            expected = getattr(outputs.heads, field)[branch]
            np.testing.assert_allclose(getattr(alone, field), expected, rtol=1e-3, atol=1e-4)
    state_dict = torch_interop.to_state_dict(student)
    chex.assert_trees_all_equal(torch_interop.from_state_dict(state_dict, template), student)


def test_branch_has_the_gradients_of_the_plain_network():
    """Through max-pools, which `vmap` changes too."""
    name = 'vgg6_tiny'
    network = branched(name, num_classes=5)
    images = np.random.default_rng(1).normal(size=(4, 32, 32, 3)).astype(np.float32)
    variables = random_network_variables(network, images.shape[1:])
    plain = models.make_backbone(name, 5)()

    def loss(params, network, variables, branch):
        outputs, _ = network.apply(
            {**variables, 'params': params}, images, train=True, mutable=['batch_stats']
        )
        return (outputs.logits[branch] ** 2).mean()

    gradient = jax.jit(jax.grad(loss), static_argnames=('network', 'branch'))
    of_all = gradient(variables['params'], network, variables, 1)
    student = multibranch.student_variables(variables, 1)
    of_one = gradient(student['params'], plain, student, ...)
    expected = multibranch.student_variables({'params': of_all}, 1)['params']
    chex.assert_trees_all_close(of_one, expected, rtol=1e-2, atol=1e-4)
    for leaf in jax.tree.leaves(of_all['head']):
        assert not leaf[0].any()


def test_bfloat16_networks_keep_parameters_and_logits_in_float32():
    images = jnp.zeros((2, 32, 32, 3))
    for name in TINY:
        network = branched(name, dtype=jnp.bfloat16)
        outputs, variables = jax.eval_shape(
            lambda x, network=network: network.init_with_output(jax.random.key(0), x, train=True),
            images,
        )
        for leaf in jax.tree.leaves((variables, outputs.logits)):
            assert leaf.dtype == jnp.float32, name
        assert outputs.heads.maps.dtype == jnp.bfloat16, name


@pytest.mark.parametrize(('form', 'groups'), [('dense', {1, 2}), ('grouped', {1, 2, 3, 6})])
def test_branches_of_a_grouped_network_keep_its_groups(form, groups):
    """Three branches of two groups stay two groups, forward and backward."""
    network = branched('resnext11_2x8d', branch_conv=form)
    images = jnp.zeros((2, 16, 16, 3))
    variables = abstract_variables(network, images.shape[1:])

    def loss(variables):
        return network.apply(variables, images, train=False).logits.sum()

    assert set(feature_groups(jax.make_jaxpr(jax.grad(loss))(variables).jaxpr)) == groups


def test_dense_convolution_with_groups_under_vmap_equals_the_convolution():
    options = {
        'window_strides': (2, 2),
        'padding': ((1, 1), (1, 1)),
        'dimension_numbers': ('NHWC', 'HWIO', 'NHWC'),
        'feature_group_count': 2,
    }
    x = jax.random.normal(jax.random.key(0), (3, 2, 6, 6, 4))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 2, 6))

    def total(conv, x, kernel):
        return (jax.vmap(functools.partial(conv, **options))(x, kernel) ** 3).sum()

    results = [
        jax.jit(jax.value_and_grad(functools.partial(total, conv), (0, 1)))(x, kernel)
        for conv in (convolution.dense_conv_general_dilated, lax.conv_general_dilated)
    ]
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-2)


def numpy_norm(x, params, statistics):
    scale = params['scale'] / np.sqrt(statistics['var'] + 1e-5)
    return (x - statistics['mean']) * scale + params['bias']


def random_variables(module, x):
    """Random parameters and statistics (positive, as variances are), as NumPy arrays."""
    generator = np.random.default_rng(0)
    template = jax.eval_shape(lambda: module.init(jax.random.key(0), x))
    return jax.tree.map(
        lambda leaf: (
            generator.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
            * (generator.choice([-1, 1], leaf.shape) if len(leaf.shape) > 1 else 1)
        ),
        template,
    )


CONV = layers.make_conv(jnp.float32, 'dense')
NORM = layers.make_norm(jnp.float32, None, train=False)


def test_squeeze_excitation_equals_the_formula():
    x = np.random.default_rng(1).normal(size=(2, 3, 4, 8)).astype(np.float32)
    module = layers.SqueezeExcitation(reduction=4)
    variables = random_variables(module, x)
    fc1, fc2 = variables['params']['fc1'], variables['params']['fc2']
    assert fc1['kernel'].shape == (8, 2)
    hidden = np.maximum(x.mean(axis=(1, 2)) @ fc1['kernel'] + fc1['bias'], 0)
    weights = 1 / (1 + np.exp(-(hidden @ fc2['kernel'] + fc2['bias'])))
    np.testing.assert_allclose(module.apply(variables, x), x * weights[:, None, None], rtol=1e-5)


def test_squeeze_excitation_scales_the_residual_before_the_addition():
    """Weights of a half in the residual: relu(x + r / 2), where the plain block is relu(x + r)."""
    x = np.random.default_rng(1).uniform(1, 2, size=(2, 4, 4, 8)).astype(np.float32)
    block = BasicBlock(8, 1, CONV, NORM, se_reduction=4)
    variables = random_variables(block, x)
    # Everything positive, so that no ReLU cuts the residual.
    variables = jax.tree.map(np.abs, variables)
    variables['params']['se']['fc2'] = jax.tree.map(np.zeros_like, variables['params']['se']['fc2'])
    halved = block.apply(variables, x)
    del variables['params']['se']
    full = BasicBlock(8, 1, CONV, NORM).apply(variables, x)
    assert (full - x).min() > 1
    np.testing.assert_allclose(halved - x, (full - x) / 2, rtol=1e-4)


def test_densenet_transition_equals_the_formula():
    x = np.random.default_rng(1).normal(size=(2, 5, 4, 6)).astype(np.float32)
    module = densenet.Transition(CONV, NORM)
    variables = random_variables(module, x)
    params, statistics = variables['params'], variables['batch_stats']
    y = np.maximum(numpy_norm(x, params['bn1'], statistics['bn1']), 0)
    y = y @ params['conv1']['kernel'][0, 0]
    # Averages of 2x2 pixels; the odd last row is left out.
    expected = y[:, :4].reshape(2, 2, 2, 2, 2, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(module.apply(variables, x), expected, rtol=1e-4, atol=1e-5)


def test_dense_layer_appends_its_growth():
    x = np.random.default_rng(1).normal(size=(2, 1, 1, 6)).astype(np.float32)
    module = densenet.DenseLayer(3, CONV, NORM)
    variables = random_variables(module, x)
    params, statistics = variables['params'], variables['batch_stats']
    y = np.maximum(numpy_norm(x, params['bn1'], statistics['bn1']), 0)
    y = y @ params['conv1']['kernel'][0, 0]
    y = np.maximum(numpy_norm(y, params['bn2'], statistics['bn2']), 0)
    # Of a 3x3 kernel on a single pixel only the centre meets the image.
    y = y @ params['conv2']['kernel'][1, 1]
    expected = np.concatenate([x, y], axis=-1)
    np.testing.assert_allclose(module.apply(variables, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('width', [6, 4])
def test_wide_block_projects_its_shortcut_where_channels_change(width):
    """Projected after the block's first BN-ReLU; otherwise the identity."""
    x = np.random.default_rng(1).normal(size=(2, 4, 4, 6)).astype(np.float32)
    module = PreActivationBlock(width, 1, CONV, NORM)
    variables = random_variables(module, x)
    params, statistics = variables['params'], variables['batch_stats']
    params['conv2']['kernel'] *= 0
    expected = x
    if width != 6:
        y = np.maximum(numpy_norm(x, params['bn1'], statistics['bn1']), 0)
        expected = y @ params['shortcut']['kernel'][0, 0]
    np.testing.assert_allclose(module.apply(variables, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['wrn10_1', 'densenet16_4'])
def test_pre_activation_networks_pool_after_batch_norm_and_relu(name):
    make_backbone = models.make_backbone(name, 5)
    last = make_backbone().num_stages
    # A head without stages: what stands before the pooling, and the classifier.
    head = make_backbone(begin=last)
    x = np.random.default_rng(1).normal(size=(2, 3, 3, 4)).astype(np.float32)
    variables = init(head, x)
    assert set(variables['params']) == {'bn' if name.startswith('dense') else 'bn1', 'fc'}
    outputs = head.apply(variables, x, train=False)
    maps = np.maximum(x / np.sqrt(1 + 1e-5), 0)
    np.testing.assert_allclose(outputs.maps, maps, rtol=1e-5)
    np.testing.assert_allclose(outputs.features, maps.mean(axis=(1, 2)), rtol=1e-5)


def torchvision_resnet18():
    """Names and shapes of the state dict, by torchvision's rules and in its order."""

    def batch_norm(prefix, width):
        for name in ('weight', 'bias', 'running_mean', 'running_var'):
            yield f'{prefix}.{name}', (width,)
        yield f'{prefix}.num_batches_tracked', ()

    yield 'conv1.weight', (64, 3, 7, 7)
    yield from batch_norm('bn1', 64)
    width_in = 64
    for layer, width in enumerate((64, 128, 256, 512), start=1):
        for index in range(2):
            prefix = f'layer{layer}.{index}'
            yield f'{prefix}.conv1.weight', (width, width_in, 3, 3)
            yield from batch_norm(f'{prefix}.bn1', width)
            yield f'{prefix}.conv2.weight', (width, width, 3, 3)
            yield from batch_norm(f'{prefix}.bn2', width)
            if width_in != width:
                yield f'{prefix}.downsample.0.weight', (width, width_in, 1, 1)
                yield from batch_norm(f'{prefix}.downsample.1', width)
            width_in = width
    yield 'fc.weight', (1000, 512)
    yield 'fc.bias', (1000,)


def torch_shapes(name, num_classes=1000, side=64):
    """PyTorch's names and shapes of a network of ours; zeros that take no memory."""
    template = abstract_variables(models.make_backbone(name, num_classes)(), (side, side, 3))
    empty = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), template)
    return {key: value.shape for key, value in torch_interop.to_state_dict(empty).items()}


def test_resnet18_has_torchvisions_names():
    expected = dict(torchvision_resnet18())
    assert len(expected) == 122
    wanted = {k: v for k, v in expected.items() if not k.endswith('num_batches_tracked')}
    assert torch_shapes('resnet18') == wanted
    # All 122 are accepted.
    template = abstract_variables(models.make_backbone('resnet18', 1000)(), (64, 64, 3))
    state_dict = {k: np.broadcast_to(np.float32(1), shape) for k, shape in expected.items()}
    variables = torch_interop.from_state_dict(state_dict, template)
    chex.assert_trees_all_equal_shapes_and_dtypes(variables, template)


def test_bottleneck_and_vgg_have_torchvisions_names():
    resnext = torch_shapes('resnext50_32x4d')
    assert resnext['layer1.0.conv1.weight'] == (128, 64, 1, 1)
    assert resnext['layer4.0.conv2.weight'] == (1024, 32, 3, 3)
    assert resnext['layer4.0.downsample.0.weight'] == (2048, 1024, 1, 1)
    assert resnext['layer3.5.bn3.running_var'] == (1024,)
    # 161 parameters (53 convolutions and normalisations, a linear layer), and the statistics.
    assert len(resnext) == 161 + 2 * 53
    vgg = torch_shapes('vgg16', num_classes=10, side=32)
    positions = [0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40]
    kernels = {name for name, shape in vgg.items() if len(shape) == 4}
    assert kernels == {f'features.{position}.weight' for position in positions}
    for position in positions:
        assert vgg[f'features.{position}.bias'] == vgg[f'features.{position + 1}.running_mean']


def test_no_batch_normalisation_starts_at_zero():
    """As in torchvision, whose option to zero the last one of a block is off."""
    params = init(models.make_backbone('resnet14_tiny', 5)(), jnp.zeros((1, 32, 32, 3)))['params']
    leaves = jax.tree_util.tree_leaves_with_path(params)
    scales = [leaf for path, leaf in leaves if path[-1].key == 'scale']
    # The stem's; in every stage three, and one on the shortcut.
    assert len(scales) == 1 + 4 * 4
    assert all((scale == 1).all() for scale in scales)


def test_resnet_names_select_imagenet_or_cifar_networks():
    for name in ('resnet18', 'resnet34', 'resnet50'):
        assert isinstance(models.make_backbone(name, 10)(), ImageNetResNet)
    for name in ('resnet8', 'resnet14', 'resnet20', 'resnet56', 'resnet110'):
        network = models.make_backbone(name, 10)()
        assert isinstance(network, CifarResNet)
        assert 2 * sum(network.stage_sizes) + 2 == int(name.removeprefix('resnet'))


@pytest.mark.parametrize(
    'name', ['vgg', 'resnet152', 'resnet33', 'resnet2', 'resnet08', 'wrn28_10']
)
def test_unknown_network_is_an_error_that_lists_the_known_ones(name):
    with pytest.raises(ConfigError) as raised:
        models.network(name)
    for known in ('densenet190_40', 'resnet50', 'vgg16', 'wrn40_2', 'N = 6n + 2'):
        assert known in str(raised.value)


def test_vgg_on_images_too_small_for_its_pools_is_an_error():
    with pytest.raises(UserError, match=r'at least 32x32 pixels.*28x28'):
        abstract_variables(models.make_backbone('vgg16', 10)(), (28, 28, 3))
