"""SHA-256 digests of a checkpoint's files: Orbax stores none, so it misses changed bytes."""

import hashlib
import logging
from pathlib import Path

from one_jax.runtime import processes

logger = logging.getLogger(__name__)

FILE_NAME = 'SHA256SUMS'
DAMAGED_FOLDER = 'damaged_checkpoints'


class DamagedError(Exception):
    """The files of a checkpoint are not those that were saved."""


def write(folder: Path) -> None:
    """Writes the digests of all files below `folder`, in the format of `sha256sum -c`."""
    (folder / FILE_NAME).write_text(_digests(folder))


def verify(folder: Path) -> None:
    """Compares the files below `folder` with their digests; process 0 does it for all.

    Raises:
      DamagedError: a file changed, is missing or was added.
    """
    error = None
    if processes.is_first():
        try:
            _verify(folder)
        except Exception as raised:  # the other processes wait for the answer, whatever it is
            error = raised
    if processes.from_first(int(error is not None)):
        raise error or DamagedError('process 0 cannot read it')


def set_aside(folder: Path, error: Exception, only_warn: bool) -> None:
    """Warns about a damaged checkpoint, and moves it out of the way of the next save.

    Args:
      folder: of the checkpoint; it goes to `DAMAGED_FOLDER` beside the checkpoints.
      error: what is wrong with it.
      only_warn: whether to leave it where it is.
    """
    if only_warn:
        logger.warning('skipped the damaged checkpoint %s (%s)', folder, error)
        return
    if processes.is_first():
        damaged = folder.parent.parent / DAMAGED_FOLDER
        damaged.mkdir(exist_ok=True)
        copies = len([old for old in damaged.iterdir() if old.name.split('-')[0] == folder.name])
        target = damaged / (f'{folder.name}-{copies + 1}' if copies else folder.name)
        folder.rename(target)
        logger.warning('moved the damaged checkpoint %s to %s (%s)', folder, target, error)
    processes.wait_for_all('set_aside')


def _verify(folder: Path) -> None:
    try:
        if not (folder / FILE_NAME).is_file():  # Reading a pipe might never end.
            raise DamagedError(f'cannot read {FILE_NAME}: it is no file')
        saved = (folder / FILE_NAME).read_text().splitlines()
        found = _digests(folder).splitlines()
    except PermissionError:
        raise  # It shows nothing about the content.
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedError(f'cannot read {FILE_NAME}: {error}') from error
    # A line is 64 hexadecimal digits, two spaces and the path.
    if changed := sorted({line[66:] or FILE_NAME for line in set(saved) ^ set(found)}):
        raise DamagedError(f'changed since it was saved: {", ".join(changed[:3])}')


def _digests(folder: Path) -> str:
    lines = []
    for file in sorted(folder.glob('*/**/*')):
        if file.is_file():
            with file.open('rb') as content:
                digest = hashlib.file_digest(content, 'sha256').hexdigest()
            lines.append(f'{digest}  {file.relative_to(folder).as_posix()}\n')
    return ''.join(lines)
