"""docs/add_a_method.md: its code is run as it stands on the page."""

import contextlib
import importlib
import re
import sys

import jax
import pytest
from commands import REPOSITORY

from one_jax import config as config_lib
from one_jax import evaluate, export, methods, metrics, train
from one_jax.methods import base

PAGE = (REPOSITORY / 'docs/add_a_method.md').read_text()
MODULE = 'one_jax/methods/confidence.py'
TEST = 'tests/test_confidence.py'
CONFIG = 'configs/mnist5k_resnet8_confidence.py'


def code_blocks():
    """The code of each file on the page, by the path that the paragraph before it names first."""
    parts = re.split(r'```python\n(.*?)```\n', PAGE, flags=re.S)
    paragraphs = [text.strip().split('\n\n')[-1] for text in parts[:-1:2]]
    paths = [re.search(r'`([\w/]+\.py)`', paragraph)[1] for paragraph in paragraphs]
    return dict(zip(paths, parts[1::2], strict=True))


@contextlib.contextmanager
def in_the_package(folder, monkeypatch):
    """Makes the files of `folder` modules of one_jax.methods; in the end all is as it was."""
    name = 'one_jax.methods.confidence'
    methods.registered()
    with monkeypatch.context() as patch:
        patch.setattr(methods, '__path__', [*methods.__path__, str(folder)])
        patch.setattr(base, '_REGISTRY', dict(base._REGISTRY))
        importlib.invalidate_caches()
        try:
            yield
        finally:
            sys.modules.pop(name, None)
            if hasattr(methods, 'confidence'):
                del methods.confidence


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The code blocks of the page, with the method's file in place."""
    blocks = code_blocks()
    folder = tmp_path / 'methods'
    folder.mkdir()
    (folder / 'confidence.py').write_text(blocks[MODULE])
    before, fields = list(methods.registered()), methods.fields()
    with in_the_package(folder, monkeypatch):
        yield blocks
    assert list(methods.registered()) == before
    assert methods.fields() == fields


def executed(code, name):
    """The names that a block defines."""
    namespace = {'__name__': name}
    exec(compile(code, name, 'exec'), namespace)
    return namespace


def test_the_page_has_the_three_files_and_the_method_is_short():
    blocks = code_blocks()
    assert list(blocks) == [MODULE, TEST, CONFIG]
    statements = [line for line in blocks[MODULE].splitlines() if line.strip()]
    assert len(statements) < 70
    for path in re.findall(r'`([\w/]+\.py)`', PAGE):
        assert path in blocks or (REPOSITORY / path).is_file(), path
    assert f'--config={CONFIG}:few' in PAGE


def test_the_page_tells_of_every_attribute_that_a_method_may_set():
    table = PAGE[PAGE.index('| attribute |') :]
    rows = [line.split('|')[1] for line in table.splitlines() if line.startswith('| `')]
    told = set(re.findall(r'`(\w+)`', ' '.join(rows)))
    found_or_checked = {'num_branches', 'teachers', 'check_range', 'check_choice', 'share_stages'}
    public = {name for name in vars(base.Method) if not name.startswith('_')}
    assert told == public - found_or_checked - {'defaults'}
    assert '`defaults`' in PAGE


def test_the_tests_of_the_page_pass(installed):
    namespace = executed(installed[TEST], 'test_confidence')
    tests = [function for name, function in namespace.items() if name.startswith('test_')]
    assert len(tests) == 3
    for function in tests:
        function()


def test_the_method_trains_and_its_student_evaluates_the_same(installed, tmp_path):
    config = executed(installed[CONFIG], 'config')['get_config']('smoke')
    assert config.method.name == 'confidence'
    config.update_from_flattened_dict({'train.steps': 8, 'train.compilation_cache_dir': ''})
    result = train.train_and_evaluate(config, tmp_path / 'run')
    assert result['step'] == 8
    assert len(result['branch_top1']) == 3
    assert 0 <= result['teacher_top1'] <= 100

    records = metrics.read_records(tmp_path / 'run')
    record = [record for record in records if record['split'] == 'train'][-1]
    assert len(record['distillation']) == len(record['branch_cross_entropy']) == 3
    assert sum(record['gate_weights']) == pytest.approx(1, abs=1e-5)
    # The loss is the sum that the page describes.
    expected = sum(record['branch_cross_entropy']) + record['teacher_cross_entropy']
    expected += record['distill_weight'] * sum(record['distillation'])
    assert record['loss'] == pytest.approx(expected, rel=1e-2)

    exported = export.export_student(tmp_path / 'run', tmp_path / 'student')
    assert exported.config['method'] == 'confidence'
    assert 'sharpness' not in str(jax.tree.structure(exported.variables))
    measured = evaluate.evaluate_students([tmp_path / 'student'])
    assert measured['deployed_top1'] == pytest.approx(result['deployed_top1'])


def test_without_its_file_there_is_no_such_method():
    assert 'confidence' not in methods.registered()
    assert 'sharpness' not in config_lib.default_config().method
