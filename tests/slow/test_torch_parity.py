"""The same networks in PyTorch: exported weights there, weights and training from there here.

The networks of `torch_networks` are written from the papers. Both sides compute in float32.
PyTorch's running variance is unbiased (over n - 1), Flax's is not (over n). Training does not
depend on it; comparisons of running statistics use `track_biased_variances`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from student_fixtures import generated_config, random_variables, run_example, write_student
from training_fixtures import Setting

from configs.common import AUTHORS
from one_jax import losses, models
from one_jax.data import augment
from one_jax.runtime import parallel
from one_jax.students import torch_interop
from one_jax.students.student import load_student

torch = pytest.importorskip('torch')
import safetensors.torch  # noqa: E402
import torch_networks  # noqa: E402

# Unequal sides: a transposed image or kernel would show.
SHAPES = {'cifar': (16, 24, 3), 'imagenet': (64, 96, 3)}


def to_torch(images):
    """Converts images [B, H, W, 3] to [B, 3, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(np.transpose(images, (0, 3, 1, 2))))


def distance(actual, expected):
    """Returns the Euclidean distance over the expected norm."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def keep_signal(variables):
    """Scales normalisations so that activations neither vanish nor explode in deep networks."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 0.4 if path[-1].key == 'scale' else leaf, variables
    )


@pytest.mark.parametrize(
    ('name', 'kind'),
    [
        ('resnet20', 'cifar'),
        ('resnet110_bottleneck12', 'cifar'),
        ('resnet18', 'imagenet'),
        ('resnet50', 'imagenet'),
        ('resnext50_32x4d', 'imagenet'),
    ],
)
def test_exported_weights_give_the_same_logits_in_pytorch(name, kind):
    shape = SHAPES[kind]
    network = models.make_backbone(name, 7)()
    variables = keep_signal(random_variables(network, shape))
    weights = safetensors.numpy.save(torch_interop.to_state_dict(variables))
    theirs = torch_networks.NETWORKS[name](7)
    theirs.load_state_dict(safetensors.torch.load(weights), strict=True)
    images = np.random.default_rng(1).normal(size=(2, *shape)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.eval()(to_torch(images)).numpy()
    logits = jax.jit(lambda v, x: network.apply(v, x, train=False).logits)(variables, images)
    assert distance(logits, expected) < 1e-4


def test_example_of_the_page_loads_a_student(tmp_path):
    folder = write_student(tmp_path / 'student', generated_config(), network='resnet14')
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    logits = run_example('In PyTorch', folder, images)
    assert distance(logits, load_student(folder)(images)) < 1e-4


class OneSetting(Setting):
    """ONE on ResNet-8 with three branches: PyTorch's network, and its start imported here."""

    def __init__(self, **fields):
        super().__init__(
            **{
                'method.name': 'one',
                'model.num_branches': 3,
                'data.augment': 'none',
                'method.rampup_fraction': 0.0,
                'optimizer.learning_rate': 0.1,
                'optimizer.weight_decay': 5e-3,
                **fields,
            }
        )
        torch.manual_seed(0)
        self.theirs = torch_networks.OneResNet(torch_networks.Basic, 1, 10).train()
        if fields.get('method.gate_scale') == 'uniform':
            torch.nn.init.uniform_(self.theirs.bn_v1.weight)
        initial = self.initial_state(np.uint32(0))
        state_dict = {name: tensor.numpy() for name, tensor in self.theirs.state_dict().items()}
        variables = torch_interop.from_one_checkpoint(state_dict, initial.variables, 3)
        # Copies: PyTorch keeps training in the memory that the arrays may share.
        variables = jax.tree.map(lambda x: jnp.array(x, copy=True), variables)
        self.start = initial.replace(**parallel.replicate(variables, self.mesh))

    def batch(self, step):
        """Returns normalised images and labels, here and in PyTorch."""
        batch, spec = self.host_batch(step), self.source.spec
        images = augment.normalise(batch['image'], spec.mean, spec.std, jnp.float32)
        labels = batch['label']
        return (images, labels), (to_torch(np.asarray(images)), torch.from_numpy(labels).long())


def test_imported_one_network_has_the_same_outputs_loss_and_gradients():
    setting = OneSetting()
    (images, labels), (their_images, their_labels) = setting.batch(0)

    @jax.jit
    def forward_backward(params, batch_stats):
        def loss_function(params):
            outputs, _ = setting.experiment.network.apply(
                {'params': params, 'batch_stats': batch_stats},
                images,
                train=True,
                mutable=['batch_stats'],
            )
            loss, _ = losses.one_loss(outputs.logits, outputs.teacher_logits, labels, 3.0, 1.0)
            return loss, (outputs.logits, outputs.teacher_logits)

        return jax.value_and_grad(loss_function, has_aux=True)(params)

    (loss, (branches, teacher)), gradients = forward_backward(**setting.start.variables)
    their_branches, their_teacher = setting.theirs(their_images)
    their_loss = torch_networks.one_loss(their_branches, their_teacher, their_labels)
    their_loss.backward()

    assert distance(branches, their_branches.detach()) < 1e-4
    assert distance(teacher, their_teacher.detach()) < 1e-4
    assert float(loss) == pytest.approx(their_loss.item(), rel=1e-5)
    named = torch_interop.to_one_checkpoint(
        {'params': gradients, 'batch_stats': setting.start.batch_stats}, 3
    )
    for name, parameter in setting.theirs.named_parameters():
        if name == 'control_v1.bias':
            # The normalisation after it cancels it: only rounding is left.
            assert np.abs(named[name]).max() < 1e-6 > parameter.grad.abs().max()
        else:
            assert distance(named[name], parameter.grad) < 1e-3, name


def track_biased_variances(network):
    """Keeps Flax's running variance of every normalisation beside PyTorch's, by its name.

    Both start from 1 and have a momentum of 0.9; PyTorch multiplies a batch's variance by
    n / (n - 1).
    """
    variances = {}

    def update(module, inputs, _, name):
        axes = [axis for axis in range(inputs[0].ndim) if axis != 1]
        variance = inputs[0].detach().var(axes, unbiased=False)
        variances[name] = 0.9 * variances.get(name, 1.0) + 0.1 * variance

    for name, module in network.named_modules():
        if hasattr(module, 'running_var'):
            module.register_forward_hook(functools.partial(update, name=name))
    return variances


# The ten steps of the settings: our own, and what the code of ONE's authors does. By that, the
# rates drop after 151 and 225 of 300 epochs, and an epoch of 40 images has batches of 16, 16 and 8.
RECIPES = {
    'ours': ({}, {'nesterov': True}, 0.0, {}),
    'authors': (
        {
            **AUTHORS,
            'data.batch_size': 16,
            'optimizer.schedule': 'step',
            'optimizer.milestones': (151 / 300, 225 / 300),
        },
        {},
        1e-7,
        {5: 0.01, 8: 0.001},
    ),
}


@pytest.mark.parametrize('recipe', RECIPES)
def test_ten_steps_of_training_are_the_same_as_in_pytorch(recipe):
    """With the project's own train step, momentum, weight decay and schedule."""
    fields, options, epsilon, rates = RECIPES[recipe]
    setting, steps = OneSetting(**fields), 10
    variances = track_biased_variances(setting.theirs)
    optimizer = torch.optim.SGD(
        setting.theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-3, **options
    )
    start = torch_interop.to_one_checkpoint(jax.device_get(setting.start.variables), 3)
    state, metrics = setting.run(range(steps), setting.start)
    sizes = []
    for number in range(steps):
        _, (images, labels) = setting.batch(number)
        sizes.append(len(images))
        for group in optimizer.param_groups:
            group['lr'] = rates.get(number, group['lr'])
        optimizer.zero_grad()
        loss = torch_networks.one_loss(*setting.theirs(images), labels, epsilon=epsilon)
        loss.backward()
        optimizer.step()
        assert metrics[number]['loss'] == pytest.approx(loss.item(), rel=1e-3), number
    assert sizes == ([8] * 10 if recipe == 'ours' else [16, 16, 8] * 3 + [16])

    ours = torch_interop.to_one_checkpoint(state.variables, 3)
    again = torch_networks.OneResNet(torch_networks.Basic, 1, 10)
    again.load_state_dict({name: torch.tensor(array) for name, array in ours.items()}, strict=True)
    for name, tensor in setting.theirs.state_dict().items():
        expected = tensor.numpy()
        module, _, kind = name.rpartition('.')
        if kind == 'num_batches_tracked':
            assert expected == steps
            continue
        if kind == 'running_var':
            expected = variances[module].numpy()
        assert distance(ours[name], expected) < 1e-3, name
        assert distance(start[name], expected) > 5e-3, name
