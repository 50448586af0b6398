"""The model card: what it says of a student, and that its snippets run."""

import re

import numpy as np
import pytest
from student_fixtures import random_variables

from one_jax import latency, model_card, models, student_folder
from one_jax.student import CARD, CONFIG, PROGRAM, WEIGHTS, Student, load_student

CONFIG_JSON = {
    'network': 'resnet8',
    'num_classes': 10,
    'label_names': list('abcdefghij'),
    'input_size': [8, 8],
    'mean': [0.5, 0.4, 0.3],
    'std': [0.2, 0.25, 0.3],
    'data': {'name': 'cifar10', 'generated_examples': 0},
    'weights': 'float32',
    'metric': {'split': 'test', 'top1': 91.25, 'top5': 99.5, 'nll': 0.3, 'ece': 2.5},
    'method': 'one',
    'branch': 1,
    'step': 3000,
    'seed': 7,
    'parameters': 78042,
    'flops': 1234567,
    'versions': {'jax': '0.10.2'},
    'checks': {
        'split': 'test',
        'num_images': 1000,
        'top1': 91.3,
        'largest_logit': 12.5,
        'formats': {
            WEIGHTS: {'largest_difference': 2.5e-6, 'same_argmax': 99.9, 'top1': 91.4},
            PROGRAM: {'largest_difference': 3e-6, 'same_argmax': 100.0, 'top1': 91.3},
        },
    },
}
TRAINING = model_card.Training({'optimizer.learning_rate': 0.1}, 75.5, 'cpu (2 cores)')
PREDICTORS = [
    {'predictor': 'branch 0', 'top1': 91.25, 'parameters': 78042, 'flops': 1234567},
    {'predictor': 'ensemble', 'top1': None, 'parameters': 194798, 'flops': 2345678},
]
SIZES = {CONFIG: 900, WEIGHTS: 319656, PROGRAM: 329876}


def render(sizes=SIZES, predictors=(), **changes):
    return model_card.render({**CONFIG_JSON, **changes}, sizes, TRAINING, predictors)


def test_the_card_says_what_was_measured():
    card = render(predictors=PREDICTORS)
    for words in (
        '# resnet8 for cifar10',
        '10 classes, RGB images of 8x8 pixels',
        'In this folder: branch 1.',
        '| method | one |',
        '| seed | 7 |',
        '| seconds | 76 on cpu (2 cores) |',
        '| `optimizer.learning_rate` | 0.1 |',
        'On all images of the test split',
        'top-1 91.25 %, top-5 99.50 %, negative log-likelihood 0.3000',
        '| branch 0 | 91.25 % | 78,042 | 1,234,567 |',
        '| ensemble | not measured | 194,798 | 2,345,678 |',
        'on 1,000 images of the test split. Its largest logit is 12.5; its top-1 on them is 91.30',
        f'| `{WEIGHTS}` | 2.5e-06 | 99.90 % | 91.40 % |',
        f'| `{WEIGHTS}` | 319,656 |',
        'Latency: not measured: export with --latency',
    ):
        assert words in card
    assert 'onnx' not in card


def test_the_card_says_what_is_not_as_usual():
    checks = {**CONFIG_JSON['checks'], 'split': 'random', 'top1': None}
    checks['formats'] = {WEIGHTS: {'largest_difference': 0.1, 'same_argmax': 99.0, 'top1': None}}
    card = render(metric=None, checks=checks, weights='int8', batch_norm='folded')
    for words in (
        'It was not evaluated at this step.',
        'random images (the data set was not on the machine of the export)',
        '| 0.1 | 99.00 % | not measured |',
        'kernels stored as int8 and computed with in float32, which saves space and no time',
        'The network has no batch normalisation, and a bias in every convolution.',
        "weights.pop(name + '_scale')",
    ):
        assert words in card
    card = render(data={'name': 'cifar10', 'generated_examples': 64}, branch='teacher')
    assert 'images generated at random: a smoke run' in card
    assert 'In this folder: teacher, all branches weighed by the aggregator.' in card


def test_torchvisions_networks_are_named():
    assert 'torchvision.models.resnet18(num_classes=10)' in render(network='resnet18')
    # Without batch normalisation it is no longer torchvision's.
    assert 'torchvision' not in render(network='resnet18', batch_norm='folded')


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    """A student's folder with its program and its card, and the latencies in it."""
    folder = tmp_path_factory.mktemp('student')
    network = models.make_backbone('resnet8', 10)()
    config = dict(CONFIG_JSON)
    student = Student(config, network, random_variables(network))
    student = student_folder.write_weights(folder, student, 'float32')
    programs = student_folder.write_programs(folder, student, onnx=False)
    config['latency'] = latency.measure(programs, (8, 8), ensemble=programs)
    sizes = student_folder.sizes(folder)
    (folder / CARD).write_text(model_card.render(config, sizes, TRAINING, []))
    return folder, config['latency']


def test_the_snippets_of_the_card_run(written):
    folder, _ = written
    card = (folder / CARD).read_text().replace('FOLDER', str(folder))
    snippets = re.findall(r'```python\n(.*?)```', card, re.DOTALL)
    assert len(snippets) == 3
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    expected = load_student(folder)(images)
    for snippet in snippets:
        code = compile(snippet, CARD, 'exec')
        if 'torch' in snippet:
            continue
        names = {'images': images}
        exec(code, names)
        np.testing.assert_allclose(names['logits'], expected, rtol=1e-4, atol=1e-5)


def test_latencies_are_of_every_format_and_batch_size(written):
    folder, measured = written
    card = (folder / CARD).read_text()
    cells = []
    for column in ('milliseconds', 'ensemble_milliseconds'):
        assert measured[column].keys() == {PROGRAM}
        times = measured[column][PROGRAM]
        assert times.keys() == {'1', '256'}
        assert all(value > 0 for value in times.values())
        cells += [f'{times["1"]:.2f} ms', f'{times["256"]:.2f} ms']
    assert '| runtime | batch of 1 | batch of 256 | ensemble, batch of 1 |' in card
    assert f'| JAX, StableHLO program | {" | ".join(cells)} |' in card
    assert measured['device'] in card
