"""The same networks in PyTorch: exported weights there, weights and training from there here.

The networks of `torch_networks` are written from the papers. Both sides compute in float32.
PyTorch's running variance is unbiased (over n - 1), Flax's is not (over n). Training does not
depend on it; comparisons of running statistics convert PyTorch's with `as_biased`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from student_fixtures import generated_config, random_variables, run_example, write_student
from training_fixtures import Setting

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

    def __init__(self):
        super().__init__(
            **{
                'method.name': 'one',
                'model.num_branches': 3,
                'data.augment': 'none',
                'method.rampup_fraction': 0.0,
                'optimizer.learning_rate': 0.1,
                'optimizer.weight_decay': 5e-3,
            }
        )
        torch.manual_seed(0)
        self.theirs = torch_networks.OneResNet(torch_networks.Basic, 1, 10).train()
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


def as_biased(variance, count, steps):
    """Converts PyTorch's running variance to Flax's, both from 1 and with momentum 0.9.

    A running variance is a weighted sum of the start, by 0.9 ** steps, and of the batches'
    variances, which PyTorch multiplies by n / (n - 1).

    Args:
      variance: PyTorch's.
      count: n, the values per channel in a batch.
      steps: completed steps.
    """
    start = 0.9**steps
    return start + (variance - start) * (count - 1) / count


def test_ten_steps_of_training_are_the_same_as_in_pytorch():
    """With the project's own train step, Nesterov momentum and weight decay."""
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
    start = torch_interop.to_one_checkpoint(jax.device_get(setting.start.variables), 3)
    state, metrics = setting.run(range(steps), setting.start)
    for number in range(steps):
        _, (images, labels) = setting.batch(number)
        optimizer.zero_grad()
        loss = torch_networks.one_loss(*setting.theirs(images), labels)
        loss.backward()
        optimizer.step()
        assert metrics[number]['loss'] == pytest.approx(loss.item(), rel=1e-3), number

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
            expected = as_biased(expected, counts[module], steps)
        assert distance(ours[name], expected) < 1e-3, name
        assert distance(start[name], expected) > 1e-2, name
