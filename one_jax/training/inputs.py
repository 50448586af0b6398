"""What the train step does to a batch, on the device, before the network sees it."""

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.sharding import Mesh

from one_jax.data import augment
from one_jax.models import convolution
from one_jax.runtime import parallel
from one_jax.training.experiment import Experiment


@struct.dataclass
class Inputs:
    """One device's share of a batch.

    Attributes:
      images: normalised, [b, H, W, 3]; or [K, b, H, W, 3] if every branch sees its own crops.
      labels: [b], integers.
      targets: what the losses compare with: `labels`, or probabilities [b, C] if labels are
        smoothed or mixed.
    """

    images: jax.Array
    labels: jax.Array
    targets: jax.Array


def training_inputs(
    experiment: Experiment, mesh: Mesh, key: jax.Array, images: jax.Array, labels: jax.Array
) -> Inputs:
    """Crops, flips, normalises and mixes this device's share of a batch.

    Random numbers are drawn for the global batch, and mixing partners come from it, so the result
    does not depend on the number of devices.

    Args:
      experiment: its data set's augmentation, and the fields `data.mixup_alpha`,
        `data.cutmix_alpha` and `train.label_smoothing`.
      mesh: this runs inside its `shard_map`.
      key: of the step, the same on every device.
      images: uint8 [b, H, W, 3].
      labels: [b].
    """
    spec, config, method = experiment.spec, experiment.config, experiment.method
    alphas = config.data.mixup_alpha, config.data.cutmix_alpha
    mix_key = jax.random.fold_in(key, 1)

    def one_view(crop_key: jax.Array) -> tuple[jax.Array, jax.typing.ArrayLike]:
        cropped = _crop(experiment, mesh, crop_key, images)
        normalised = augment.normalise(cropped, spec.mean, spec.std, config.model.dtype)
        if not any(alphas):
            return normalised, 1.0
        partners = _partners(cropped, mesh)
        partners = augment.normalise(partners, spec.mean, spec.std, config.model.dtype)
        return augment.mix(mix_key, normalised, partners, *alphas)

    if method.augments_branches:
        # The branches share the mixing ratio, because they share the labels.
        keys = [jax.random.fold_in(key, 2 + branch) for branch in range(method.num_branches)]
        views = [one_view(branch_key) for branch_key in keys]
        normalised, ratio = jnp.stack([view for view, _ in views]), views[0][1]
    else:
        normalised, ratio = one_view(key)
    smoothing = config.train.label_smoothing
    if not any(alphas) and not smoothing:
        return Inputs(normalised, labels, labels)
    targets = jax.nn.one_hot(labels, spec.num_classes)
    if any(alphas):
        targets = ratio * targets + (1 - ratio) * _partners(targets, mesh)
    targets = (1 - smoothing) * targets + smoothing / spec.num_classes
    return Inputs(normalised, labels, targets)


def _crop(experiment: Experiment, mesh: Mesh, key: jax.Array, images: jax.Array) -> jax.Array:
    spec = experiment.spec
    if spec.augment == 'none':
        return images
    offsets, flips = augment.draw_crops(
        key, images.shape[0] * mesh.size, spec.padding, flip=spec.augment == 'pad_crop_flip'
    )
    offsets, flips = _own_share(offsets, mesh), _own_share(flips, mesh)
    by_products = convolution.runs_on_tpu()
    crop = augment.crop_and_flip_by_products if by_products else augment.crop_and_flip
    return crop(images, offsets, flips, spec.padding)


def _own_share(values: jax.Array, mesh: Mesh) -> jax.Array:
    """Takes this device's share of an array [B, ...] that every device holds."""
    size = values.shape[0] // mesh.size
    return lax.dynamic_slice_in_dim(values, lax.axis_index(parallel.DATA_AXIS) * size, size)


def _partners(values: jax.Array, mesh: Mesh) -> jax.Array:
    """For each example of this device, the one at the mirrored position of the global batch."""
    return _own_share(lax.all_gather(values, parallel.DATA_AXIS, tiled=True)[::-1], mesh)
