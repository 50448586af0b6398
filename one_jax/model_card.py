"""The model card of a student: the README.md of its folder."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from one_jax import deployment, workdir
from one_jax import student as student_lib
from one_jax.analysis.tables import markdown_table

# Networks of ours that torchvision defines, under the same names.
_TORCHVISION = ('resnet18', 'resnet34', 'resnet50', 'resnext50_32x4d')
_RUNTIMES = {
    student_lib.WEIGHTS: 'JAX, one_jax',
    student_lib.PROGRAM: 'JAX, StableHLO program',
    student_lib.MODEL: 'ONNX Runtime, on the processor',
}
_CONTENT = {
    student_lib.WEIGHTS: "the weights, with PyTorch's names and layout",
    student_lib.CONFIG: 'network, classes, preprocessing, accuracy, checks',
    student_lib.PROGRAM: 'program for JAX on CPU, CUDA and TPU: uint8 images to logits',
    student_lib.MODEL: 'ONNX model: uint8 images to logits',
}

# What of the config says how a network was trained, without the paths of a machine.
_FIELDS = {
    'model': ('name', 'num_branches', 'share_stages', 'dtype'),
    'data': (
        'augment',
        'batch_size',
        'examples_per_class',
        'validation_fraction',
        'mixup_alpha',
        'cutmix_alpha',
    ),
    'optimizer': ('learning_rate', 'momentum', 'nesterov', 'weight_decay', 'schedule'),
    'train': ('epochs', 'steps', 'label_smoothing', 'ema_decay'),
}


@dataclasses.dataclass(frozen=True)
class Training:
    """How a run was trained, as far as its files say.

    Attributes:
      fields: what was set and is not 0, by its name in the config.
      seconds: of the whole run; None of an unfinished one.
      device: in words, or None.
    """

    fields: dict[str, Any]
    seconds: float | None = None
    device: str | None = None

    @classmethod
    def of_run(cls, directory: Path, config: Any, method_settings: Mapping[str, Any]) -> 'Training':
        """Reads it from a workdir.

        Args:
          directory: the workdir.
          config: of the run.
          method_settings: every field that its method reads.
        """
        fields = {
            f'{group}.{name}': value
            for group in ('model', 'data', 'optimizer', 'train')
            for name, value in config[group].items()
            if name in _FIELDS[group] and value not in (None, '', 0)
        }
        fields |= {
            f'method.{name}': value for name, value in method_settings.items() if name != 'teachers'
        }
        result = {}
        if (directory / workdir.RESULT).is_file():
            result = workdir.read_json(directory / workdir.RESULT)
        return cls(fields, result.get('seconds'), result.get('device'))


def render(
    config: Mapping[str, Any],
    sizes: Mapping[str, int],
    training: Training,
    predictors: Sequence[Mapping[str, Any]],
) -> str:
    """The card as Markdown.

    Args:
      config: the student's config.json, with its checks.
      sizes: bytes of every other file in the folder.
      training: of the run.
      predictors: from `deployment.compare_predictors`.
    """
    parts = [
        _head(config),
        _training(config, training),
        _accuracy(config, predictors),
        _checks(config['checks']),
        cost_section(config, sizes),
        usage_section(config, sizes),
    ]
    return '\n\n'.join(parts) + '\n'


def versions_in_words(config: Mapping[str, Any]) -> str:
    """The packages that a student's config.json names."""
    return ', '.join(f'{name} {version}' for name, version in config['versions'].items())


def _percent(value: float | None) -> str:
    return 'not measured' if value is None else f'{value:.2f} %'


def _head(config: Mapping[str, Any]) -> str:
    height, width = config['input_size']
    forms = []
    if config.get('batch_norm') == 'folded':
        forms.append('batch normalisation folded into the convolutions')
    if config['weights'] != 'float32':
        forms.append(
            f'kernels stored as {config["weights"]} and computed with in float32, which saves '
            'space and no time'
        )
    return (
        f'# {config["network"]} for {config["data"]["name"]}\n\n'
        f'An image classifier trained with one_jax: {config["num_classes"]} classes, RGB images of '
        f'{height}x{width} pixels. In this folder: '
        f'{deployment.in_words(config["branch"])}'
        f'{"".join(f"; {form}" for form in forms)}.'
    )


def _training(config: Mapping[str, Any], training: Training) -> str:
    seconds = 'not recorded' if training.seconds is None else f'{training.seconds:.0f}'
    rows = {
        'method': config['method'],
        'data set': config['data']['name'],
        'seed': config['seed'],
        'steps': config['step'],
        'seconds': f'{seconds}{f" on {training.device}" if training.device else ""}',
        'versions': versions_in_words(config),
        **{f'`{name}`': value for name, value in training.fields.items()},
    }
    if config['data']['generated_examples']:
        rows['data set'] += ', images generated at random: a smoke run'
    table = markdown_table(
        [{'': name, 'value': str(value)} for name, value in rows.items()], ['', 'value']
    )
    return f'## How it was trained\n\n{table}'


def _accuracy(config: Mapping[str, Any], predictors: Sequence[Mapping[str, Any]]) -> str:
    metric = config['metric']
    text = '## Accuracy\n\n'
    if metric is None:
        text += 'It was not evaluated at this step.'
    else:
        text += (
            f'On all images of the {metric["split"]} split, at the end of training and with '
            f'float32 weights: top-1 {metric["top1"]:.2f} %, top-5 {metric["top5"]:.2f} %, '
            f'negative log-likelihood {metric["nll"]:.4f}, calibration error {metric["ece"]:.2f} %.'
        )
    if predictors:
        rows = [
            {
                'of this run': row['predictor'],
                'top-1': _percent(row['top1']),
                'parameters': f'{row["parameters"]:,}',
                'FLOPs an image': f'{row["flops"]:,}',
            }
            for row in predictors
        ]
        text += '\n\n' + markdown_table(rows, list(rows[0]))
    return text


def _checks(checks: Mapping[str, Any]) -> str:
    kind = 'images of the test split'
    if checks['split'] == 'random':
        kind = 'random images (the data set was not on the machine of the export)'
    trained = ''
    if checks['top1'] is not None:
        trained = f'; its top-1 on them is {checks["top1"]:.2f} %'
    return (
        f'## Checks\n\nEvery file was compared with the network in training on '
        f'{checks["num_images"]:,} {kind}. Its largest logit is {checks["largest_logit"]:.4g}'
        f'{trained}.\n\n{checks_table(checks)}'
    )


def checks_table(checks: Mapping[str, Any]) -> str:
    """How near every file came, from `self_check.compare`."""
    rows = [
        {
            'file': f'`{name}`',
            'largest difference of a logit': f'{check["largest_difference"]:.2g}',
            'same class': f'{check["same_argmax"]:.2f} %',
            'top-1 on them': _percent(check['top1']),
        }
        for name, check in checks['formats'].items()
    ]
    return markdown_table(rows, list(rows[0]))


def cost_section(config: Mapping[str, Any], sizes: Mapping[str, int]) -> str:
    """Parameters, FLOPs, bytes and latency; the arguments are `render`'s."""
    files = [
        {'file': f'`{name}`', 'bytes': f'{size:,}', 'content': _CONTENT[name]}
        for name, size in sizes.items()
    ]
    latency = 'not measured' if 'imported' in config else 'not measured: export with --latency'
    if 'latency' in config:
        latency = _latency(config['latency'])
    return (
        f'## Cost\n\n{config["parameters"]:,} parameters; {config["flops"]:,} FLOPs an image '
        '(convolutions and linear layers, 2 for a multiply-add).\n\n'
        f'{markdown_table(files, list(files[0]))}\n\nLatency: {latency}'
    )


def _latency(measured: Mapping[str, Any]) -> str:
    """A row for every runtime; of a branch of several, beside what the ensemble takes."""
    columns = {'batch of': measured['milliseconds']}
    if 'ensemble_milliseconds' in measured:
        columns['ensemble, batch of'] = measured['ensemble_milliseconds']
    rows = [
        {
            'runtime': words,
            **{
                f'{heading} {size}': f'{value:.2f} ms'
                for heading, times in columns.items()
                for size, value in times[name].items()
            },
        }
        for name, words in _RUNTIMES.items()
        if name in measured['milliseconds']
    ]
    return (
        f"the median of several calls on {measured['device']}, images from the host's memory and "
        f'logits back to it.\n\n{markdown_table(rows, list(rows[0]))}'
    )


def _code(text: str) -> str:
    return f'```python\n{text}\n```'


def usage_section(config: Mapping[str, Any], sizes: Mapping[str, int]) -> str:
    """Code that uses the files; the arguments are `render`'s."""
    parts = [
        '## How to use it\n\nImages are uint8 `[batch, height, width, RGB]`. In JAX:',
        _code(
            'import one_jax\n'
            "student = one_jax.load_student('FOLDER')\n"
            'logits = student(images)  # or: python -m one_jax.predict --student=FOLDER IMAGE...'
        ),
        'In JAX without one_jax:',
        _code(
            'import pathlib\n'
            'import jax.export\n'
            f"program = pathlib.Path('FOLDER/{student_lib.PROGRAM}').read_bytes()\n"
            'logits = jax.export.deserialize(bytearray(program)).call(images)'
        ),
    ]
    if student_lib.MODEL in sizes:
        parts += [
            'In ONNX Runtime:',
            _code(
                'import onnxruntime\n'
                f"session = onnxruntime.InferenceSession('FOLDER/{student_lib.MODEL}')\n"
                "(logits,) = session.run(['logits'], {'images': images})"
            ),
        ]
    return '\n\n'.join([*parts, _pytorch(config)])


def _pytorch(config: Mapping[str, Any]) -> str:
    notes = []
    if 'ensemble' in config:
        notes.append(
            'The trunk has the names of the plain network, branch i the same behind `branches.i.`'
            + (', and the aggregator `aggregator.`' if 'aggregator' in config['ensemble'] else '')
            + '.'
        )
    if config.get('batch_norm') == 'folded':
        notes.append('The network has no batch normalisation, and a bias in every convolution.')
    network = f'YourNetwork(num_classes={config["num_classes"]})'
    if config['network'] in _TORCHVISION and not notes:
        name = config['network']
        network = f'torchvision.models.{name}(num_classes={config["num_classes"]})'
    read = f"weights = safetensors.torch.load_file('FOLDER/{student_lib.WEIGHTS}')\n"
    if config['weights'] == 'int8':
        read += (
            'for name in [name for name in weights if weights[name].dtype == torch.int8]:\n'
            "    scale = weights.pop(name + '_scale')\n"
            '    weights[name] = weights[name] * scale.view(-1, *[1] * (weights[name].dim() - 1))\n'
        )
    code = (
        'import safetensors.torch, torch\n'
        f'network = {network}\n'
        f'{read}'
        'network.load_state_dict(weights, strict=True)\n'
        'network.eval()\n'
        f'mean, std = torch.tensor({config["mean"]}), torch.tensor({config["std"]})\n'
        'normalised = (torch.from_numpy(images) / 255 - mean) / std\n'
        'logits = network(normalised.permute(0, 3, 1, 2))'
    )
    return '\n\n'.join(['In PyTorch, with a network of the same names:', _code(code), *notes])
