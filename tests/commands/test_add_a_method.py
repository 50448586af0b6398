"""docs/add_a_method.md: its code is run as it stands on the page."""

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from method_fixtures import case
from page_fixtures import REPOSITORY, code_blocks, executed

from one_jax import config as config_lib
from one_jax import methods
from one_jax.methods import base

PAGE = (REPOSITORY / 'docs/add_a_method.md').read_text()
BLOCKS = code_blocks('add_a_method.md')
METHODS = ('consensus', 'confidence')


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The methods of the page as modules of one_jax.methods; removed again in the end."""
    for name in METHODS:
        (tmp_path / f'{name}.py').write_text(BLOCKS[f'one_jax/methods/{name}.py'])
    before, fields = list(methods.registered()), methods.fields()
    with monkeypatch.context() as patch:
        patch.setattr(methods, '__path__', [*methods.__path__, str(tmp_path)])
        patch.setattr(base, '_REGISTRY', dict(base._REGISTRY))
        importlib.invalidate_caches()
        yield
    for name in METHODS:
        sys.modules.pop(f'one_jax.methods.{name}', None)
        vars(methods).pop(name, None)
    assert list(methods.registered()) == before
    assert methods.fields() == fields


def test_page_names_files_that_exist_and_all_attributes():
    paths = [*BLOCKS]
    assert [Path(path).stem for path in paths] == [*METHODS, 'test_confidence']
    for path in re.findall(r'`([\w/]+\.py)`', PAGE):
        assert path in paths or (REPOSITORY / path).is_file(), path
    table = PAGE[PAGE.index('| attribute |') :]
    rows = [line.split('|')[1] for line in table.splitlines() if line.startswith('| `')]
    told = set(re.findall(r'`(\w+)`', ' '.join(rows)))
    given = {'branch_networks', 'share_stages', 'name', 'num_branches', 'settings'}
    given |= {'teacher_folders', 'distillation_loss', 'ramped_weight'}
    public = {
        name for name in {**vars(base.Method), **base.Method.__annotations__} if name[0] != '_'
    }
    assert told == public - given


def test_methods_of_the_page_have_finite_losses_and_config_fields(installed):
    assert set(METHODS) <= methods.registered().keys()
    config = config_lib.default_config()
    config.method.update(name='confidence', sharpness=10.0)
    assert methods.create(config).settings['sharpness'] == 10
    for name in METHODS:
        _, loss, terms, _ = case(name).results
        expected = sum(np.sum(terms[term]) for term in terms if 'cross_entropy' in term)
        expected += terms['distill_weight'] * np.sum(terms['distillation'])
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert case('consensus').reach()['distillation'] == {'trunk', 'head 0'}


def test_tests_of_the_page_pass(installed):
    methods.registered()
    namespace = executed(BLOCKS['tests/unit/test_confidence.py'], 'test_confidence')
    tests = [function for name, function in namespace.items() if name.startswith('test_')]
    assert len(tests) == 3
    for function in tests:
        function()


def test_without_their_files_there_are_no_such_methods():
    assert not set(METHODS) & methods.registered().keys()
    assert 'sharpness' not in config_lib.default_config().method
