"""The model card of a student whose weights were trained elsewhere; see `import_weights`."""

from collections.abc import Mapping
from typing import Any

from one_jax import deployment, model_card
from one_jax.analysis.tables import markdown_table

_LAYOUTS = {'plain': 'one network', 'one': "ONE's network in training, by its authors' code"}


def render(config: Mapping[str, Any], sizes: Mapping[str, int]) -> str:
    """The card as Markdown.

    Args:
      config: the student's config.json, with its checks, and 'file' and 'sha256' in 'imported'.
      sizes: bytes of every other file in the folder.
    """
    parts = [
        _head(config),
        _source(config),
        '## Accuracy\n\nNothing was evaluated. Where the data set is prepared:\n\n'
        '    python -m one_jax.evaluate --student=FOLDER',
        _checks(config['checks']),
        model_card.cost_section(config, sizes),
        model_card.usage_section(config, sizes),
    ]
    return '\n\n'.join(parts) + '\n'


def _head(config: Mapping[str, Any]) -> str:
    height, width = config['input_size']
    taken = ''
    if config['method'] != 'plain':
        taken = f' In this folder: {deployment.in_words(config["branch"])}.'
    return (
        f'# {config["network"]} for {config["data"]["name"]}, imported\n\n'
        f'An image classifier that was trained elsewhere and brought into this form by one_jax: '
        f'{config["num_classes"]} classes, RGB images of {height}x{width} pixels.{taken}'
    )


def _source(config: Mapping[str, Any]) -> str:
    rows = {
        'file': f'`{config["imported"]["file"]}`',
        'its SHA-256': f'`{config["imported"]["sha256"]}`',
        'its layout': _LAYOUTS[config['method']],
        'imported with': model_card.versions_in_words(config),
    }
    table = markdown_table(
        [{'': name, 'value': value} for name, value in rows.items()], ['', 'value']
    )
    return (
        f'## Where the weights come from\n\n{table}\n\n'
        'A file of weights is numbers under names. That these were trained for '
        f'{config["data"]["name"]}, with its classes in this order and with this mean and '
        'standard deviation, is what the import was told.'
    )


def _checks(checks: Mapping[str, Any]) -> str:
    return (
        '## Checks\n\nEvery file was compared with the network as it was read, on '
        f'{checks["num_images"]:,} random images. Its largest logit is '
        f'{checks["largest_logit"]:.4g}.\n\n{model_card.checks_table(checks)}'
    )
