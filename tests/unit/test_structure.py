"""The rooms of the package: imports point downhill, and functions can be read in one sitting."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent.parent / 'one_jax'
FOOT = {'errors', 'fields', 'runtime'}
# What each room may import, apart from itself; a room is a folder or a file of the package.
ALLOWED = {
    'errors': set(),
    'fields': set(),
    'runtime': {'errors', 'fields'},
    'reporting': FOOT,
    'losses': set(),
    'metrics': {'errors', 'losses'},
    'models': {'errors', 'losses'},
    'methods': {'errors', 'losses', 'models'},
    'data': FOOT,
    'config': {'data', 'errors', 'fields', 'methods', 'models'},
    'students': {
        *FOOT,
        *('config', 'data', 'losses', 'methods', 'metrics', 'models', 'reporting'),
    },
    'training': {
        *FOOT,
        *('config', 'data', 'losses', 'methods', 'metrics', 'models', 'reporting', 'students'),
    },
    'train': {*FOOT, 'config', 'data', 'reporting', 'training'},
}
COMMANDS = {
    *('analyze', 'evaluate', 'export', 'import_weights', 'main', 'plan', 'predict'),
    *('prepare', 'report', 'study'),
}
# Modules of other packages, and the files or rooms that alone may import them.
CONFINED = {
    'orbax': ('training/checkpoint.py',),
    'jax.experimental.multihost_utils': ('runtime/',),
    'tensorflow': ('data/',),
    'tensorflow_datasets': ('data/',),
    'tensorboardX': ('runtime/records.py',),
    'onnx': ('students/onnx.py',),
    'onnxruntime': ('students/onnx.py',),
    'jax2onnx': ('students/onnx.py',),
    'torch': ('students/weights_file.py',),
}
MAX_LINES = 60


@functools.cache
def modules():
    """Returns (path relative to the package, syntax tree) of every module."""
    paths = sorted(PACKAGE.rglob('*.py'))
    return [(path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text())) for path in paths]


def imports(tree):
    """Yields the full name of everything that a module imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, 'relative import'
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def room_of(path):
    return path.partition('/')[0].removesuffix('.py')


def imported_rooms(tree):
    """Returns the rooms that a module imports; `from one_jax import __version__` is none."""
    names = {name.split('.')[1] for name in imports(tree) if name.startswith('one_jax.')}
    return {
        name for name in names if (PACKAGE / name).exists() or (PACKAGE / f'{name}.py').exists()
    }


def is_within(name, module):
    return name == module or name.startswith(f'{module}.')


def test_rooms_import_only_what_lies_below():
    uphill = [
        f'{path} imports {room}'
        for path, tree in modules()
        if (allowed := ALLOWED.get(room_of(path))) is not None
        for room in sorted(imported_rooms(tree) - allowed - {room_of(path)})
    ]
    assert uphill == []


def test_rooms_hold_every_file_and_commands_do_not_import_each_other():
    rooms = {room_of(path) for path, _ in modules()} - {'__init__'}
    assert rooms - ALLOWED.keys() - COMMANDS == set()
    found = [
        f'{path} imports {room}'
        for path, tree in modules()
        if room_of(path) in COMMANDS
        for room in sorted(imported_rooms(tree) & COMMANDS)
    ]
    assert found == []


@pytest.mark.parametrize('module', CONFINED)
def test_rooms_confine_imports_of_other_packages(module):
    places = CONFINED[module]
    found = [
        path
        for path, tree in modules()
        if not path.startswith(places) and any(is_within(name, module) for name in imports(tree))
    ]
    assert found == []


def test_rooms_only_runtime_uses_jax_distributed():
    found = [
        path
        for path, tree in modules()
        for node in ast.walk(tree)
        if not path.startswith('runtime/')
        and isinstance(node, ast.Attribute)
        and ast.unparse(node).startswith('jax.distributed')
    ]
    assert found == []


def test_images_are_opened_with_a_list_of_formats_alone():
    """Without one, Pillow runs the program in a PostScript file, whatever its name."""
    found = [
        f'{path}: {ast.unparse(node)}'
        for path, tree in modules()
        for node in ast.walk(tree)
        if (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith('Image.open')
            and 'formats' not in {keyword.arg for keyword in node.keywords}
        )
        or (isinstance(node, ast.ImportFrom) and node.module == 'PIL.Image')
    ]
    assert found == []


def test_reporting_imports_neither_jax_nor_flax():
    found = [
        f'{path} imports {name}'
        for path, tree in modules()
        if room_of(path) == 'reporting'
        for name in imports(tree)
        if name.split('.')[0] in ('jax', 'flax', 'optax', 'ml_collections')
    ]
    assert found == []


def test_functions_of_training_and_methods_are_short():
    rooms = ('train', 'training', 'methods')
    long = [
        f'{path}: {node.name} has {lines} lines'
        for path, tree in modules()
        if room_of(path) in rooms
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and (lines := node.end_lineno - node.lineno + 1) > MAX_LINES
    ]
    assert long == []


LIGHT = """
import sys
import one_jax.reporting.curves, one_jax.reporting.runs, one_jax.reporting.tables
assert not {'jax', 'flax', 'tensorflow_datasets'} & sys.modules.keys(), 'reporting'
import one_jax.data, one_jax.config, one_jax.metrics, one_jax.students.student, one_jax.report
assert not {'tensorflow', 'tensorflow_datasets', 'orbax'} & sys.modules.keys(), 'students'
"""


def test_imports_of_reporting_and_students_are_light():
    subprocess.run([sys.executable, '-c', LIGHT], check=True, cwd=PACKAGE.parent)
