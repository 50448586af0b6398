"""Digests of the files of a checkpoint."""

import os
import pathlib

import pytest

from one_jax.training import checksums


@pytest.fixture
def folder(tmp_path):
    (tmp_path / 'state/d').mkdir(parents=True)
    (tmp_path / 'record').mkdir()
    (tmp_path / 'state/d/array').write_bytes(bytes(range(256)))
    (tmp_path / 'state/manifest').write_text('one\n')
    (tmp_path / 'record/metadata').write_text('{}')
    checksums.write(tmp_path)
    return tmp_path


def test_checksums_unchanged_files_pass(folder):
    checksums.verify(folder)
    # Orbax adds notes of its own at the top after the digests are written.
    (folder / 'commit_success.txt').write_text('done')
    checksums.verify(folder)
    lines = (folder / checksums.FILE_NAME).read_text().splitlines()
    assert [line[66:] for line in lines] == ['record/metadata', 'state/d/array', 'state/manifest']
    known = '40aff2e9d2d8922e47afd4648e6967497158785fbd1da870e7110266bf944880'
    assert lines[1].startswith(known)


def change(file, how):
    content = file.read_bytes()
    if how == 'flip':
        file.write_bytes(bytes([content[0] ^ 4]) + content[1:])
    elif how == 'half':
        file.write_bytes(content[: len(content) // 2])
    elif how == 'delete':
        file.unlink()
    else:
        file.with_name('another').write_bytes(content)


@pytest.mark.parametrize('how', ['flip', 'half', 'delete', 'add'])
def test_checksums_changed_file_is_named(folder, how):
    change(folder / 'state/d/array', how)
    named = 'another' if how == 'add' else 'array'
    with pytest.raises(checksums.DamagedError, match=f'since it was saved: state/d/{named}$'):
        checksums.verify(folder)


def test_checksums_file_of_digests_itself_is_checked(folder):
    file = folder / checksums.FILE_NAME
    file.write_text(file.read_text() + 'x\n')
    with pytest.raises(checksums.DamagedError, match=checksums.FILE_NAME):
        checksums.verify(folder)
    file.write_bytes(b'\xff')
    with pytest.raises(checksums.DamagedError, match='cannot read SHA256SUMS'):
        checksums.verify(folder)
    file.unlink()
    with pytest.raises(checksums.DamagedError, match='cannot read SHA256SUMS'):
        checksums.verify(folder)
    os.mkfifo(file)  # Reading it would not end.
    with pytest.raises(checksums.DamagedError, match='cannot read SHA256SUMS'):
        checksums.verify(folder)


def test_checksums_unreadable_file_is_not_damage(folder, monkeypatch):
    def deny(path, *arguments, **options):
        raise PermissionError(path)

    monkeypatch.setattr(pathlib.Path, 'open', deny)
    with pytest.raises(PermissionError):
        checksums.verify(folder)
