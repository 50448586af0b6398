"""The configuration: every field with its default, the options of a config file, and validation."""

import math
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from one_jax import methods, models
from one_jax.data import datasets
from one_jax.errors import ConfigError, UserError
from one_jax.models import layers

SCHEDULES = ('step', 'cosine', 'constant')
DTYPES = ('float32', 'bfloat16', 'float64')
# Where a data set in memory has its training images.
PLACEMENTS = ('auto', 'host', 'device')
# Fields that say where things are on one machine, and what it has to read them.
LOCAL_FIELDS = (
    'data.data_dir',
    'data.root',
    'data.decode_threads',
    'data.prefetch',
    'method.teachers',
    'train.compilation_cache_dir',
)
# Fields that do not change what is computed: a resumed run may have others.
MACHINE_FIELDS = (
    *LOCAL_FIELDS,
    'data.placement',
    'model.branch_conv',
    'model.keep_activations',
    'profile_steps',
    'train.steps_per_call',
)


def default_config() -> config_dict.ConfigDict:
    """The default of every field: ONE, three branches of ResNet-32, CIFAR-100, as published."""
    config = config_dict.ConfigDict()

    # Seed of initialisation, shuffling and augmentation.
    config.seed = 0
    # Seeds to train at once in one program, each in a workdir of its own, seed-N in the one that is
    # given; (): `seed` alone.
    config.seeds = ()
    # Trace this many steps with JAX's profiler, after the first calls; 0: none.
    config.profile_steps = 0
    # Whether batch normalisation uses statistics of the global batch instead of each device's own.
    config.sync_batch_norm = False

    config.model = model = config_dict.ConfigDict()
    # The network, see one_jax/models/__init__.py.
    model.name = 'resnet32'
    # K, the number of branches during training; None takes the method's own.
    model.num_branches = config_dict.placeholder(int)
    # How many stages the branches share, the stem included; 0 shares nothing: K whole networks.
    # None takes the method's own.
    model.share_stages = config_dict.placeholder(int)
    # Networks of unlike members, separated by commas, in place of copies of `name`; they share
    # nothing.
    model.members = ''
    # An exported student of the same network to start from, for fine-tuning; empty: random numbers.
    model.init_from = ''
    # Computation in 'float32', 'bfloat16' (parameters, statistics and losses stay float32) or
    # 'float64'.
    model.dtype = 'float32'
    # Convolutions of the branches: 'dense' (one after the other), 'grouped' (one grouped
    # convolution), 'gemm' (small maps as batched products of matrices), or 'auto' (the form for the
    # platform: dense on all, so far).
    model.branch_conv = 'auto'
    # What is kept for the backward pass: 'all'; of each block of layers its input and what its
    # 'convolutions' compute, hardly slower; or its input alone, 'blocks', for the least memory and
    # a third more arithmetic. The rest is computed again. For accelerators: XLA's CPU compiler
    # undoes it.
    model.keep_activations = 'all'

    config.method = method = config_dict.ConfigDict()
    # The method, see one_jax/methods/.
    method.name = 'one'
    # The fields of all methods, each described in the method's file; None takes the method's own.
    for field, kind in methods.fields().items():
        method[field] = config_dict.placeholder(kind)

    config.data = data = config_dict.ConfigDict()
    # One of one_jax/data/table.py ('cifar100', 'imagenet2012', 'image_folder', ...), or any image
    # classification set prepared by TFDS.
    data.name = 'cifar100'
    # Where TFDS keeps its data; empty: $TFDS_DATA_DIR, or ~/tensorflow_datasets.
    data.data_dir = ''
    # Root of the folder of images, for data.name='image_folder'.
    data.root = ''
    # Decode while training, for sets that do not fit in memory; ImageNet always is.
    data.stream = False
    # Side to which images of a folder or a stream are scaled and cropped; 0: the data set's own.
    data.image_size = 0
    # Images a step, over all devices.
    data.batch_size = 128
    # Images a batch of evaluation, over all devices; the last batch is padded and masked.
    data.eval_batch_size = 500
    # Augmentation: 'none', 'pad_crop', 'pad_crop_flip', or 'default' for the data set's own.
    data.augment = 'default'
    # Pixels of zero padding before the crop; -1 takes the data set's own.
    data.padding = -1
    # Mixup's alpha (Beta distribution of the ratio); 0 for no mixup.
    data.mixup_alpha = 0.0
    # CutMix's alpha; 0 for no CutMix. With both, one of the two is tossed up for each batch.
    data.cutmix_alpha = 0.0
    # Share of the training images held out as the split 'validation', in every class alike.
    data.validation_fraction = 0.0
    # Train on this many images of each class (nested subsets); 0 takes all.
    data.examples_per_class = 0
    # Seed of that subset and of the held-out images, apart from `seed`: runs share their data.
    data.subset_seed = 0
    # Where a data set in memory has its training images: on the 'host', which sends every batch; on
    # each 'device', where the train step takes its batch; 'auto': on accelerators with room for it.
    data.placement = 'auto'
    # Threads that decode a stream; 0: one for each processor core.
    data.decode_threads = 0
    # Batches of a stream that are decoded ahead.
    data.prefetch = 2
    # Replace the data set by this many generated images of its shape and classes; 0: the real ones.
    data.generated_examples = 0

    config.optimizer = optimizer = config_dict.ConfigDict()
    # Learning rate after the warm-up, for the global batch as it is (never scaled behind your
    # back), unless the next field is set.
    optimizer.learning_rate = 0.1
    # Batch size for which that rate holds; others scale it in proportion. 0: no scaling.
    optimizer.reference_batch_size = 0
    # Momentum of SGD.
    optimizer.momentum = 0.9
    # Nesterov momentum, or plain.
    optimizer.nesterov = True
    # Weight decay on all parameters, added to the gradient before the momentum.
    optimizer.weight_decay = 1e-4
    # 'step' (times decay_factor at each milestone), 'cosine' (to 0) or 'constant'.
    optimizer.schedule = 'step'
    # Milestones of the step schedule, as shares of the run.
    optimizer.milestones = (0.5, 0.75)
    # Factor of the step schedule.
    optimizer.decay_factor = 0.1
    # Epochs of linear warm-up from 0; may be a fraction.
    optimizer.warmup_epochs = 0.0

    config.train = train = config_dict.ConfigDict()
    # Epochs of training.
    train.epochs = 300
    # Steps of training in place of epochs; 0 goes by the epochs.
    train.steps = 0
    # Probability mass spread evenly over all classes in the label of the cross-entropy.
    train.label_smoothing = 0.0
    # Decay of the moving averages of the weights, which are then evaluated and exported; 0: none.
    train.ema_decay = 0.0
    # Steps between two training records (there is one at every epoch's end too).
    train.log_every = 50
    # Epochs between two evaluations (there is one at the end too).
    train.eval_every_epochs = 1
    # Epochs between two checkpoints (there is one at the end too).
    train.checkpoint_every_epochs = 1
    # How many of the latest checkpoints are kept; with a validation split, the best one too.
    train.keep_checkpoints = 2
    # Train steps per call of the compiled function; more than 1 is for accelerators. 0: 1 on CPU
    # and where images come from the host, else 10.
    train.steps_per_call = 0
    # Parts into which each device's batch is cut, one after the other, to save memory; batch
    # normalisation sees each part by itself.
    train.accumulation_steps = 1
    # How many steps in a row may be skipped because loss or gradient is not finite; 0: the run
    # stops at the first.
    train.skip_nonfinite_steps = 0
    # Where compiled programs are kept for the next run; empty leaves JAX's own setting, none.
    train.compilation_cache_dir = '~/.cache/one_jax'
    return config.lock()


def apply_options(
    config: config_dict.ConfigDict,
    options: str | None,
    **variants: Mapping[str, Any],
) -> config_dict.ConfigDict:
    """Applies the options of a config file: what follows the colon in `configs/x.py:smoke,plain`.

    Every recipe has two options of its own accord. `plain` is its baseline, the network alone with
    one branch. `smoke` is a few steps on generated images, to see that everything runs.

    Args:
      config: the recipe.
      options: comma-separated names, or None or '' for the recipe as it is.
      **variants: for each option of this recipe, the dotted fields it sets. They come after what
        `plain` and `smoke` set already.

    Raises:
      UserError: an option that the recipe does not have.
    """
    variants = {
        'plain': {**_plain(), **variants.get('plain', {})},
        'smoke': {**_SMOKE, **variants.get('smoke', {})},
        **{name: fields for name, fields in variants.items() if name not in ('plain', 'smoke')},
    }
    for option in filter(None, (options or '').split(',')):
        if option not in variants:
            raise UserError(
                f'config option {option!r} is not one of {", ".join(map(repr, variants))}'
            )
        config.update_from_flattened_dict(variants[option])
    return config


def _plain() -> dict[str, Any]:
    """The network alone: whatever the recipe says of its method and members is taken back."""
    fields = {f'method.{field}': None for field in methods.fields()}
    members = {'model.num_branches': None, 'model.share_stages': None, 'model.members': ''}
    return {**fields, **members, 'method.name': 'plain'}


_SMOKE = {
    'data.generated_examples': 64,
    'data.batch_size': 16,
    'data.eval_batch_size': 16,
    'train.steps': 4,
    'train.log_every': 2,
}


def validate(
    config: config_dict.ConfigDict, num_devices: int = 1, num_eval_devices: int | None = None
) -> datasets.DatasetSpec:
    """Checks every field, before anything is compiled or written.

    Args:
      config: a whole configuration.
      num_devices: devices that share a batch.
      num_eval_devices: devices that share a batch of evaluation, if they are others.

    Returns:
      The description of the data set.

    Raises:
      ConfigError: the first field whose value is not allowed.
      UserError: the data set is not there.
    """
    _validate_numbers(config)
    _choice(config, 'model.dtype', DTYPES)
    _choice(config, 'model.branch_conv', layers.BRANCH_CONVOLUTIONS)
    _choice(config, 'model.keep_activations', layers.KEPT_ACTIVATIONS)
    _choice(config, 'optimizer.schedule', SCHEDULES)
    _choice(config, 'data.placement', PLACEMENTS)
    for milestone in config.optimizer.milestones:
        if not 0 < milestone < 1:
            raise ConfigError(
                'optimizer.milestones', config.optimizer.milestones, 'shares of the run, in (0, 1)'
            )
    models.network(config.model.name)
    method = methods.create(config)
    if config.model.keep_activations != 'all' and not all(map(models.has_blocks, method.members)):
        allowed = "'all': a network of the run has no blocks"
        raise ConfigError('model.keep_activations', config.model.keep_activations, allowed)
    if method.needs_validation and not config.data.validation_fraction:
        raise ConfigError(
            'data.validation_fraction',
            config.data.validation_fraction,
            f'above 0: with these settings method.name={method.name!r} needs held-out images',
        )
    if method.augments_members and method.share_stages:
        raise ConfigError(
            'model.share_stages', method.share_stages, '0, where each member sees its own images'
        )
    spec = validate_data(config.data, num_devices, num_eval_devices)
    if spec.streamed and config.data.placement == 'device':
        allowed = "'auto' or 'host': images that are decoded while training come from there"
        raise ConfigError('data.placement', config.data.placement, allowed)
    parts = num_devices * config.train.accumulation_steps
    if config.data.batch_size % parts:
        raise ConfigError(
            'train.accumulation_steps',
            config.train.accumulation_steps,
            f'such that {num_devices} devices times it divide data.batch_size='
            f'{config.data.batch_size}',
        )
    return spec


def validate_data(
    data: config_dict.ConfigDict, num_devices: int = 1, num_eval_devices: int | None = None
) -> datasets.DatasetSpec:
    """Checks the group `data`; the arguments, result and errors are those of `validate`."""
    devices = {'batch_size': num_devices, 'eval_batch_size': num_eval_devices or num_devices}
    for field, count in devices.items():
        if data[field] % count:
            raise ConfigError(f'data.{field}', data[field], f'a multiple of the {count} devices')
    return datasets.describe(data)


def validate_seeds(config: config_dict.ConfigDict) -> None:
    """Checks `seeds`, and what it asks of other fields.

    Raises:
      ConfigError: a value that is not allowed.
    """
    seeds = tuple(config.seeds)
    if not all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds):
        raise ConfigError('seeds', seeds, 'whole numbers of 0 to 2**32 - 1')
    if len(set(seeds)) < len(seeds):
        raise ConfigError('seeds', seeds, 'numbers that differ from each other')
    if config.train.keep_checkpoints < 2:
        # Killed between the saves of two seeds, all must find a step that they have in common.
        raise ConfigError(
            'train.keep_checkpoints', config.train.keep_checkpoints, 'at least 2 with seeds'
        )


_AT_LEAST = {
    'seed': 0,
    'data.batch_size': 1,
    'data.eval_batch_size': 1,
    'data.image_size': 0,
    'data.padding': -1,
    'data.examples_per_class': 0,
    'data.subset_seed': 0,
    'data.generated_examples': 0,
    'data.mixup_alpha': 0,
    'data.cutmix_alpha': 0,
    'optimizer.learning_rate': 0,
    'optimizer.reference_batch_size': 0,
    'optimizer.weight_decay': 0,
    'optimizer.decay_factor': 0,
    'optimizer.warmup_epochs': 0,
    'train.epochs': 1,
    'train.steps': 0,
    'train.log_every': 1,
    'train.eval_every_epochs': 1,
    'train.checkpoint_every_epochs': 1,
    'train.keep_checkpoints': 1,
    'train.steps_per_call': 0,
    'data.decode_threads': 0,
    'data.prefetch': 1,
    'profile_steps': 0,
    'train.accumulation_steps': 1,
    'train.skip_nonfinite_steps': 0,
}


def _validate_numbers(config: config_dict.ConfigDict) -> None:
    for field, minimum in _AT_LEAST.items():
        value = get_field(config, field)
        if not (math.isfinite(value) and value >= minimum):
            raise ConfigError(field, value, f'at least {minimum}')
    if config.seed >= 2**32:
        raise ConfigError('seed', config.seed, 'below 2**32')
    shares = ('optimizer.momentum', 'data.validation_fraction')
    for field in (*shares, 'train.label_smoothing', 'train.ema_decay'):
        if not 0 <= get_field(config, field) < 1:
            raise ConfigError(field, get_field(config, field), 'at least 0 and below 1')


def _choice(config: config_dict.ConfigDict, field: str, allowed: tuple[str, ...]) -> None:
    if get_field(config, field) not in allowed:
        raise ConfigError(field, get_field(config, field), allowed)


def resolve(config: config_dict.ConfigDict) -> config_dict.ConfigDict:
    """A frozen copy in which the method's own defaults stand for every None.

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
    """The resolved config behind the content of a config.json, which may be an older one."""
    config = default_config()
    with config.unlocked():
        config.update(stored)
    return resolve(config)


def get_field(config: Any, field: str) -> Any:
    """The value of a dotted field of a (nested) config or dictionary."""
    for part in field.split('.'):
        config = config[part]
    return config


def flatten(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """A nested dictionary as dotted names and values; tuples become lists, as in JSON."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, Mapping | config_dict.ConfigDict):
            flat |= flatten(value, f'{prefix}{name}.')
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def differences(stored: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """The fields in which two configs differ, one line each; `MACHINE_FIELDS` may differ.

    A field that came after the stored config was written counts as having its default there.
    """
    old, new = flatten(stored_config(stored)), flatten(config)
    absent = '(absent)'
    return [
        f'{field}: {old.get(field, absent)!r} in the workdir, {new.get(field, absent)!r} now'
        for field in sorted(old.keys() | new.keys())
        if field not in MACHINE_FIELDS and old.get(field, absent) != new.get(field, absent)
    ]
