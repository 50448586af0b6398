"""Prepares TFDS data sets on disk: checks what is needed, downloads, builds, verifies."""

import contextlib
import dataclasses
import fcntl
import importlib.util
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from one_jax import errors
from one_jax.data import prepared
from one_jax.data.builders import cinic10, mnist5k
from one_jax.data.table import CINIC10, DATASETS, IMAGE_FOLDER, MNIST5K, known_names, tfds_name
from one_jax.errors import UserError
from one_jax.runtime.memory import readable_size

# Seconds to wait for a server before reporting that it cannot be reached.
_TIMEOUT = 20
_LOCK = 'one_jax.prepare.lock'


@dataclasses.dataclass(frozen=True)
class Preparation:
    """How to prepare a TFDS set."""

    # Bytes to download, by TFDS or by hand.
    download: int = 0
    # Approximate bytes of the prepared set.
    size: int = 0
    # Name and size (None: not checked) of every file to download by hand, and where to find them.
    manual_files: tuple[tuple[str, int | None], ...] = ()
    instructions: str = ''
    needs_tensorflow: bool = True


PREPARATIONS = {
    MNIST5K: Preparation(size=2_000_000, needs_tensorflow=False),
    'cifar10': Preparation(170_052_171, 140_000_000),
    'cifar100': Preparation(168_513_733, 140_000_000),
    'svhn_cropped': Preparation(1_575_594_780, 1_300_000_000),
    CINIC10: Preparation(
        download=660_000_000,
        size=750_000_000,
        manual_files=((cinic10.ARCHIVE, None),),
        instructions=f'from {cinic10.SOURCE_URL}',
        needs_tensorflow=False,
    ),
    'imagenet2012': Preparation(
        download=154_642_401_280,
        size=168_000_000_000,
        manual_files=(
            ('ILSVRC2012_img_train.tar', 147_897_477_120),
            ('ILSVRC2012_img_val.tar', 6_744_924_160),
        ),
        instructions='from https://image-net.org/download-images, after registering there',
    ),
}


def prepare(name: str, data_dir: str = '') -> None:
    """Prepares a data set, unless it is prepared, and reports progress.

    Takes any value of `data.name`, including all sets that come with TFDS.

    Raises:
      UserError: the data set is unknown; manual downloads, TensorFlow, disk space or the network
        are missing; the prepared set is damaged or incomplete.
    """
    directory = Path(prepared.resolve_data_dir(data_dir))
    builder = _find(name, directory)
    if builder is None:
        if obstacle := _obstacle(name, directory):
            raise UserError(f'{name} {obstacle}')
        with _locked(directory / tfds_name(name).partition('/')[0].partition(':')[0]):
            _build(name, directory)
        builder = _find(name, directory)
    counts = ', '.join(
        f'{split} {info.num_examples}' for split, info in sorted(builder.info.splits.items())
    )
    print(f'{name} is prepared in {builder.data_path} ({counts} images)')


def _is_streamed(name: str) -> bool:
    return name in DATASETS and DATASETS[name].streamed


def _find(name: str, directory: Path) -> tfds.core.DatasetBuilder | None:
    """Opens a set on disk, and verifies its files and the numbers of images in the table."""
    spec = DATASETS.get(name)
    builder = prepared.open_prepared(name, str(directory), any_size=_is_streamed(name))
    if builder is None:
        return None
    paths = [path for info in builder.info.splits.values() for path in info.filepaths]
    problems = [f'{path} is missing' for path in paths if not Path(path).exists()]
    if spec:
        found = prepared.describe(name, builder)
        if (found.num_train, found.num_test) != (spec.num_train, spec.num_test):
            problems.append(
                f'it has {found.num_train} training and {found.num_test} test images in place of '
                f'{spec.num_train} and {spec.num_test}'
            )
    if problems:
        raise UserError(f'{builder.data_path}: {problems[0]}: delete it and prepare it again')
    return builder


def _obstacle(name: str, directory: Path) -> str | None:
    """Returns why the set cannot be prepared, and what to do about it."""
    if name == IMAGE_FOLDER:
        return (
            'needs no preparation: set --config.data.root=DIR to a folder that holds '
            'train/<class>/ and test/<class>/'
        )
    source = tfds_name(name)
    if source not in PREPARATIONS and not prepared.is_tfds_name(source):
        return f'is not a data set: it is none of {known_names()}, nor of TFDS'
    plan, manual = PREPARATIONS.get(source, Preparation()), directory / 'downloads' / 'manual'
    extracted = source == CINIC10 and cinic10.find_source(manual)
    for file, size in () if extracted else plan.manual_files:
        if not (manual / file).is_file():
            files = ' and '.join(file for file, _ in plan.manual_files)
            return (
                f'is downloaded by hand: put {files} ({plan.instructions}; '
                f'{readable_size(plan.download)} in all) into {manual}, then run this again'
            )
        found = (manual / file).stat().st_size
        if found != (size or found):
            return f'requires {manual / file} of {size} bytes, not {found}: download it again'
    packages = ('tensorflow', 'importlib_resources')
    if plan.needs_tensorflow and not all(map(importlib.util.find_spec, packages)):
        return (
            "requires TensorFlow to be prepared: pip install 'one_jax[tensorflow]' (or prepare it "
            'on another machine and copy the folder)'
        )
    # Manual downloads are on disk already.
    needed = plan.size + (0 if plan.manual_files else plan.download)
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        return (
            f'takes {readable_size(needed)} of disk, but {readable_size(free)} are free in '
            f'{existing}: free some, or choose another --data_dir'
        )
    return None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Prevents a second preparation of the set, and removes what a killed one left behind.

    A killed preparation leaves its lock file: incomplete folders younger than that are its own.
    Older ones may belong to another process, such as `tfds build`, that is still running.
    """
    path = folder / _LOCK
    with contextlib.ExitStack() as stack:
        with errors.explain(f'{folder} is not writable', OSError):
            folder.mkdir(parents=True, exist_ok=True)
            killed = path.exists()
            file = stack.enter_context(path.open('a'))
            with errors.explain(f'{folder} is being prepared by another process', BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        since = path.stat().st_mtime_ns
        for left in sorted(folder.rglob('incomplete.*')) if killed else ():
            if left.is_dir() and left.stat().st_mtime_ns >= since:
                print(f'removing {left}, left by an interrupted preparation')
                shutil.rmtree(left)
        os.utime(path)
        stack.callback(path.unlink, missing_ok=True)
        yield


def _build(name: str, directory: Path) -> None:
    if name == MNIST5K:
        return mnist5k.build(str(directory))
    builder = tfds.builder(
        tfds_name(name),
        data_dir=str(directory),
        # Array records are read without TensorFlow, but not streamed.
        file_format='tfrecord' if _is_streamed(name) else 'array_record',
        try_gcs=False,
    )
    downloads = directory / 'downloads'
    if not builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        _check_network(name, builder.url_infos or {}, downloads)
    print(f'preparing {name} in {directory}', flush=True)
    try:
        builder.download_and_prepare(
            download_dir=str(downloads),
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        )
    except Exception as error:  # TFDS's builders raise anything.
        reason = ' '.join(str(error).split())
        raise UserError(f'{name} cannot be prepared in {directory}: {reason}') from error


def _check_network(name: str, url_infos: Mapping[str, Any], downloads: Path) -> None:
    """Asks every server once for the files to download: TFDS would retry for several minutes."""
    manual = downloads / 'manual'
    notes = ' '.join(path.read_text() for path in downloads.glob('**/*.INFO.json'))
    pending = [
        url
        for url, info in url_infos.items()
        if f'"{url}"' not in notes and not (info.filename and (manual / info.filename).is_file())
    ]
    advice = f'check the network, or put {" and ".join(pending)} into {manual}'
    for url in pending:
        request = urllib.request.Request(url, method='HEAD')
        with (
            errors.explain(f'{name}: {url} cannot be downloaded ({advice})', OSError),
            # The server answers: TFDS reports a missing file at once.
            contextlib.suppress(urllib.error.HTTPError),
        ):
            urllib.request.urlopen(request, timeout=_TIMEOUT).close()


def table_rows(data_dir: str) -> list[dict[str, Any]]:
    """Returns a row per known data set: images, bytes to download and on disk, whether prepared."""
    rows = []
    for name, spec in DATASETS.items():
        if name == IMAGE_FOLDER:
            continue
        plan = PREPARATIONS[tfds_name(name)]
        download = readable_size(plan.download) if plan.download else ''
        try:
            state = 'yes' if _find(name, Path(prepared.resolve_data_dir(data_dir))) else 'no'
        except UserError:
            state = 'damaged'
        rows.append(
            {
                'name': name,
                'classes': spec.num_classes,
                'train': spec.num_train,
                'test': spec.num_test,
                'download': download + (' by hand' if plan.manual_files else ''),
                'on disk': readable_size(plan.size),
                'TensorFlow': 'to prepare' if plan.needs_tensorflow else '',
                'prepared': state,
            }
        )
    return rows
