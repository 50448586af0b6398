"""The model card: what it reports about a student, and that its snippets run."""

import re

import numpy as np
from student_fixtures import random_variables

from one_jax import models
from one_jax.students import folder as student_folder
from one_jax.students import model_card
from one_jax.students.student import CARD, CONFIG, MODEL, PROGRAM, WEIGHTS, Student, load_student

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
TRAINING = {
    'fields': {'optimizer.learning_rate': 0.1},
    'seconds': 75.5,
    'device': 'cpu (2 cores)',
}
CHOICES = [
    {'branch': 0, 'top1': 91.25, 'parameters': 78042, 'flops': 1234567},
    {'branch': 'ensemble', 'top1': None, 'parameters': 194798, 'flops': 2345678},
]
SIZES = {CONFIG: 900, WEIGHTS: 319656, PROGRAM: 329876}


def render(sizes=SIZES, choices=(), **changes):
    return model_card.render({**CONFIG_JSON, **changes}, sizes, TRAINING, choices)


def test_card_reports_what_was_measured():
    card = render(choices=CHOICES)
    for words in (
        '# resnet8 for cifar10',
        '10 classes, RGB images of 8x8 pixels',
        'This folder holds branch 1.',
        '| method | one |',
        '| seed | 7 |',
        '| seconds | 76 on cpu (2 cores) |',
        '| `optimizer.learning_rate` | 0.1 |',
        'On all images of the test split',
        'top-1 91.25 %, top-5 99.50 %, negative log-likelihood 0.3000',
        '| branch 0 | 91.25 % | 78,042 | 1,234,567 |',
        '| ensemble, the mean of all branches | not measured | 194,798 | 2,345,678 |',
        'on 1,000 images of the test split. Its largest logit is 12.5; its top-1 on them is 91.30',
        f'| `{WEIGHTS}` | 2.5e-06 | 99.90 % | 91.40 % |',
        f'| `{WEIGHTS}` | 319,656 |',
        'Latency: not measured: export with --latency',
    ):
        assert words in card
    assert 'onnx' not in card


def test_card_reports_what_is_missing_or_unusual():
    checks = {**CONFIG_JSON['checks'], 'split': 'random', 'top1': None}
    checks['formats'] = {WEIGHTS: {'largest_difference': 0.1, 'same_argmax': 99.0, 'top1': None}}
    milliseconds = {name: {'1': 0.5, '256': 80.25} for name in (PROGRAM, f'ensemble {PROGRAM}')}
    latency = {'device': 'a CPU', 'milliseconds': milliseconds}
    card = render(
        {**SIZES, MODEL: 5},
        metric=None,
        checks=checks,
        weights='int8',
        batch_norm='folded',
        latency=latency,
    )
    for words in (
        'Not evaluated at this step.',
        'random images (the data set was not on the machine of the export)',
        '| 0.1 | 99.00 % | not measured |',
        'kernels stored as int8, computed in float32',
        'The network has no batch normalisation, and a bias in every convolution.',
        "weights.pop(name + '_scale')",
        'session.run(',
        '| JAX, StableHLO program | 0.50 ms | 80.25 ms |',
        '| JAX, StableHLO program, of the ensemble | 0.50 ms | 80.25 ms |',
    ):
        assert words in card
    card = render(data={'name': 'cifar10', 'generated_examples': 64}, branch='teacher')
    assert 'images generated at random: a smoke run' in card
    assert 'This folder holds teacher, all branches weighted by the aggregator.' in card


def test_card_names_torchvisions_networks():
    assert 'torchvision.models.resnet18(num_classes=10)' in render(network='resnet18')
    # Without batch normalisation it is no longer torchvision's.
    assert 'torchvision' not in render(network='resnet18', batch_norm='folded')


def test_snippets_of_the_card_run(tmp_path):
    network = models.make_backbone('resnet8', 10)()
    student = Student(CONFIG_JSON, network, random_variables(network))
    student = student_folder.write_weights(tmp_path, student, 'float32')
    student_folder.write_programs(tmp_path, student, onnx=False)
    (tmp_path / CARD).write_text(render().replace('FOLDER', str(tmp_path)))
    snippets = re.findall(r'```python\n(.*?)```', (tmp_path / CARD).read_text(), re.DOTALL)
    assert len(snippets) == 3
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    expected = load_student(tmp_path)(images)
    for snippet in snippets:
        code = compile(snippet, CARD, 'exec')
        if 'torch' not in snippet:
            names = {'images': images}
            exec(code, names)
            np.testing.assert_allclose(names['logits'], expected, rtol=1e-4, atol=1e-5)
