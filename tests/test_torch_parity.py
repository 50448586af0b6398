"""The same networks in PyTorch: exported weights there, weights and training from there here.

The networks of `torch_networks` are written from the papers. Everything is computed in float32 on
both sides. PyTorch's running variance is unbiased (over n - 1), Flax's is not (over n). In training
nothing depends on it; where the running statistics are compared, PyTorch's are converted, see
`as_biased`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from student_fixtures import write_student
from test_import import run_example
from test_train import Setting, make_config

from one_jax import losses, models, parallel, torch_interop, train
from one_jax.data import augment
from one_jax.student import load_student

torch = pytest.importorskip('torch')
import safetensors.torch  # noqa: E402
import torch_networks  # noqa: E402

# Sides that are not equal: a transposed image or kernel would show.
IMAGE_SHAPES = {'cifar': (16, 24, 3), 'imagenet': (64, 96, 3)}


def to_torch(images):
    """Images [B, H, W, 3] as PyTorch has them."""
    return torch.from_numpy(np.ascontiguousarray(np.transpose(images, (0, 3, 1, 2))))


def random_variables(network, shape):
    """Variables as a trained network might have them: the signal neither dies nor explodes."""
    template = jax.eval_shape(
        lambda key, images: network.init(key, images, train=False),
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, *shape), jnp.float32),
    )
    generator = np.random.default_rng(0)

    def draw(path, leaf):
        name = path[-1].key
        if name == 'kernel':
            values = generator.normal(size=leaf.shape) * np.prod(leaf.shape[:-1]) ** -0.5
        elif name in ('scale', 'var'):
            values = generator.uniform(0.5, 1.5, leaf.shape) * (0.4 if name == 'scale' else 1)
        else:
            values = 0.1 * generator.normal(size=leaf.shape)
        return values.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, template)


def relative_distance(actual, expected):
    """The Euclidean distance over the expected norm."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(
    ('name', 'kind'),
    [
        ('resnet20', 'cifar'),
        ('resnet32', 'cifar'),
        ('resnet110_bottleneck', 'cifar'),
        ('resnet110_bottleneck12', 'cifar'),
        ('resnet18', 'imagenet'),
        ('resnet50', 'imagenet'),
        ('resnext50_32x4d', 'imagenet'),
    ],
)
def test_exported_weights_give_the_same_logits(name, kind):
    shape = IMAGE_SHAPES[kind]
    network = models.make_backbone(name, 7)()
    variables = random_variables(network, shape)
    weights = safetensors.numpy.save(torch_interop.to_state_dict(variables))
    theirs = torch_networks.NETWORKS[name](7)
    theirs.load_state_dict(safetensors.torch.load(weights), strict=True)
    images = np.random.default_rng(1).normal(size=(2, *shape)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.eval()(to_torch(images)).numpy()
    logits = jax.jit(lambda v, x: network.apply(v, x, train=False).logits)(variables, images)
    assert relative_distance(logits, expected) < 1e-4


def test_the_example_of_the_page_loads_a_student(tmp_path):
    config = make_config()
    folder = write_student(tmp_path / 'student', config, network='resnet14')
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    logits = run_example('In PyTorch', folder, images)
    assert relative_distance(logits, load_student(folder)(images)) < 1e-4


class OneSetting(Setting):
    """ONE on ResNet-8 with three branches: PyTorch's network, and its start imported here."""

    def __init__(self):
        super().__init__(
            **{
                'model.num_branches': 3,
                'data.augment': 'none',
                'method.rampup_fraction': 0.0,
                'optimizer.schedule': 'constant',
                'optimizer.weight_decay': 5e-3,
            }
        )
        torch.manual_seed(0)
        self.theirs = torch_networks.OneResNet(torch_networks.Basic, 1, 10).train()
        initial = self.initial_state()
        variables = self.import_weights(initial.variables)
        self.state = initial.replace(**variables)

    def import_weights(self, template):
        state_dict = {name: tensor.numpy() for name, tensor in self.theirs.state_dict().items()}
        variables = torch_interop.from_one_checkpoint(state_dict, template, 3)
        # Copies: PyTorch goes on to train in the memory that the arrays may share.
        return jax.tree.map(lambda x: jnp.array(x, copy=True), variables)

    def batch(self, step):
        """Normalised images and labels, here and in PyTorch."""
        batch = self.batches.batch(step)
        images = augment.normalise(batch['image'], self.spec.mean, self.spec.std, jnp.float32)
        labels = batch['label']
        return (images, labels), (to_torch(np.asarray(images)), torch.from_numpy(labels).long())


def test_an_imported_one_network_has_the_same_outputs_loss_and_gradients():
    setting = OneSetting()
    (images, labels), (their_images, their_labels) = setting.batch(0)

    @jax.jit
    def forward_backward(params, batch_stats):
        def loss_function(params):
            outputs, _ = setting.recipe.network.apply(
                {'params': params, 'batch_stats': batch_stats},
                images,
                train=True,
                mutable=['batch_stats'],
            )
            loss, _ = losses.one_loss(outputs.logits, outputs.teacher_logits, labels, 3.0, 1.0)
            return loss, (outputs.logits, outputs.teacher_logits)

        return jax.value_and_grad(loss_function, has_aux=True)(params)

    (loss, (branches, teacher)), gradients = forward_backward(**setting.state.variables)
    their_branches, their_teacher = setting.theirs(their_images)
    their_loss = torch_networks.one_loss(their_branches, their_teacher, their_labels)
    their_loss.backward()

    for branch in range(3):
        assert relative_distance(branches[branch], their_branches[branch].detach()) < 1e-4
    assert relative_distance(teacher, their_teacher.detach()) < 1e-4
    assert float(loss) == pytest.approx(their_loss.item(), rel=1e-5)
    named = torch_interop.to_one_checkpoint(
        {'params': gradients, 'batch_stats': setting.state.batch_stats}, 3
    )
    for name, parameter in setting.theirs.named_parameters():
        if name == 'control_v1.bias':
            # The normalisation after it takes it away: rounding is all there is.
            assert np.abs(named[name]).max() < 1e-6 > parameter.grad.abs().max()
        else:
            assert relative_distance(named[name], parameter.grad) < 1e-3, name


def as_biased(variance, count, steps):
    """Flax's running variance in place of PyTorch's, both from 1 and with momentum 0.9.

    A running variance is a weighted sum of the start, by 0.9 ** steps, and of the batches'
    variances, of which PyTorch has n / (n - 1) times as much.

    Args:
      variance: PyTorch's.
      count: n, the values a channel has in a batch.
      steps: taken so far.
    """
    start = 0.9**steps
    return start + (variance - start) * (count - 1) / count


def test_ten_steps_of_training_are_the_same():
    """The project's own train step, Nesterov momentum and weight decay included."""
    setting, steps = OneSetting(), 10
    counts = {}
    for name, module in setting.theirs.named_modules():
        if hasattr(module, 'running_var'):
            module.register_forward_hook(
                lambda module, inputs, _, name=name: counts.update(
                    {name: inputs[0].numel() // module.num_features}
                )
            )
    optimizer = torch.optim.SGD(
        setting.theirs.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-3
    )
    mesh = parallel.make_mesh(jax.devices()[:1])
    step = train.make_train_step(setting.recipe, mesh)
    state = parallel.replicate(setting.state, mesh)
    start = torch_interop.to_one_checkpoint(jax.device_get(setting.state.variables), 3)
    for number in range(steps):
        batch = {name: values[None] for name, values in setting.batches.batch(number).items()}
        state, metrics = step(state, parallel.shard_batch(batch, mesh, parallel.STEPS_AND_BATCH))
        _, (images, labels) = setting.batch(number)
        optimizer.zero_grad()
        loss = torch_networks.one_loss(*setting.theirs(images), labels)
        loss.backward()
        optimizer.step()
        assert float(metrics['loss'][0]) == pytest.approx(loss.item(), rel=1e-3), number

    ours = torch_interop.to_one_checkpoint(jax.device_get(state.variables), 3)
    again = torch_networks.OneResNet(torch_networks.Basic, 1, 10)
    again.load_state_dict({name: torch.tensor(array) for name, array in ours.items()}, strict=True)
    for name, tensor in setting.theirs.state_dict().items():
        expected = tensor.numpy()
        module, _, kind = name.rpartition('.')
        if kind == 'num_batches_tracked':
            assert expected == steps
            continue
        if kind == 'running_var':
            expected = as_biased(expected, counts[module], steps)
        assert relative_distance(ours[name], expected) < 1e-3, name
        assert relative_distance(start[name], expected) > 1e-2, name
