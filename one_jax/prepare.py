"""Prepares a data set: `python -m one_jax.prepare NAME [--data_dir=DIR]`, or `--list`."""

import argparse
import contextlib
import dataclasses
import fcntl
import importlib.util
import logging as python_logging
import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import tensorflow_datasets as tfds
from absl import logging

from one_jax.analysis.tables import format_table
from one_jax.data import image_folder, prepared
from one_jax.data.builders import cinic10, mnist5k
from one_jax.data.datasets import DATASETS, DatasetSpec
from one_jax.data.memory import readable_size
from one_jax.errors import UserError

# Seconds to wait for a server before saying that there is no network.
_TIMEOUT = 20
_LOCK = 'one_jax.prepare.lock'


@dataclasses.dataclass(frozen=True)
class Preparation:
    """How a TFDS set is prepared.

    Attributes:
      download: bytes to download, by TFDS or by hand.
      size: bytes of the prepared set, about.
      file_format: 'array_record', which takes no TensorFlow to read, or 'tfrecord'.
      manual_files: name and size of every file to download by hand; the size is checked, unless
        it is None.
      instructions: where those files come from.
      own_builder: whether the builder is one of ours and does without TensorFlow.
    """

    download: int = 0
    size: int = 0
    file_format: str = 'array_record'
    manual_files: tuple[tuple[str, int | None], ...] = ()
    instructions: str = ''
    own_builder: bool = False


PREPARATIONS = {
    mnist5k.NAME: Preparation(size=2_000_000, own_builder=True),
    'cifar10': Preparation(170_052_171, 140_000_000),
    'cifar100': Preparation(168_513_733, 140_000_000),
    'svhn_cropped': Preparation(1_575_594_780, 1_300_000_000),
    cinic10.NAME: Preparation(
        download=660_000_000,
        size=750_000_000,
        manual_files=((cinic10.ARCHIVE, None),),
        instructions='from https://datashare.ed.ac.uk/handle/10283/3192',
        own_builder=True,
    ),
    'imagenet2012': Preparation(
        download=154_642_401_280,
        size=168_000_000_000,
        file_format='tfrecord',
        manual_files=(
            ('ILSVRC2012_img_train.tar', 147_897_477_120),
            ('ILSVRC2012_img_val.tar', 6_744_924_160),
        ),
        instructions='from https://image-net.org/download-images, after registering there',
    ),
}


def prepare(name: str, data_dir: str = '') -> None:
    """Prepares a data set, unless it is there already; says what it does.

    Args:
      name: value of `data.name`, or any builder that comes with TFDS.
      data_dir: where TFDS keeps its data; '' for TFDS's own default.

    Raises:
      UserError: with what is missing: the name, files to download by hand, TensorFlow, disk space,
        network; or images in a set that is there.
    """
    if name == image_folder.NAME:
        raise UserError(
            f'{name} needs no preparation: give the folder as --config.data.root=DIR, with '
            'train/<class>/ and test/<class>/ in it'
        )
    source = _source(name)
    directory = prepared.resolve_data_dir(data_dir)
    _check_name(name, source)
    if _report_prepared(name, source, data_dir):
        return
    plan = PREPARATIONS.get(source, Preparation())
    _check_manual_files(name, plan, directory)
    _check_tensorflow(name, plan)
    _check_disk(name, plan, directory)
    with _locked(source, directory):
        if source == mnist5k.NAME:
            mnist5k.build(directory)
        else:
            _build(name, source, plan, directory)
    if not _report_prepared(name, source, data_dir):
        raise UserError(f'{name} was built, but is not found in {directory}')


def _source(name: str) -> str:
    """TFDS's name of a set of the table; any other name is TFDS's."""
    return (DATASETS[name].source if name in DATASETS else '') or name


def _check_name(name: str, source: str) -> None:
    try:
        tfds.core.naming.parse_builder_name_kwargs(source)
        known = source in PREPARATIONS or prepared.is_tfds_name(source)
    except ValueError:
        known = False
    if not known:
        table = ', '.join(sorted(DATASETS))
        raise UserError(f'{name!r} is not a data set: it is none of {table}, nor one of TFDS')


def _report_prepared(name: str, source: str, data_dir: str) -> bool:
    """Whether the set is there; if so, says so, once its numbers and files are verified."""
    streamed = name in DATASETS and DATASETS[name].streamed
    builder = prepared.open_prepared(source, data_dir, any_size=streamed)
    if builder is None:
        return False
    _verify(DATASETS.get(name), builder)
    counts = ', '.join(
        f'{split} {info.num_examples}' for split, info in sorted(builder.info.splits.items())
    )
    print(f'{name} is prepared in {builder.data_path} ({counts} images)')
    return True


def _verify(spec: DatasetSpec | None, builder: tfds.core.DatasetBuilder) -> None:
    remedy = f'delete {builder.data_path} and prepare it again'
    for info in builder.info.splits.values():
        missing = [path for path in info.filepaths if not Path(path).exists()]
        if missing:
            raise UserError(f'{missing[0]} is missing: {remedy}')
    if spec is None:
        return
    expected = {spec.train_split: spec.num_train, spec.test_split: spec.num_test}
    for split, count in expected.items():
        try:
            found = builder.info.splits[split].num_examples
        except (KeyError, ValueError):
            found = 0
        if found != count:
            raise UserError(
                f'{builder.data_path} has {found} images in {split} in place of {count}: {remedy}'
            )


def _check_manual_files(name: str, plan: Preparation, directory: str) -> None:
    manual = _manual_dir(directory)
    if _source(name) == cinic10.NAME and cinic10.find_source(manual):
        return
    missing = [file for file, _ in plan.manual_files if not (manual / file).is_file()]
    if missing:
        raise UserError(
            f'{name} is downloaded by hand: put {" and ".join(missing)} ({plan.instructions}; '
            f'{readable_size(plan.download)} in all) into {manual}, then run this again'
        )
    for file, size in plan.manual_files:
        found = (manual / file).stat().st_size
        if size is not None and found != size:
            raise UserError(
                f'{manual / file} has {found} bytes in place of {size}: download it again'
            )


def _check_tensorflow(name: str, plan: Preparation) -> None:
    packages = ('tensorflow', 'importlib_resources')
    if plan.own_builder or all(importlib.util.find_spec(package) for package in packages):
        return
    raise UserError(
        f"preparing {name} takes TensorFlow: pip install 'one_jax[tensorflow]' (or prepare it "
        'on another machine and copy the folder)'
    )


def _check_disk(name: str, plan: Preparation, directory: str) -> None:
    # What is downloaded by hand is there already.
    needed = plan.size + (0 if plan.manual_files else plan.download)
    existing = next(path for path in (Path(directory), *Path(directory).parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f'{name} takes {readable_size(needed)} of disk, but {readable_size(free)} are free in '
            f'{existing}: free some, or give another --data_dir'
        )


def _manual_dir(directory: str) -> Path:
    return Path(directory) / 'downloads' / 'manual'


@contextlib.contextmanager
def _locked(source: str, directory: str) -> Iterator[None]:
    """Keeps a second preparation of the set away, and clears what a dead one left.

    A preparation that is killed leaves its lock file: the incomplete folders that are younger are
    its own. Others, say of `tfds build`, may be of a process that is still at work.
    """
    parent = Path(directory) / source.partition('/')[0].partition(':')[0]
    path = parent / _LOCK
    try:
        parent.mkdir(parents=True, exist_ok=True)
        was_there = path.exists()
        file = path.open('a')
    except OSError as error:
        raise UserError(f'{directory} cannot be written: {error}') from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f'{parent} is being prepared by another process') from error
        if was_there:
            _remove_leftovers(parent, path.stat().st_mtime_ns)
        os.utime(path)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _remove_leftovers(parent: Path, since: int) -> None:
    for folder in sorted(parent.rglob('incomplete.*')):
        if folder.is_dir() and folder.stat().st_mtime_ns >= since:
            print(f'removing {folder}, left by an interrupted preparation')
            shutil.rmtree(folder)


def _build(name: str, source: str, plan: Preparation, directory: str) -> None:
    builder = tfds.builder(source, data_dir=directory, file_format=plan.file_format, try_gcs=False)
    if not builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        _check_network(name, builder, directory)
    print(f'preparing {name} in {directory}', flush=True)
    try:
        builder.download_and_prepare(
            download_dir=str(Path(directory) / 'downloads'),
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        )
    except UserError:
        raise
    except Exception as error:  # whatever the builders of TFDS raise
        reason = ' '.join(str(error).split())
        raise UserError(f'{name} cannot be prepared in {directory}: {reason}') from error


def _check_network(name: str, builder: tfds.core.DatasetBuilder, directory: str) -> None:
    """Asks for every file that is to be downloaded: TFDS itself would retry for several minutes."""
    downloads = Path(directory) / 'downloads'
    notes = [path.read_text() for path in downloads.glob('**/*.INFO.json')]
    pending = [
        url
        for url, info in (builder.url_infos or {}).items()
        if not (info.filename and (_manual_dir(directory) / info.filename).is_file())
        and not any(f'"{url}"' in note for note in notes)
    ]
    for url in pending:
        try:
            request = urllib.request.Request(url, method='HEAD')
            urllib.request.urlopen(request, timeout=_TIMEOUT).close()
        except urllib.error.HTTPError as error:
            # Some servers refuse to be asked, but are there.
            if error.code != 404:
                continue
            reason = error
        except OSError as error:
            reason = getattr(error, 'reason', error)
        else:
            continue
        raise UserError(
            f'{name}: {url} cannot be downloaded ({reason}): check the network, or download '
            f'{" and ".join(pending)} elsewhere and put what you get into {_manual_dir(directory)}'
        )


def table(data_dir: str) -> str:
    """The known data sets: images, bytes to download and on disk, and which are there."""
    rows = []
    for name, spec in DATASETS.items():
        if name == image_folder.NAME:
            continue
        plan = PREPARATIONS[_source(name)]
        rows.append(
            {
                'name': name,
                'classes': spec.num_classes,
                'train': spec.num_train,
                'test': spec.num_test,
                'download': _download_size(plan),
                'on disk': readable_size(plan.size),
                'TensorFlow': '' if plan.own_builder else 'to prepare',
                'prepared': _state(name, data_dir),
            }
        )
    return format_table(rows, list(rows[0]))


def _download_size(plan: Preparation) -> str:
    if not plan.download:
        return ''
    return readable_size(plan.download) + (' by hand' if plan.manual_files else '')


def _state(name: str, data_dir: str) -> str:
    try:
        builder = prepared.open_prepared(_source(name), data_dir, any_size=DATASETS[name].streamed)
        if builder is not None:
            _verify(DATASETS[name], builder)
    except UserError:
        return 'damaged'
    return 'no' if builder is None else 'yes'


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepares the data set that the arguments name, or prints the table."""
    parser = argparse.ArgumentParser(
        prog='python -m one_jax.prepare',
        description='Downloads and builds a data set, or says what to download by hand.',
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('name', nargs='?', metavar='NAME', help='as in --config.data.name')
    what.add_argument('--list', action='store_true', help='print the known data sets')
    parser.add_argument('--data_dir', default='', metavar='DIR', help="TFDS's own if not given")
    options = parser.parse_args(arguments)
    logging.set_verbosity(logging.ERROR)
    python_logging.getLogger('urllib3').setLevel(python_logging.ERROR)
    if options.list:
        print(f'in {prepared.resolve_data_dir(options.data_dir)}:\n{table(options.data_dir)}')
    else:
        prepare(options.name, options.data_dir)


if __name__ == '__main__':
    try:
        main()
    except UserError as error:
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        sys.exit('interrupted: run the command again, it starts anew')
