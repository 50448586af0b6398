"""The configuration: every field with its default, and validation. Nothing here reads a disk."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import traverse_util
from ml_collections import config_dict

from one_jax import methods, models
from one_jax.data.table import AUGMENTATIONS, DATASETS, IMAGE_FOLDER, is_streamed, resizes
from one_jax.errors import explain, require, require_kinds, require_number
from one_jax.fields import (
    DEFAULT_CACHE,
    KINDS,
    MACHINE_FIELDS,
    REMOVED,
    RENAMED,
    Kind,
    flatten,
    get_field,
    or_none,
)
from one_jax.models import layers

# The values of fields that name one of several things.
CHOICES = {
    'model.dtype': ('float32', 'bfloat16', 'float64'),
    'model.branch_conv': tuple(layers.BRANCH_CONVOLUTIONS),
    'model.remat': layers.REMAT,
    'optimizer.schedule': ('step', 'cosine', 'constant'),
    'data.placement': ('auto', 'host', 'device'),
    'data.augment': ('default', *AUGMENTATIONS),
}
# Steps or images, which devices count in int32.
_MANY = 10**9
# The range of every field that is a number: the least value, and a bound that is too large. That of
# fields whose default is None depends on the method: `methods.base`.
RANGES = {
    'seed': (0, 2**32),
    'profile_steps': (0, 10_000),
    'data.batch_size': (1, 10**6),
    'data.eval_batch_size': (1, 10**6),
    'data.image_size': (0, 10_000),
    'data.padding': (-1, 10_000),
    'data.examples_per_class': (0, _MANY),
    'data.subset_seed': (0, 2**32),
    'data.generated_examples': (0, _MANY),
    'data.mixup_alpha': (0, 1000),
    'data.cutmix_alpha': (0, 1000),
    'data.validation_fraction': (0, 1),
    'data.decode_threads': (0, 1024),
    'data.prefetch': (1, 1024),
    'optimizer.learning_rate': (0, 1000),
    'optimizer.reference_batch_size': (0, 10**6),
    'optimizer.momentum': (0, 1),
    'optimizer.weight_decay': (0, 100),
    'optimizer.decay_factor': (0, 100),
    'optimizer.warmup_epochs': (0, 10**6),
    'train.epochs': (1, 10**6),
    'train.steps': (0, _MANY),
    'train.label_smoothing': (0, 1),
    'train.ema_decay': (0, 1),
    'train.log_every': (1, _MANY),
    'train.eval_every_epochs': (1, _MANY),
    'train.checkpoint_every_epochs': (1, _MANY),
    'train.keep_checkpoints': (1, 10**6),
    'train.steps_per_call': (0, 10_000),
    'train.accumulation_steps': (1, 10**6),
    'train.skip_nonfinite_steps': (0, _MANY),
}


def _is_folder(config: Any) -> bool:
    return config.data.name == IMAGE_FOLDER


def _crops(config: Any) -> bool:
    known, augment = DATASETS.get(config.data.name), config.data.augment
    if augment == 'default':
        augment = known.augment if known and not is_streamed(config.data) else 'none'
    return augment != 'none'


def _draws_images(config: Any) -> bool:
    chosen = 'generated_examples', 'validation_fraction', 'examples_per_class'
    return _is_folder(config) or any(config.data[field] for field in chosen)


# Fields that must have their defaults unless a condition holds, because they change nothing then.
# Left out: fields of speed alone, terms of a loss with the weight 0, `train.epochs` beside `steps`.
_STEPS = (lambda c: c.optimizer.schedule == 'step', "optimizer.schedule='step'")
_MIXES = (lambda c: c.data.batch_size > 1, 'data.batch_size is 2 or more')
_EFFECTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    'optimizer.milestones': _STEPS,
    'optimizer.decay_factor': _STEPS,
    'data.root': (_is_folder, f'data.name={IMAGE_FOLDER!r}'),
    'data.skip_unreadable': (_is_folder, f'data.name={IMAGE_FOLDER!r}'),
    'data.data_dir': (lambda c: not _is_folder(c), 'TFDS has the set; data.root is a folder'),
    'data.image_size': (lambda c: resizes(c.data), 'images are resized'),
    'data.stream': (lambda c: not c.data.generated_examples, 'data.generated_examples=0'),
    'data.padding': (_crops, "data.augment='pad_crop' or 'pad_crop_flip'"),
    'data.subset_seed': (_draws_images, 'images are generated, held out or left out'),
    'data.mixup_alpha': _MIXES,
    'data.cutmix_alpha': _MIXES,
    'train.label_smoothing': (lambda c: c.method.name != 'meal', "meal's teachers give the labels"),
    'method.leader_weight': (lambda c: c.method.leader is not False, 'method.leader=True'),
}


def default_config() -> config_dict.ConfigDict:
    """The default of every field: ONE, three branches of ResNet-32, CIFAR-100, as published."""
    config = config_dict.ConfigDict()

    # Seed of initialisation, shuffling and augmentation.
    config.seed = 0
    # Steps to trace with JAX's profiler, after the first calls; 0 traces nothing.
    config.profile_steps = 0
    # Whether batch normalisation uses statistics of the global batch, not of each device's share.
    config.sync_batch_norm = False

    config.model = model = config_dict.ConfigDict()
    # The network, see one_jax/models/__init__.py.
    model.name = 'resnet32'
    # K, the number of branches during training; None takes the method's default.
    model.num_branches = config_dict.placeholder(int)
    # Stages that the branches share, with the stem; 0 shares nothing: K whole networks. None takes
    # the method's default.
    model.share_stages = config_dict.placeholder(int)
    # Networks of heterogeneous branches, comma-separated, in place of copies of `name`; they share
    # nothing.
    model.branch_networks = ''
    # An exported student of the same network to start from, for fine-tuning; '' starts at random.
    model.init_from = ''
    # Precision of the computation: 'float32', 'bfloat16' (parameters, statistics and losses stay
    # float32), or 'float64' with JAX_ENABLE_X64=1 in the environment.
    model.dtype = 'float32'
    # Convolutions of the branches: 'dense' (one for each branch), 'grouped' (one grouped
    # convolution), or 'auto', which chooses by platform: one joint convolution on TPU, else dense.
    model.branch_conv = 'auto'
    # Rematerialisation: 'none' stores all activations; 'convolutions' stores the input and the
    # convolutions of each block and recomputes the rest, at little cost; 'blocks' stores only the
    # inputs, for the least memory and a third more arithmetic. XLA's CPU compiler undoes it.
    model.remat = 'none'

    config.method = method = config_dict.ConfigDict()
    # The method, see one_jax/methods/.
    method.name = 'one'
    # The fields of all methods, described in the methods' files; None takes the method's default.
    for field, kind in methods.fields().items():
        method[field] = config_dict.placeholder(kind)

    config.data = data = config_dict.ConfigDict()
    # One of one_jax/data/table.py ('cifar100', 'imagenet2012', 'image_folder', ...), or any image
    # classification set prepared by TFDS.
    data.name = 'cifar100'
    # Where TFDS keeps its data; '' is $TFDS_DATA_DIR or ~/tensorflow_datasets.
    data.data_dir = ''
    # Root of the folder of images, for data.name='image_folder'.
    data.root = ''
    # Whether to decode while training, for sets that do not fit in memory; ImageNet always is.
    data.stream = False
    # Whether to leave out the images of a folder that cannot be read: they are counted and named.
    data.skip_unreadable = False
    # Side to which images of a folder or a stream are resized and cropped; 0: the data set's.
    data.image_size = 0
    # Images per step, over all devices.
    data.batch_size = 128
    # Whether the images that are left after the last whole batch of an epoch are dropped, or form a
    # smaller batch (of sets in memory).
    data.drop_last = True
    # Images per evaluation batch, over all devices; the last batch is padded and masked.
    data.eval_batch_size = 500
    # Augmentation: 'none', 'pad_crop', 'pad_crop_flip', or 'default' for the data set's; a stream's
    # default is a random-resized crop and a flip.
    data.augment = 'default'
    # Pixels of zero padding before the crop; -1 takes the data set's.
    data.padding = -1
    # Alpha of mixup's Beta distribution; 0 for no mixup.
    data.mixup_alpha = 0.0
    # Alpha of CutMix; 0 for no CutMix. With both, each batch uses one of the two at random.
    data.cutmix_alpha = 0.0
    # Share of the training images held out as the split 'validation', stratified by class.
    data.validation_fraction = 0.0
    # Training images per class (nested subsets); 0 takes all.
    data.examples_per_class = 0
    # Seed of that subset and of the held-out images; independent of `seed`, so runs share data.
    data.subset_seed = 0
    # Where a data set in memory keeps its training images: on the 'host', which sends every batch;
    # on each 'device'; 'auto' chooses the device on accelerators with room for them.
    data.placement = 'auto'
    # Threads that decode a stream; 0 is one per processor core.
    data.decode_threads = 0
    # Batches of a stream to decode ahead.
    data.prefetch = 2
    # Replaces the data set by this many generated images of its shape and classes; 0: real ones.
    data.generated_examples = 0

    config.optimizer = optimizer = config_dict.ConfigDict()
    # Learning rate after the warm-up; not rescaled with batch size unless the next field is set.
    optimizer.learning_rate = 0.1
    # Batch size that the rate is given for: other sizes scale it in proportion; 0: no scaling.
    optimizer.reference_batch_size = 0
    # Momentum of SGD.
    optimizer.momentum = 0.9
    # Whether momentum is Nesterov's.
    optimizer.nesterov = True
    # Weight decay on all parameters, added to the gradient before the momentum.
    optimizer.weight_decay = 1e-4
    # 'step' (multiplied by decay_factor at each milestone), 'cosine' (to 0) or 'constant'.
    optimizer.schedule = 'step'
    # Milestones of the step schedule, as shares of the run.
    optimizer.milestones = (0.5, 0.75)
    # Factor of the step schedule.
    optimizer.decay_factor = 0.1
    # Epochs of linear warm-up from 0; may be fractional.
    optimizer.warmup_epochs = 0.0

    config.train = train = config_dict.ConfigDict()
    # Epochs of training.
    train.epochs = 300
    # Steps of training, in place of epochs; 0 uses the epochs.
    train.steps = 0
    # Probability mass of a label that is spread evenly over all classes.
    train.label_smoothing = 0.0
    # Decay of the moving averages of the weights, which are evaluated and exported; 0: none.
    train.ema_decay = 0.0
    # Steps between training records; every epoch ends with one too.
    train.log_every = 50
    # Epochs between evaluations; the run ends with one too.
    train.eval_every_epochs = 1
    # Epochs between checkpoints; the run ends with one too.
    train.checkpoint_every_epochs = 1
    # How many of the latest checkpoints to keep.
    train.keep_checkpoints = 2
    # Train steps per call of the compiled function; more than 1 is for accelerators. 0 is 10 with
    # images in an accelerator's memory, else 1.
    train.steps_per_call = 0
    # Parts into which each device's batch is split, to save memory; batch normalisation sees each
    # part separately.
    train.accumulation_steps = 1
    # How many steps in a row may be skipped because the loss or the gradient is not finite; 0 stops
    # the run at the first.
    train.skip_nonfinite_steps = 0
    # Where compiled programs are cached; '' keeps JAX's own setting, no cache.
    train.compilation_cache_dir = DEFAULT_CACHE
    return config.lock()


def validate(
    config: config_dict.ConfigDict, num_devices: int = 1, effects: bool = True
) -> methods.Method:
    """Checks every field that can be checked without the data set.

    Args:
      config: a whole configuration.
      num_devices: devices that share a batch.
      effects: whether a field without effect is an error; runs of earlier versions have some.

    Returns:
      The method.

    Raises:
      ConfigError: the first field whose value is not allowed.
    """
    # A ConfigDict lets None, and a bool for an int, pass.
    require_kinds(flatten(config), dict(_kinds(default_config())))
    for field, choices in CHOICES.items():
        require(get_field(config, field) in choices, field, get_field(config, field), choices)
    dtype = config.model.dtype
    allowed = 'float32 or bfloat16 unless JAX_ENABLE_X64=1 is in the environment'
    require(jax.dtypes.canonicalize_dtype(dtype) == dtype, 'model.dtype', dtype, allowed)
    for field, (least, bound) in RANGES.items():
        require_number(field, get_field(config, field), least, bound)
    milestones = tuple(config.optimizer.milestones)
    # A bool is an int in Python.
    numbers = all(isinstance(x, int | float) and x not in (0, 1) for x in milestones)
    rising = numbers and all(a < b for a, b in itertools.pairwise((0, *milestones, 1)))
    allowed = 'increasing shares of the run, in (0, 1)'
    require(rising, 'optimizer.milestones', milestones, allowed)
    if effects:
        _check_effects(config)
    models.network(config.model.name)
    method = methods.create(config)
    if config.model.remat != 'none':
        has_blocks = all(map(models.has_blocks, method.branch_networks))
        allowed = "'none': a network of the run has no blocks"
        require(has_blocks, 'model.remat', config.model.remat, allowed)
    require(
        not method.uses_validation or config.data.validation_fraction > 0,
        'data.validation_fraction',
        config.data.validation_fraction,
        f'above 0: with these settings method.name={method.name!r} requires held-out images',
    )
    require(
        not (method.augments_branches and method.share_stages),
        'model.share_stages',
        method.share_stages,
        '0 if every branch sees its own images',
    )
    streamed = is_streamed(config.data)
    placement, allowed = config.data.placement, "'auto' or 'host' for a streamed data set"
    require(placement != 'device' or not streamed, 'data.placement', placement, allowed)
    drop_last, allowed = config.data.drop_last, 'True for a streamed data set'
    require(drop_last or not streamed, 'data.drop_last', drop_last, allowed)
    for field in ('batch_size', 'eval_batch_size'):
        size = config.data[field]
        allowed = f'a multiple of the {num_devices} devices'
        require(size % num_devices == 0, f'data.{field}', size, allowed)
    parts = config.train.accumulation_steps
    require(
        config.data.batch_size % (num_devices * parts) == 0,
        'train.accumulation_steps',
        parts,
        f'such that {num_devices} devices times it divide data.batch_size={config.data.batch_size}',
    )
    return method


def _check_effects(config: config_dict.ConfigDict) -> None:
    defaults, values = flatten(default_config()), flatten(config)
    for field, (has_effect, condition) in _EFFECTS.items():
        value, unset = values.get(field, defaults[field]), defaults[field]
        allowed = f'its default, {unset!r}, unless {condition}'
        require(value == unset or has_effect(config), field, value, allowed)


def resolve(config: config_dict.ConfigDict) -> config_dict.FrozenConfigDict:
    """Returns a frozen copy in which the method's defaults replace every None.

    Fields that the method does not read are left out.
    """
    method = methods.create(config)
    resolved = config.copy_and_resolve_references()
    with resolved.unlocked():
        resolved.method = {'name': method.name, **method.settings}
        resolved.model.num_branches = method.num_branches
        resolved.model.share_stages = method.share_stages
    return config_dict.FrozenConfigDict(resolved)


def stored_config(stored: Mapping[str, Any]) -> config_dict.FrozenConfigDict:
    """Restores the resolved config from the content of a config.json, which may be an older one.

    Fields that were added since have their defaults, and renamed ones their new names. Raises
    `UserError` for a value that no config has.
    """
    config = default_config()
    flat = {RENAMED.get(field, field): value for field, value in flatten(stored).items()}
    for field in REMOVED:
        flat.pop(field, None)
    if flat.get('model.remat') == 'all':
        flat['model.remat'] = 'none'
    require_kinds(flat, dict(_kinds(config)))
    with explain('its fields do not fit together', TypeError), config.unlocked():
        config.update(traverse_util.unflatten_dict(flat, sep='.'))
    return resolve(config)


def _kinds(config: config_dict.ConfigDict, prefix: str = '') -> Iterator[tuple[str, Kind]]:
    """Yields what every field and every group of a config.json may be, by dotted name."""
    for name, value in config.items():
        is_group = hasattr(value, 'items')
        kind = KINDS[dict if is_group else config.get_type(name)]
        yield prefix + name, or_none(kind) if value is None else kind
        if is_group:
            yield from _kinds(value, f'{prefix}{name}.')


def differences(stored: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Describes the fields in which two resolved configs differ; `MACHINE_FIELDS` may."""
    old, new = flatten(stored), flatten(config)
    absent = '(absent)'
    return [
        f'{field}: {old.get(field, absent)!r} in the workdir, {new.get(field, absent)!r} now'
        for field in sorted(old.keys() | new.keys())
        if field not in MACHINE_FIELDS and old.get(field, absent) != new.get(field, absent)
    ]
