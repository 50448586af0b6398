"""The cache of compiled programs."""

import jax
import pytest

from one_jax.errors import ConfigError
from one_jax.fields import DEFAULT_CACHE
from one_jax.runtime import parallel


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """Collects what is set, and sets nothing."""
    found = []
    monkeypatch.setattr(jax.config, 'update', lambda *setting: found.append(setting))
    return found


def test_cache_that_can_be_written_is_used(tmp_path, settings):
    parallel.use_compilation_cache('')
    parallel.use_compilation_cache(str(tmp_path / 'new'))
    parallel.use_compilation_cache('gs://bucket/cache')
    paths = [str(tmp_path / 'new'), 'gs://bucket/cache']
    assert settings == [('jax_compilation_cache_dir', path) for path in paths]
    assert list((tmp_path / 'new').iterdir()) == []


def test_cache_that_cannot_be_written_is_an_error_unless_by_default(
    tmp_path, settings, monkeypatch, capsys
):
    (tmp_path / '.cache').touch()
    with pytest.raises(ConfigError, match=r'(exists|directory).* no cache') as raised:
        parallel.use_compilation_cache(str(tmp_path / '.cache'))
    assert raised.value.field == 'train.compilation_cache_dir'
    # The cache of a stored run, and the default.
    parallel.use_compilation_cache(str(tmp_path / '.cache'), required=False)
    monkeypatch.setenv('HOME', str(tmp_path))
    parallel.use_compilation_cache(DEFAULT_CACHE)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(':')[0] for line in lines] == ['no cache of compiled programs'] * 2
    assert settings == []
