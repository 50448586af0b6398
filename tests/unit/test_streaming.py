"""Everything TensorFlow reads: streamed JPEGs, TFRecord files, damaged files."""

import io
import itertools
import math
import shutil
import sys

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tfds_fixtures import (
    cifar10_splits,
    colour,
    damage_set,
    data_config,
    encode,
    random_split,
    rows,
    save,
    write_imagenet,
    write_set,
    written_rows,
)

from one_jax import data
from one_jax.data import jpeg, streaming
from one_jax.data.image_folder import ImageFiles
from one_jax.data.tfrecord import TFRecords
from one_jax.errors import ConfigError, UserError

SEED, SIZE, BATCH, COUNT = 5, 16, 8, 45


@pytest.fixture(scope='module')
def labels():
    return [index * 2 for index in range(COUNT)]


@pytest.fixture(scope='module')
def builder(tmp_path_factory, labels):
    images = [encode(index, label) for index, label in enumerate(labels)]
    return write_imagenet(tmp_path_factory.mktemp('tfds'), images, labels)


@pytest.fixture(scope='module')
def encoded(builder):
    return TFRecords(builder, 'train')


def make(encoded, **options):
    return streaming.StreamedBatches(encoded, BATCH, SEED, SIZE, **options)


def in_each_process(monkeypatch, process_count, function):
    """Returns the results of `function` in each of several processes, one after the other."""
    monkeypatch.setattr(jax, 'process_count', lambda: process_count)
    results = []
    for index in range(process_count):
        monkeypatch.setattr(jax, 'process_index', lambda index=index: index)
        results.append(function())
    return results


def take(batches, count, first_step=0):
    return list(itertools.islice(batches.iterate(first_step), count))


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys() == {'image', 'label', 'mask'}
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_streamed_batch_has_the_types_of_a_resident_one(encoded):
    batches = make(encoded)
    assert batches.steps_per_epoch == COUNT // BATCH
    (batch,) = take(batches, 1)
    assert batch['image'].shape == (BATCH, SIZE, SIZE, 3)
    assert batch['image'].dtype == np.uint8
    assert batch['label'].dtype == np.int32
    assert batch['mask'].dtype == np.float32
    assert batch['mask'].tolist() == [1] * BATCH


def test_streamed_labels_belong_to_their_images(encoded):
    """Crops keep their red and green; the grey image has lost its colour."""
    seen = set()
    for batch in take(make(encoded), 12):
        for image, label in zip(batch['image'].astype(int), batch['label'], strict=True):
            if label == 0:
                assert (np.ptp(image, axis=-1) == 0).all()
            else:
                assert np.abs(image[..., :2] - colour(label)).max() <= 6, label
            assert np.ptp(image[..., 2]) > 0
            seen.add(int(label))
    assert {0, 2, 4} < seen


def test_streamed_epoch_visits_each_example_once(encoded, labels):
    steps = COUNT // BATCH
    epochs = np.reshape([b['label'] for b in take(make(encoded), 2 * steps)], (2, -1))
    for epoch in epochs:
        assert len(set(epoch)) == steps * BATCH
        assert set(epoch) <= set(labels)
    assert not np.array_equal(*epochs)
    # Other examples are left out.
    assert set(epochs[0]) != set(epochs[1])


def test_epoch_order_shuffles_blocks_of_whole_shards():
    lengths = [7, 1, 12, 5] * 10
    count, starts = sum(lengths), np.cumsum([0, *lengths])
    orders = [streaming.epoch_order(SEED, epoch, lengths) for epoch in (0, 0, 1)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(count))
    np.testing.assert_array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])
    # A block is a run of the order: sixteen shards, whole, and none of them on its own.
    shards = np.searchsorted(starts[1:], orders[0], side='right')
    blocks = list(dict.fromkeys(shards))
    for block in (set(blocks[:16]), set(blocks[16:32]), set(blocks[32:])):
        places = np.flatnonzero(np.isin(shards, list(block)))
        assert len(block) in (16, 8)
        assert places[-1] - places[0] + 1 == len(places) == sum(lengths[s] for s in block)
        assert (np.diff(shards[places]) != 0).sum() > len(block)


def test_streamed_batches_resumed_at_any_step_are_bit_identical(encoded):
    """Over the end of an epoch, from every step, with any number of threads."""
    reference = take(make(encoded), 12)
    assert_equal(take(make(encoded, decode_threads=1, prefetch=1), 12), reference)
    for step in (1, 4, 5, 11):
        assert_equal(take(make(encoded, decode_threads=4), 12 - step, step), reference[step:])
    other = streaming.StreamedBatches(encoded, BATCH, SEED + 1, SIZE)
    assert not np.array_equal(take(other, 1)[0]['image'], reference[0]['image'])


@pytest.mark.parametrize('process_count', [2, 4])
def test_streamed_batches_of_several_processes_join_to_the_same(
    encoded, monkeypatch, process_count
):
    whole = take(make(encoded), 6)
    parts = in_each_process(monkeypatch, process_count, lambda: take(make(encoded), 6))
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert_equal(joined, whole)


@pytest.mark.parametrize('process_count', [1, 2, 4])
def test_streamed_evaluation_visits_each_image_once(builder, labels, monkeypatch, process_count):
    test = TFRecords(builder, 'validation')
    runs = in_each_process(
        monkeypatch,
        process_count,
        lambda: list(streaming.streamed_evaluation_batches(test, BATCH, SIZE)),
    )
    assert {len(run) for run in runs} == {math.ceil(COUNT / BATCH)}
    share = BATCH // process_count
    assert {batch['image'].shape for run in runs for batch in run} == {(share, SIZE, SIZE, 3)}
    seen = [b['label'][b['mask'] == 1] for run in runs for b in run]
    assert sorted(np.concatenate(seen)) == sorted(labels)
    assert all((b['image'][b['mask'] == 0] == 0).all() for run in runs for b in run)


def scene(seed, height, width):
    """A smooth random picture."""
    low = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(low).resize((width, height), Image.Resampling.BICUBIC)


def reference_crop(height, width, candidates):
    """torchvision's RandomResizedCrop.get_params on the drawn numbers, one attempt at a time."""
    area = height * width
    for relative_height, relative_width, top, left in candidates:
        crop_height = round(math.sqrt(area) * relative_height)
        crop_width = round(math.sqrt(area) * relative_width)
        if 0 < crop_width <= width and 0 < crop_height <= height:
            return (
                math.floor(top * (height - crop_height + 1)),
                math.floor(left * (width - crop_width + 1)),
                crop_height,
                crop_width,
            )
    crop_height, crop_width = height, width
    if width / height < 3 / 4:
        crop_height = round(width / (3 / 4))
    elif width / height > 4 / 3:
        crop_width = round(height * (4 / 3))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


@pytest.fixture(scope='module')
def choose_crop():
    tf = jpeg.import_tensorflow()
    return tf.function(
        jpeg.choose_crop,
        input_signature=[
            tf.TensorSpec((), tf.int32),
            tf.TensorSpec((), tf.int32),
            tf.TensorSpec((jpeg.CROP_ATTEMPTS, 4), tf.float64),
        ],
    )


@pytest.mark.parametrize('shape', [(350, 400), (60, 20), (10, 400), (400, 10), (1, 1), (3, 2)])
def test_choose_crop_follows_torchvision(choose_crop, shape):
    candidates, _ = jpeg.draw_crops(SEED, 0, 0, 60)
    for candidate in candidates:
        chosen = tuple(choose_crop(*shape, candidate).numpy())
        assert chosen == reference_crop(*shape, candidate)


def test_draw_crops_has_the_distribution_of_torchvision():
    """Uniform area in [0.08, 1], log-uniform ratio in [3/4, 4/3], uniform place, fair flips."""
    count = 20_000
    candidates, flips = jpeg.draw_crops(SEED, 3, 0, count)
    height, width, top, left = np.moveaxis(candidates, -1, 0)
    for values, low, high in (
        (height * width, 0.08, 1.0),
        (np.log(width / height), math.log(3 / 4), math.log(4 / 3)),
        (top, 0.0, 1.0),
        (left, 0.0, 1.0),
    ):
        quantiles = np.quantile((values - low) / (high - low), np.linspace(0, 1, 11))
        np.testing.assert_allclose(quantiles, np.linspace(0, 1, 11), atol=0.005)
    parameters = np.stack([height * width, width / height, top, left], -1).reshape(count, -1)
    correlation = np.corrcoef(np.column_stack([parameters, flips]).T)
    assert np.abs(correlation - np.eye(len(correlation))).max() < 0.04
    assert abs(flips.mean() - 0.5) < 0.02


def test_draw_crops_depends_on_seed_epoch_and_place():
    whole, flips = jpeg.draw_crops(SEED, 2, 0, 20)
    part, part_flips = jpeg.draw_crops(SEED, 2, 7, 5)
    np.testing.assert_array_equal(part, whole[7:12])
    np.testing.assert_array_equal(part_flips, flips[7:12])
    for other in (jpeg.draw_crops(SEED, 3, 0, 20), jpeg.draw_crops(SEED + 1, 2, 0, 20)):
        assert not np.isin(other[0], whole).any()


def bilinear(image, size):
    """Bilinear resizing by its definition: each output pixel samples one point."""
    for axis in (0, 1):
        length = image.shape[axis]
        points = (np.arange(size) + 0.5) * length / size - 0.5
        low = np.floor(points)
        share = np.expand_dims(points - low, (1, 2) if axis == 0 else (0, 2))
        ends = [np.clip(low + i, 0, length - 1).astype(int) for i in (0, 1)]
        first, second = (np.take(image, end, axis) for end in ends)
        image = first * (1 - share) + second * share
    return image


def train_and_crop(image, kind, flip, image_size):
    """A training image (mirrored back), and the crop that it should show, decoded by PIL."""
    tf = jpeg.import_tensorflow()
    width, height = image.size
    image = image.convert({'grey': 'L', 'cmyk': 'CMYK'}.get(kind, 'RGB'))
    encoded = save(image, 'PNG' if kind == 'png' else 'JPEG')
    candidates, _ = jpeg.draw_crops(SEED, 0, 0, 1)
    top, left, crop_height, crop_width = reference_crop(height, width, candidates[0])
    decoded = Image.open(io.BytesIO(encoded)).convert('RGB')
    crop = decoded.crop((left, top, left + crop_width, top + crop_height))
    actual = tf.function(jpeg.training_image)(
        tf.constant(encoded), candidates[0], tf.constant(flip), image_size
    ).numpy()
    return actual[:, ::-1] if flip else actual, crop


@pytest.mark.parametrize('kind', ['jpeg', 'grey'])
@pytest.mark.parametrize('flip', [False, True])
def test_training_image_of_a_small_crop_is_resized_exactly(kind, flip):
    """Exactly the pixels that PIL decodes, where the crop is less than twice the wanted size."""
    actual, crop = train_and_crop(scene(1, 150, 130), kind, flip, 96)
    assert 48 < min(crop.size) < 2 * 96
    expected = bilinear(np.asarray(crop, np.float64), 96)
    assert np.abs(actual - expected).max() <= 0.51


@pytest.mark.parametrize('kind', ['cmyk', 'png'])
@pytest.mark.parametrize('size', [16, 40])
def test_training_image_of_cmyk_or_png_is_antialiased(kind, size):
    actual, crop = train_and_crop(scene(1, 450, 530), kind, False, size)
    assert min(crop.size) > 4 * size
    expected = np.asarray(crop.resize((size, size), Image.Resampling.BILINEAR))
    assert np.abs(actual.astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.parametrize('size', [16, 40])
def test_training_image_of_a_large_jpeg_crop_is_reduced(size):
    """The same picture as PIL's, but for the rounding of the crop; fine grain is averaged."""
    actual, crop = train_and_crop(scene(1, 450, 530), 'jpeg', False, size)
    expected = np.asarray(crop.resize((size, size), Image.Resampling.BILINEAR))
    assert np.abs(actual.astype(int) - expected.astype(int)).mean() <= 5

    grain = np.random.default_rng(0).integers(0, 256, (450, 530), np.uint8)
    actual, crop = train_and_crop(Image.fromarray(grain), 'grey', False, size)
    expected = np.asarray(crop.resize((size, size), Image.Resampling.BILINEAR))
    assert actual.std() < 2 * expected.std() < 0.5 * bilinear(np.asarray(crop), size).std()


@pytest.mark.parametrize(('height', 'width'), [(150, 130), (61, 200), (33, 32)])
@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK'])
def test_evaluation_image_equals_torchvisions(height, width, mode):
    encoded = save(scene(2, height, width).convert(mode))
    tf = jpeg.import_tensorflow()
    actual = tf.function(jpeg.evaluation_image)(tf.constant(encoded), 56).numpy()
    # torchvision: Resize(64), then CenterCrop(56).
    if height < width:
        new_height, new_width = 64, int(64 * width / height)
    else:
        new_height, new_width = int(64 * height / width), 64
    image = Image.open(io.BytesIO(encoded)).convert('RGB')
    image = image.resize((new_width, new_height), Image.Resampling.BILINEAR)
    top, left = round((new_height - 56) / 2), round((new_width - 56) / 2)
    expected = np.asarray(image)[top : top + 56, left : left + 56]
    assert np.abs(actual.astype(int) - expected.astype(int)).max() <= 1


BROKEN = 7


@pytest.mark.parametrize('damage', ['truncated', 'empty', 'text', 'cmyk'])
def test_streaming_a_damaged_image_is_an_error_that_names_it(tmp_path, damage):
    images = [save(scene(index, 64, 64)) for index in range(12)]
    images[BROKEN] = {
        'truncated': images[BROKEN][: len(images[BROKEN]) // 2],
        'empty': b'',
        'text': b'no image at all',
        'cmyk': save(scene(0, 64, 64).convert('CMYK'))[:900],
    }[damage]
    paths = [tmp_path / f'{index}.jpg' for index in range(12)]
    for path, image in zip(paths, images, strict=True):
        path.write_bytes(image)
    files = ImageFiles(tuple(paths), np.arange(12))
    with pytest.raises(UserError, match=r"image '.*/7\.jpg' is not a whole image"):
        list(streaming.streamed_evaluation_batches(files, 4, 32))


def test_streaming_a_damaged_record_is_an_error_that_names_it(tmp_path):
    images = [save(scene(index, 64, 64)) for index in range(12)]
    images[BROKEN] = images[BROKEN][:300]
    broken = write_imagenet(tmp_path, images, range(12), num_shards=2)
    batches = streaming.StreamedBatches(TFRecords(broken, 'train'), 4, SEED, SIZE)
    named = r'train image \d+ \(n00000007_7\.JPEG, in .*train\.tfrecord-0000[01]-of-00002\)'
    with pytest.raises(UserError, match=named):
        take(batches, 3)


def test_streaming_damaged_or_missing_shards_is_an_error(tmp_path):
    images = [save(scene(index, 32, 32)) for index in range(6)]
    folder = write_imagenet(tmp_path, images, range(6), num_shards=1).data_path
    (path,) = folder.glob('*train*')
    whole = path.read_bytes()
    damaged = tfds.builder_from_directory(folder)
    # One bit of the last image, and a checksum.
    changed = whole[:-60] + bytes([whole[-60] ^ 1]) + whole[-59:]
    checksum = whole[:-1] + bytes([whole[-1] ^ 1])
    for content in (whole[:-40], whole + b'1234', b'\xff' * 8 + whole[8:], changed, checksum):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r'train\.tfrecord-00000-of-00001 cannot be read'):
            take(streaming.StreamedBatches(TFRecords(damaged, 'train'), 2, SEED, SIZE), 1)
    path.unlink()
    with pytest.raises(UserError, match='No such file'):
        TFRecords(damaged, 'train')


def test_streamed_image_files_give_each_image_with_its_label(tmp_path, labels):
    """A folder gives what TFRecord files do: the same labels, each image once."""
    paths = [tmp_path / f'{index}.jpg' for index in range(COUNT)]
    for index, (path, label) in enumerate(zip(paths, labels, strict=True)):
        path.write_bytes(encode(index, label))
    files = ImageFiles(tuple(paths), np.array(labels))
    batches = make(files)
    reference = take(batches, 5)
    assert len(set(np.concatenate([batch['label'] for batch in reference]))) == 5 * BATCH
    assert_equal(take(batches, 3, 2), reference[2:])
    image, label = reference[0]['image'][0], reference[0]['label'][0]
    assert np.abs(image[..., :2].astype(int) - colour(label)).max() <= 6
    paths[4].unlink()
    with pytest.raises(UserError, match=r"image '.*/4\.jpg' cannot be read"):
        take(batches, 5)


def test_streamed_parts_of_a_split_skip_records_within_a_file(builder, labels):
    parts = [
        np.concatenate(
            [
                batch['label'][batch['mask'] == 1]
                for batch in streaming.streamed_evaluation_batches(
                    TFRecords(builder, split), BATCH, SIZE
                )
            ]
        )
        for split in ('train[:40%]', 'train[40%:]')
    ]
    assert min(map(len, parts)) > 10
    assert sorted(np.concatenate(parts)) == sorted(labels)


def test_streaming_examples_without_labels_is_an_error(tmp_path):
    images = [save(scene(index, 32, 32)) for index in range(4)]
    records = TFRecords(write_imagenet(tmp_path, images, [-1] * 4, num_shards=1), 'train')
    with pytest.raises(UserError, match='it has the label -1, not 0 to 999'):
        take(streaming.StreamedBatches(records, 4, SEED, SIZE), 1)


def test_streaming_with_unsuitable_batch_size_or_without_tensorflow_is_an_error(
    builder, encoded, monkeypatch
):
    with pytest.raises(ConfigError, match=rf'data.batch_size={COUNT + 1} .* 1 to {COUNT}'):
        streaming.StreamedBatches(encoded, COUNT + 1, SEED, SIZE)
    monkeypatch.setattr(jax, 'process_count', lambda: 3)
    with pytest.raises(ConfigError, match='a multiple of the 3 processes'):
        make(encoded)
    with pytest.raises(ConfigError, match=r'data\.eval_batch_size=7'):
        streaming.streamed_evaluation_batches(encoded, 7, SIZE)
    monkeypatch.setitem(sys.modules, 'tensorflow', None)
    with pytest.raises(UserError, match=r"pip install 'one_jax\[tensorflow\]'"):
        TFRecords(builder, 'train')


# The source of a streamed set, and TFRecord files read into memory.


def test_open_streamed_folder_describes_crops_and_skips_memory(tmp_path):
    for index, name in enumerate('aabbaabb'):
        path = tmp_path / ('train' if index < 4 else 'test') / name / f'{index}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(index, index))
    fields = {'name': 'image_folder', 'root': str(tmp_path), 'stream': True}
    source = data.open(data_config(**fields))
    assert source.spec.streamed
    assert source.spec.image_shape == (224, 224, 3)
    assert source.spec.mean == data.DATASETS['imagenet2012'].mean
    assert source.examples('train') is None
    assert source.evaluation_splits == ('test',)
    assert source.facts()['label_names'] == ['a', 'b']
    assert source.description()['crop'] == 0.875
    source = data.open(data_config(image_size=16, **fields))
    (batch,) = source.evaluation_batches('test', 8)
    assert batch['label'].tolist() == [0, 0, 1, 1, 0, 0, 0, 0]
    assert batch['image'].shape == (8, 16, 16, 3)
    (batch,) = take(source.train_batches(4, SEED), 1)
    assert sorted(batch['label']) == [0, 0, 1, 1]


def test_open_tfrecord_shards_gives_the_examples_and_order_of_array_record(tmp_path):
    splits = {
        'train': random_split(120, (8, 8, 3), 10, seed=0),
        'test': random_split(60, (8, 8, 3), 10, seed=1),
    }
    sources = []
    # tf.data would take turns among files after every 16 examples.
    for file_format, num_shards in (('array_record', 1), ('tfrecord', 3)):
        data_dir = tmp_path / file_format
        form = {'file_format': file_format, 'num_shards': num_shards}
        folder = write_set(data_dir, 'cifar10', splits, **form)
        assert len(list(folder.glob(f'*train.{file_format}*'))) == num_shards
        sources.append(data.open(data_config(data_dir=str(data_dir))))
    for split in splits:
        expected, actual = (source.examples(split) for source in sources)
        np.testing.assert_array_equal(actual.images, expected.images)
        np.testing.assert_array_equal(actual.labels, expected.labels)


def test_fingerprint_of_streamed_records_follows_content_not_place(tmp_path, builder):
    def fingerprint(data_dir):
        config = data_config(name='imagenet2012', data_dir=str(data_dir), image_size=SIZE)
        return data.open(config).fingerprint

    before = fingerprint(builder.data_path.parent.parent)
    assert before['train'].startswith(f'{COUNT} images (checksum ')
    copied = shutil.copytree(builder.data_path.parent.parent, tmp_path / 'copied')
    assert fingerprint(copied) == before
    shard = next(copied.rglob('*train.tfrecord*'))
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    after = fingerprint(copied)
    assert {name for name in before if before[name] != after[name]} == {'train'}


def test_open_grey_tfrecord_makes_rgb(tmp_path):
    splits = {split: random_split(6, (16, 24, 1), 3, seed=2) for split in ('train', 'test')}
    write_set(tmp_path, 'my_digits', splits, names=3, file_format='tfrecord')
    source = data.open(data_config(name='my_digits', data_dir=str(tmp_path)))
    images, labels = splits['train']
    assert rows(source.examples('train')) == written_rows((np.repeat(images, 3, -1), labels))


@pytest.mark.parametrize('damage', ['missing shard', 'cut shard'])
def test_open_damaged_tfrecord_is_an_error(tmp_path, damage):
    folder = write_set(tmp_path, 'cifar10', cifar10_splits(), file_format='tfrecord')
    damage_set(folder, damage)
    with pytest.raises(UserError, match=r"data\.name='cifar10' in .* cannot be read"):
        data.open(data_config(data_dir=str(tmp_path)))


def test_open_tfrecord_without_tensorflow_is_an_error(tmp_path, monkeypatch):
    write_set(tmp_path, 'cifar10', cifar10_splits(), file_format='tfrecord')
    monkeypatch.setitem(sys.modules, 'tensorflow', None)
    with pytest.raises(UserError, match=r"pip install 'one_jax\[tensorflow\]'"):
        data.open(data_config(data_dir=str(tmp_path)))


def test_stream_of_tfrecords_with_chosen_augmentation_has_the_pixels_of_memory(tmp_path):
    write_set(tmp_path, 'cifar10', cifar10_splits(), file_format='tfrecord')
    config = {'data_dir': str(tmp_path), 'augment': 'pad_crop'}
    memory = data.open(data_config(**config))
    stream = data.open(data_config(stream=True, image_size=32, **config))
    assert (stream.spec.augment, stream.spec.padding) == ('pad_crop', 4)
    batches = (next(source.evaluation_batches('test', 20)) for source in (memory, stream))
    assert_equal(*([batch] for batch in batches))
    batch = next(stream.train_batches(40, SEED).iterate(0))
    assert rows(data.Examples(batch['image'], batch['label'])) == rows(memory.examples('train'))


def test_stream_of_tfrecords_with_subsets_has_the_images_of_memory(tmp_path, monkeypatch, capsys):
    """From several files, of which the subset has some records each."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    write_set(tmp_path, 'cifar10', cifar10_splits(), file_format='tfrecord', num_shards=3)
    subset = {'validation_fraction': 0.25, 'examples_per_class': 2}
    config = {'data_dir': str(tmp_path), 'augment': 'none', **subset}
    memory = data.open(data_config(**config))
    capsys.readouterr()
    stream = data.open(data_config(stream=True, image_size=32, **config))
    assert 'reading all labels of train, once' in capsys.readouterr().out
    assert stream.evaluation_splits == memory.evaluation_splits == ('validation', 'test')
    assert len(stream.encoded['train'].shard_lengths) == 3
    batches = (next(source.evaluation_batches('validation', 12)) for source in (memory, stream))
    assert_equal(*([batch] for batch in batches))
    batch = next(stream.train_batches(20, SEED).iterate(0))
    assert rows(data.Examples(batch['image'], batch['label'])) == rows(memory.examples('train'))
    # The labels are known by then.
    monkeypatch.setattr(TFRecords, '_read_labels', None)
    again = data.open(data_config(stream=True, image_size=32, **config))
    batches = (source.train_batches(20, SEED).iterate(0) for source in (stream, again))
    assert_equal(*([next(batch)] for batch in batches))


def test_labels_of_tfrecords_in_a_damaged_file_are_an_error(tmp_path):
    images = [save(scene(index, 32, 32)) for index in range(6)]
    folder = write_imagenet(tmp_path, images, range(6), num_shards=1).data_path
    (path,) = folder.glob('*train*')
    whole = path.read_bytes()
    path.write_bytes(whole[:-60] + bytes([whole[-60] ^ 1]) + whole[-59:])
    config = data_config(name='imagenet2012', data_dir=str(tmp_path), examples_per_class=1)
    with pytest.raises(UserError, match=r'train\.tfrecord-00000-of-00001 cannot be read'):
        data.open(config)
