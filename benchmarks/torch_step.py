"""The plain network and ONE as a PyTorch user would train them, written from the papers.

ResNets of He et al. 2016 and ONE of Lan et al. 2018, in PyTorch's own idiom: modules, autograd,
`torch.optim.SGD`, automatic mixed precision for bfloat16. It runs on a GPU, if there is one, with
cuDNN's search for the fastest convolutions and the fused optimiser, or on as many cores as JAX.
Images are normalised before anything is timed, and neither cropped nor flipped; no accuracy is
computed. So a step has less to do than one_jax's.
"""

import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from one_jax.errors import UserError
from one_jax.training.experiment import Experiment

_IMAGENET_BLOCKS = {'resnet18': (2, 2, 2, 2), 'resnet34': (3, 4, 6, 3)}


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.body(x) + self.shortcut(x), inplace=True)


class Network(nn.Module):
    """A ResNet, or its branched form with ONE's gate.

    Args:
      name: 'resnet18', 'resnet34', or 'resnetN' for CIFAR with N = 6n + 2.
      num_classes: C.
      num_branches: K; 1 is the plain network.
      share_stages: stages that the branches share.

    Raises:
      UserError: there is no such network here.
    """

    def __init__(self, name: str, num_classes: int, num_branches: int, share_stages: int):
        super().__init__()
        depth = re.fullmatch(r'resnet(\d+)', name)
        if name in _IMAGENET_BLOCKS:
            blocks, width = _IMAGENET_BLOCKS[name], 64
            stem = [nn.Conv2d(3, width, 7, 2, padding=3, bias=False), nn.BatchNorm2d(width)]
            stem += [nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1)]
        elif depth and int(depth[1]) % 6 == 2:
            blocks, width = (int(depth[1]) // 6,) * 3, 16
            stem = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
            stem += [nn.ReLU(inplace=True)]
        else:
            raise UserError(f'--networks={name!r}: with --torch, resnet18, resnet34 or resnetN')
        widths = [width * 2**index for index in range(len(blocks))]

        def stages(first: int, last: int) -> list[nn.Module]:
            layers = []
            for index in range(first, last):
                inputs = widths[max(index - 1, 0)]
                layers.append(Block(inputs, widths[index], 1 if index == 0 else 2))
                layers += [Block(widths[index], widths[index], 1) for _ in range(blocks[index] - 1)]
            return layers

        self.trunk = nn.Sequential(*stem, *stages(0, share_stages))
        self.branches = nn.ModuleList(
            nn.Sequential(
                *stages(share_stages, len(blocks)),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(widths[-1], num_classes),
            )
            for _ in range(num_branches)
        )
        self.gate = None
        if num_branches > 1:
            self.gate = nn.Sequential(
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(widths[share_stages - 1], num_branches),
                nn.BatchNorm1d(num_branches),
                nn.ReLU(),
                nn.Softmax(dim=1),
            )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Maps images [B, 3, H, W] to logits [K, B, C] and, with a gate, the teacher's [B, C]."""
        shared = self.trunk(images)
        logits = torch.stack([branch(shared) for branch in self.branches])
        if self.gate is None:
            return logits, None
        return logits, torch.einsum('bk,kbc->bc', self.gate(shared), logits)


def loss_function(
    logits: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor,
    temperature: float = 3.0,
    distill_weight: float = 1.0,
) -> torch.Tensor:
    """Computes the cross-entropy of the plain network, or ONE's loss (equations 6 to 8).

    Args:
      logits: [K, B, C].
      teacher: [B, C], or None.
      labels: [B].
      temperature: T.
      distill_weight: of the divergence.
    """
    loss = sum(functional.cross_entropy(branch, labels) for branch in logits)
    if teacher is None:
        return loss
    target = functional.log_softmax(teacher.detach() / temperature, dim=1)
    divergence = sum(
        functional.kl_div(
            functional.log_softmax(branch / temperature, dim=1),
            target,
            reduction='batchmean',
            log_target=True,
        )
        for branch in logits
    )
    loss = loss + functional.cross_entropy(teacher, labels)
    return loss + distill_weight * temperature**2 * divergence


class Training:
    """Trains the plain network or ONE.

    Args:
      experiment: the network, precision and optimiser of one_jax's case.
      batches: images uint8 [B, H, W, 3] and labels [B], used in turn.
      compiled: whether to use `torch.compile`.

    Raises:
      UserError: there is no such network here.
    """

    def __init__(self, experiment: Experiment, batches: Sequence[dict[str, Any]], compiled: bool):
        self._device = 'cuda' if torch.cuda.is_available() else 'cpu'
        config, spec = experiment.config, experiment.spec
        if self._device == 'cpu':
            torch.set_num_threads(len(os.sched_getaffinity(0)))
        else:
            torch.backends.cudnn.benchmark = True
        torch.manual_seed(config.seed)
        model = config.model
        self._network = Network(
            model.name, spec.num_classes, model.num_branches, model.share_stages
        ).to(self._device, memory_format=torch.channels_last)
        self._dtype = getattr(torch, model.dtype)
        self._optimizer = torch.optim.SGD(
            self._network.parameters(),
            config.optimizer.learning_rate,
            momentum=config.optimizer.momentum,
            nesterov=config.optimizer.nesterov,
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )
        self._batches = [self._on_device(batch, spec.mean, spec.std) for batch in batches]
        self._compute_loss = torch.compile(self._eager_loss) if compiled else self._eager_loss
        self._steps = 0

    def _on_device(self, batch: dict[str, Any], mean: Any, std: Any) -> tuple[torch.Tensor, ...]:
        images = (batch['image'] / np.float32(255) - np.asarray(mean)) / np.asarray(std)
        images = torch.from_numpy(images.astype(np.float32).transpose(0, 3, 1, 2))
        images = images.to(self._device, memory_format=torch.channels_last)
        return images, torch.from_numpy(batch['label']).long().to(self._device)

    def _eager_loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self._device, self._dtype, enabled=self._dtype == torch.bfloat16):
            logits, teacher = self._network(images)
        teacher = None if teacher is None else teacher.float()
        return loss_function(logits.float(), teacher, labels)

    def advance(self, num_steps: int) -> float:
        """Makes the steps, waits for the last, and returns its loss."""
        for _ in range(num_steps):
            images, labels = self._batches[self._steps % len(self._batches)]
            self._optimizer.zero_grad(set_to_none=True)
            loss = self._compute_loss(images, labels)
            loss.backward()
            self._optimizer.step()
            self._steps += 1
        if self._device == 'cuda':
            torch.cuda.synchronize()
        return loss.item()
