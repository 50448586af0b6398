"""Configs, and overrides of every field."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.bad_inputs import bases
from benchmarks.bad_inputs.runner import COMPILES, Case, shows
from one_jax import config as config_lib
from one_jax import fields, methods
from one_jax.methods import base

_HUGE = str(10**20)
# Values that no field of a type may have.
NASTY = {
    bool: ('2', 'nan', 'x'),
    int: ('-7', _HUGE, '1.5', 'nan', 'x', ''),
    float: ('-1', 'nan', 'inf', '1e300', 'x', ''),
    str: ('no such value', '\udcff', 'None'),
    tuple: (
        '(0.5, 0.5)',
        '(0.7, 0.3)',
        "('a',)",
        '(nan,)',
        '(None,)',
        '(0.5, 2.0)',
        '[[0.5]]',
        'x',
    ),
}
# What else must be set for a field to have an effect.
TOGETHER = {
    'data.root': ('data.generated_examples=0',),
    'data.name': ('data.generated_examples=0', 'data.image_size=0'),
    'data.subset_seed': ('data.validation_fraction=0.25',),
    'data.padding': ('data.augment=pad_crop',),
    'optimizer.milestones': ('optimizer.schedule=step',),
    'optimizer.decay_factor': ('optimizer.schedule=step',),
}
# Values among them that are sound.
SOUND = {
    ('data.data_dir', 'no such value'),
    ('data.data_dir', '\udcff'),
    ('data.data_dir', 'None'),
    ('train.compilation_cache_dir', 'no such value'),
    ('train.compilation_cache_dir', '\udcff'),
    ('train.compilation_cache_dir', 'None'),
}
# One field, or several, that do not go with a tiny run of ONE on generated images.
COMBINATIONS = (
    'model.num_branches=300',
    'model.num_branches=4294967296',
    'model.share_stages=99',
    'model.name=resnet33',
    'model.name=../resnet8',
    'model.branch_networks=resnet8,resnet9',
    'model.dtype=float64',
    'model.dtype=float16',
    'model.remat=all',
    'model.init_from=/dev/null',
    'method.name=One',
    'method.teachers=nowhere',
    'method.teacher=nobody',
    'data.name=cifar11',
    'data.name=../../etc',
    'data.name=mnist/',
    'data.batch_size=0',
    'data.batch_size=65',
    'data.batch_size=4294967296',
    'data.eval_batch_size=0',
    'data.eval_batch_size=4294967296',
    'data.image_size=4294967296',
    'data.generated_examples=4294967296',
    'data.examples_per_class=4294967296',
    'data.validation_fraction=1.0',
    'data.decode_threads=100000',
    'data.prefetch=4294967296',
    'data.padding=1000000',
    'data.mixup_alpha=1e30',
    'data.cutmix_alpha=1e30',
    'optimizer.schedule=linear',
    'optimizer.warmup_epochs=1000000.0',
    'optimizer.momentum=1.0',
    'train.label_smoothing=1.0',
    'train.ema_decay=1.0',
    'train.accumulation_steps=7',
    'train.steps_per_call=4294967296',
    'train.compilation_cache_dir=/dev/null/cache',
    'seed=4294967296',
)
FLAGS = {
    'no config': (),
    'config not there': ('--config=configs/absent.py',),
    'config is empty': ('--config=',),
    'config is a folder': ('--config=configs',),
    'config is a device': ('--config=/dev/null',),
    'config too long': (f'--config={"x" * 5000}',),
    'config with a zero byte': ('--config=\0',),
    'unknown option': ('--config=configs/image_folder.py:smok',),
    'two methods': ('--config=configs/image_folder.py:dml,okddip',),
    'option of another method': ('--config=configs/image_folder.py:paper',),
    'unknown flag': (*bases.GENERATED, '--worldir=x'),
    'argument without a flag': (*bases.GENERATED, 'x'),
    'unknown field': (*bases.GENERATED, '--config.data.batchsize=8'),
    'unknown group': (*bases.GENERATED, '--config.optimiser.momentum=0'),
    'group for a field': (*bases.GENERATED, '--config.data=8'),
    'field below a field': (*bases.GENERATED, '--config.seed.x=8'),
    'no name of a field': (*bases.GENERATED, '--config.=8'),
    'renamed field': (*bases.GENERATED, '--config.model.members=resnet8'),
    'removed field': (*bases.GENERATED, '--config.seeds=0,1'),
    'no value': (*bases.GENERATED, '--config.data.batch_size'),
    'lone process id': (*bases.GENERATED, '--process_id=1'),
    'process id out of range': (
        *bases.GENERATED,
        '--process_id=2',
        '--num_processes=2',
        '--coordinator_address=localhost:1',
    ),
}
_FIRST_LINES = 'from one_jax.config import default_config\n\n\ndef get_config(options=""):\n    '
RECIPES = {
    'empty': b'',
    'syntax error': b'def get_config(:\n',
    'indentation': b'def get_config():\n  x\n y\n',
    'binary': bytes(range(256)),
    'zero byte': b'def get_config():\n    return "\0"\n',
    'not UTF-8': 'def get_config(): # \xe9\n    pass\n'.encode('latin-1'),
    'missing get_config': b'config = 1\n',
    'get_config is no function': b'get_config = 1\n',
    'get_config without options': b'def get_config():\n    return None\n',
    'returns None': (_FIRST_LINES + 'return None\n').encode(),
    'returns a dictionary': (_FIRST_LINES + 'return {"seed": 1}\n').encode(),
    'unknown field': (
        _FIRST_LINES + 'c = default_config()\n    c.data.batchsize = 1\n    return c\n'
    ).encode(),
    'unknown group': (
        _FIRST_LINES + 'c = default_config()\n    c.optimiser.x = 1\n    return c\n'
    ).encode(),
    'wrong type': (
        _FIRST_LINES + 'c = default_config()\n    c.seed = "x"\n    return c\n'
    ).encode(),
    'import error': b'import no_such_module\n',
    'raises': b'raise RuntimeError("two\\nlines")\n',
    'get_config raises': (_FIRST_LINES + 'return 1 / 0\n').encode(),
    'exits': b'import sys\nsys.exit()\n',
}


def config_cases(places: Mapping[str, Path]) -> Iterator[Case]:
    """Every field with nasty values, bad recipes and bad flags; nothing is compiled."""
    for field, value in fields.flatten(config_lib.default_config()).items():
        group, _, name = field.rpartition('.')
        kind, option, reader = type(value), 'smoke', ''
        if value is None:
            kind = methods.fields().get(name, int)
        elif kind is list:
            kind = tuple
        if group == 'method' and name in methods.fields():
            reader = _reader(name)
            option = f'{reader},smoke'
        command = (
            'main',
            f'--config=configs/image_folder.py:{option}',
            *bases.SMALL,
            bases.WORKDIR,
        )
        command += tuple(f'--config.{other}' for other in TOGETHER.get(field, ()))
        for nasty in NASTY[kind]:
            is_default = value is None and nasty == 'None' and field != 'method.teachers'
            if (field, nasty) not in SOUND and not is_default:
                override = f'--config.{field}={nasty}'
                yield Case('configs', override, (*command, override), names=field)
        slow = reader == 'boc_kd' or (reader and methods.registered()[reader].min_teachers)
        if value is None and not slow:
            override = f'--config.{field}=None'
            yield Case('configs', override, (*command, override), accepts=shows(COMPILES))
    command = ('main', *bases.GENERATED, bases.WORKDIR)
    yield Case('configs', 'undamaged', command, accepts=shows(COMPILES))
    for override in COMBINATIONS:
        field = override.partition('=')[0]
        overrides = [f'--config.{x}' for x in (*TOGETHER.get(field, ()), override)]
        yield Case('configs', override, (*command, *overrides), names=field)
    for name, flags in FLAGS.items():
        yield Case('configs', name, ('main', *flags, bases.WORKDIR))
    for name, content in RECIPES.items():

        def make(folder: Path, content: bytes = content) -> None:
            (folder / 'recipe.py').write_bytes(content)

        flags = ('--config={input}/recipe.py', bases.WORKDIR)
        yield Case('configs', f'recipe: {name}', ('main', *flags), make, names='recipe.py')


def _reader(field: str) -> str:
    """Returns a method that reads a field of `config.method`, one that is quickly built."""
    readers = [x for x in methods.registered().values() if field in base.defaults(x)]
    # The branches of BOC-KD take seconds to trace; methods with teachers end for want of them.
    return min(readers, key=lambda x: (x.name in ('plain', 'boc_kd'), x.min_teachers)).name
