"""The model card of a student: the README.md in its folder."""

from collections.abc import Mapping, Sequence
from typing import Any

from one_jax.reporting.tables import markdown_table
from one_jax.students import selection
from one_jax.students.student import CONFIG, MODEL, PROGRAM, WEIGHTS

# Networks that torchvision has under the same names.
_TORCHVISION = ('resnet18', 'resnet34', 'resnet50', 'resnext50_32x4d')
_LAYOUTS = {'plain': 'one network', 'one': "ONE's network in training, by its authors' code"}
_RUNTIMES = {WEIGHTS: 'one_jax', PROGRAM: 'JAX, StableHLO program', MODEL: 'ONNX Runtime, CPU'}
_CONTENT = {
    WEIGHTS: "the weights, with PyTorch's names and layout",
    CONFIG: 'network, classes, preprocessing, accuracy, checks',
    PROGRAM: 'program for JAX on CPU, CUDA and TPU: uint8 images to logits',
    MODEL: 'ONNX model: uint8 images to logits',
}


def render(
    config: Mapping[str, Any],
    sizes: Mapping[str, int],
    training: Mapping[str, Any] | None = None,
    choices: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Renders the card as Markdown.

    Args:
      config: the student's config.json, with its checks; 'imported' if it was trained elsewhere.
      sizes: bytes of every other file in the folder.
      training: 'seconds' and 'device' of the run, if known, and config 'fields' by dotted name.
      choices: from `selection.compare_choices`.
    """
    parts = [_head(config), _source(config, training or {}), _accuracy(config, choices)]
    parts += [_checks(config), _cost(config, sizes), _usage(config, sizes)]
    return '\n\n'.join(parts) + '\n'


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    return markdown_table(rows, list(rows[0]))


def _percent(value: float | None) -> str:
    return 'not measured' if value is None else f'{value:.2f} %'


def _head(config: Mapping[str, Any]) -> str:
    height, width = config['input_size']
    imported = 'imported' in config
    forms = [selection.in_words(config['branch'])]
    if config.get('batch_norm') == 'folded':
        forms.append('batch normalisation folded into the convolutions')
    if config['weights'] != 'float32':
        forms.append(f'kernels stored as {config["weights"]}, computed in float32')
    return (
        f'# {config["network"]} for {config["data"]["name"]}{", imported" if imported else ""}\n\n'
        f'An image classifier {"imported by" if imported else "trained with"} one_jax: '
        f'{config["num_classes"]} classes, RGB images of {height}x{width} pixels. This folder '
        f'holds {"; ".join(forms)}.'
    )


def _source(config: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    heading, note, data = '## Training', '', config['data']
    versions = ', '.join(f'{name} {version}' for name, version in config['versions'].items())
    if 'imported' in config:
        heading = '## Source of the weights'
        note = (
            f'\n\nNothing in the file shows that the weights were trained for {data["name"]}, with '
            'its classes in this order and with this mean and standard deviation: that is an '
            'assumption of the import.'
        )
        properties = {
            'file': f'`{config["imported"]["file"]}`',
            'SHA-256': f'`{config["imported"]["sha256"]}`',
            'layout': _LAYOUTS[config['method']],
            'imported with': versions,
        }
    else:
        seconds, device = training.get('seconds'), training.get('device')
        smoke = ', images generated at random: a smoke run' if data['generated_examples'] else ''
        properties = {
            'method': config['method'],
            'data set': f'{data["name"]}{smoke}',
            'seed': config['seed'],
            'steps': config['step'],
            'seconds': 'not recorded' if seconds is None else f'{seconds:.0f} on {device}',
            'versions': versions,
            **{f'`{name}`': value for name, value in training.get('fields', {}).items()},
        }
    rows = [{'': name, 'value': str(value)} for name, value in properties.items()]
    return f'{heading}\n\n{_table(rows)}{note}'


def _accuracy(config: Mapping[str, Any], choices: Sequence[Mapping[str, Any]]) -> str:
    text = '## Accuracy\n\n'
    if 'imported' in config:
        text += 'Not evaluated. Once the data set is prepared:\n\n'
        text += '    python -m one_jax.evaluate --student=FOLDER'
    elif config['metric'] is None:
        text += 'Not evaluated at this step.'
    else:
        text += (
            'On all images of the {split} split, at the end of training and with float32 weights: '
            'top-1 {top1:.2f} %, top-5 {top5:.2f} %, negative log-likelihood {nll:.4f}, '
            'calibration error {ece:.2f} %.'
        ).format(**config['metric'])
    if choices:
        rows = [
            {
                'of this run': selection.in_words(row['branch']),
                'top-1': _percent(row['top1']),
                'parameters': f'{row["parameters"]:,}',
                'FLOPs per image': f'{row["flops"]:,}',
            }
            for row in choices
        ]
        text += f'\n\n{_table(rows)}'
    return text


def _checks(config: Mapping[str, Any]) -> str:
    checks, imported = config['checks'], 'imported' in config
    network = 'imported network' if imported else 'network in training'
    kind = 'images of the test split' if checks['split'] == 'test' else 'random images'
    if checks['split'] == 'random' and not imported:
        kind += ' (the data set was not on the machine of the export)'
    top1 = '' if checks['top1'] is None else f'; its top-1 on them is {checks["top1"]:.2f} %'
    rows = [
        {
            'file': f'`{name}`',
            'largest difference of a logit': f'{check["largest_difference"]:.2g}',
            'same class': f'{check["same_argmax"]:.2f} %',
            'top-1 on them': _percent(check['top1']),
        }
        for name, check in checks['formats'].items()
    ]
    return (
        f'## Checks\n\nEvery file was compared with the {network} on {checks["num_images"]:,} '
        f'{kind}. Its largest logit is {checks["largest_logit"]:.4g}{top1}.\n\n{_table(rows)}'
    )


def _cost(config: Mapping[str, Any], sizes: Mapping[str, int]) -> str:
    files = [
        {'file': f'`{name}`', 'bytes': f'{size:,}', 'content': _CONTENT[name]}
        for name, size in sizes.items()
    ]
    latency = 'not measured' if 'imported' in config else 'not measured: export with --latency'
    if 'latency' in config:
        times = []
        for name, milliseconds in config['latency']['milliseconds'].items():
            runtime = _RUNTIMES[name.removeprefix('ensemble ')]
            runtime += ', of the ensemble' if name.startswith('ensemble ') else ''
            batches = {f'batch of {size}': f'{ms:.2f} ms' for size, ms in milliseconds.items()}
            times.append({'runtime': runtime, **batches})
        latency = (
            f'the median of several calls on {config["latency"]["device"]}, images from the '
            f"host's memory and logits back to it.\n\n{_table(times)}"
        )
    return (
        f'## Cost\n\n{config["parameters"]:,} parameters; {config["flops"]:,} FLOPs per image '
        '(convolutions and linear layers, 2 for a multiply-add).\n\n'
        f'{_table(files)}\n\nLatency: {latency}'
    )


def _usage(config: Mapping[str, Any], sizes: Mapping[str, int]) -> str:
    notes = []
    if 'ensemble' in config:
        aggregator = 'aggregator' in config['ensemble']
        notes.append(
            'The trunk has the names of the plain network, branch i the same behind `branches.i.`'
            f'{", and the aggregator `aggregator.`" if aggregator else ""}.'
        )
    if config.get('batch_norm') == 'folded':
        notes.append('The network has no batch normalisation, and a bias in every convolution.')
    same = config['network'] in _TORCHVISION and not notes
    pytorch = _PYTORCH.format(
        network=f'torchvision.models.{config["network"]}' if same else 'YourNetwork',
        scales=_SCALES if config['weights'] == 'int8' else '',
        **{name: config[name] for name in ('num_classes', 'mean', 'std')},
    )
    parts = [_JAX, _ONNX, pytorch] if MODEL in sizes else [_JAX, pytorch]
    return '\n\n'.join([*parts, *notes])


_JAX = f"""## Use

Images are uint8 `[batch, height, width, RGB]`. In JAX:

```python
import one_jax
student = one_jax.load_student('FOLDER')
logits = student(images)  # or: python -m one_jax.predict --student=FOLDER IMAGE...
```

In JAX without one_jax:

```python
import pathlib
import jax.export
program = pathlib.Path('FOLDER/{PROGRAM}').read_bytes()
logits = jax.export.deserialize(bytearray(program)).call(images)
```"""
_ONNX = f"""In ONNX Runtime:

```python
import onnxruntime
session = onnxruntime.InferenceSession('FOLDER/{MODEL}')
(logits,) = session.run(['logits'], {{'images': images}})
```"""
_PYTORCH = f"""In PyTorch, with a network of the same names:

```python
import safetensors.torch, torch
network = {{network}}(num_classes={{num_classes}})
weights = safetensors.torch.load_file('FOLDER/{WEIGHTS}')
{{scales}}network.load_state_dict(weights, strict=True)
network.eval()
mean, std = torch.tensor({{mean}}), torch.tensor({{std}})
normalised = (torch.from_numpy(images) / 255 - mean) / std
logits = network(normalised.permute(0, 3, 1, 2))
```"""
_SCALES = """\
for name in [name for name in weights if weights[name].dtype == torch.int8]:
    scale = weights.pop(name + '_scale')
    weights[name] = weights[name] * scale.view(-1, *[1] * (weights[name].dim() - 1))
"""
