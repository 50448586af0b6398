"""PyTorch networks, written for the tests from the papers, with torchvision's names.

The residual networks of He et al. 2016 and Xie et al. 2017, and ONE's network in training (Lan et
al. 2018) with the names of its authors' code: `layer3_1`, `classfier3_1`, `control_v1`, `bn_v1`.
"""

import functools

import torch
from torch import nn
from torch.nn import functional


class Basic(nn.Module):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = shortcut(inputs, width, stride)

    def forward(self, x):
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return functional.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride, 1x1 to four times the width."""

    expansion = 4

    def __init__(self, inputs, width, stride, groups=1, group_width=None):
        super().__init__()
        # Stage 1 has `groups` groups of `group_width` channels; they double with the width.
        inner = width if group_width is None else width * group_width * groups // 64
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = shortcut(inputs, 4 * width, stride)

    def forward(self, x):
        y = functional.relu(self.bn1(self.conv1(x)))
        y = functional.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return functional.relu(y + (x if self.downsample is None else self.downsample(x)))


def shortcut(inputs, outputs, stride):
    """Returns a projection if the shape changes, else None."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def layer(block, inputs, width, count, stride):
    """Returns a stage and its number of output channels."""
    outputs = width * getattr(block, 'func', block).expansion
    blocks = [block(inputs, width, stride)]
    blocks += [block(outputs, width, 1) for _ in range(count - 1)]
    return nn.Sequential(*blocks), outputs


class CifarResNet(nn.Module):
    """Three stages of `count` blocks, 16, 32 and 64 wide, behind a 3x3 convolution."""

    def __init__(self, block, count, num_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, channels = layer(block, 16, 16, count, 1)
        self.layer2, channels = layer(block, channels, 32, count, 2)
        self.layer3, channels = layer(block, channels, 64, count, 2)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x):
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


class ImageNetResNet(nn.Module):
    """Four stages, 64 to 512 wide, behind a 7x7 convolution and a max-pool of stride 2 each."""

    def __init__(self, block, counts, num_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1, channels = layer(block, 64, 64, counts[0], 1)
        self.layer2, channels = layer(block, channels, 128, counts[1], 2)
        self.layer3, channels = layer(block, channels, 256, counts[2], 2)
        self.layer4, channels = layer(block, channels, 512, counts[3], 2)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x):
        x = functional.max_pool2d(functional.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


class OneResNet(nn.Module):
    """ONE on a CIFAR ResNet: two shared stages, three branches, and the gate."""

    def __init__(self, block, count, num_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, channels = layer(block, 16, 16, count, 1)
        self.layer2, channels = layer(block, channels, 32, count, 2)
        self.control_v1 = nn.Linear(channels, 3)
        self.bn_v1 = nn.BatchNorm1d(3)
        self.layer3_1, outputs = layer(block, channels, 64, count, 2)
        self.layer3_2, outputs = layer(block, channels, 64, count, 2)
        self.layer3_3, outputs = layer(block, channels, 64, count, 2)
        self.classfier3_1 = nn.Linear(outputs, num_classes)
        self.classfier3_2 = nn.Linear(outputs, num_classes)
        self.classfier3_3 = nn.Linear(outputs, num_classes)

    def forward(self, x):
        """Computes the logits of the branches, [3, B, C], and of the teacher, [B, C]."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        scores = functional.relu(self.bn_v1(self.control_v1(x.mean((2, 3)))))
        weights = functional.softmax(scores, dim=1)
        branches = (
            self.classfier3_1(self.layer3_1(x).mean((2, 3))),
            self.classfier3_2(self.layer3_2(x).mean((2, 3))),
            self.classfier3_3(self.layer3_3(x).mean((2, 3))),
        )
        teacher = sum(weights[:, i, None] * logits for i, logits in enumerate(branches))
        return torch.stack(branches), teacher


def one_loss(branches, teacher, labels, temperature=3.0, weight=1.0, epsilon=0.0):
    """Computes ONE's loss: cross-entropies of branches and teacher, and T^2-scaled divergences.

    The authors' code adds an `epsilon` of 1e-7 to the teacher's probabilities.
    """
    loss = functional.cross_entropy(teacher, labels)
    target = functional.softmax(teacher.detach() / temperature, dim=1) + epsilon
    for logits in branches:
        loss = loss + functional.cross_entropy(logits, labels)
        log_probabilities = functional.log_softmax(logits / temperature, dim=1)
        divergence = functional.kl_div(log_probabilities, target, reduction='batchmean')
        loss = loss + weight * temperature**2 * divergence
    return loss


# By their names in one_jax.
NETWORKS = {
    'resnet8': functools.partial(CifarResNet, Basic, 1),
    'resnet20': functools.partial(CifarResNet, Basic, 3),
    'resnet32': functools.partial(CifarResNet, Basic, 5),
    'resnet110_bottleneck': functools.partial(CifarResNet, Bottleneck, 18),
    'resnet110_bottleneck12': functools.partial(CifarResNet, Bottleneck, 12),
    'resnet18': functools.partial(ImageNetResNet, Basic, (2, 2, 2, 2)),
    'resnet50': functools.partial(ImageNetResNet, Bottleneck, (3, 4, 6, 3)),
    'resnext50_32x4d': functools.partial(
        ImageNetResNet, functools.partial(Bottleneck, groups=32, group_width=4), (3, 4, 6, 3)
    ),
}
