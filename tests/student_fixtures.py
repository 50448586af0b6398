"""Student folders with random weights, small configs, and PyTorch's names for the tests."""

import json
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy

from one_jax import config as config_lib
from one_jax import data, models
from one_jax.students import config as student_config
from one_jax.students import torch_interop
from one_jax.students.student import abstract_variables

REPOSITORY = Path(__file__).parent.parent


def generated_config(**fields):
    """Returns the config of a plain ResNet-8 on 16 generated images of 8x8; fields by name."""
    config = config_lib.default_config()
    config.update_from_flattened_dict(
        {
            'model.name': 'resnet8',
            'method.name': 'plain',
            'data.name': 'image_folder',
            'data.image_size': 8,
            'data.generated_examples': 16,
            'data.batch_size': 16,
            'data.eval_batch_size': 16,
            'train.compilation_cache_dir': '',
            **fields,
        }
    )
    return config


def random_variables(network, image_shape=(8, 8, 3), seed=0):
    """Draws variables of a network, with positive running variances."""
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        values = generator.normal(size=leaf.shape) / np.sqrt(max(1, np.prod(leaf.shape[:-1])))
        if path[-1].key in ('var', 'scale'):
            values = generator.uniform(0.5, 1.5, leaf.shape)
        return values.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract_variables(network, image_shape))


def make_ensemble(networks, share_stages=2, share_stem=False, num_classes=7, **fields):
    """Builds the network of an ensemble; `fields` are of config.json's 'ensemble'."""
    ensemble = {'members': networks, 'share_stages': share_stages, 'share_stem': share_stem}
    return student_config.build_network(
        {'network': networks[0], 'num_classes': num_classes, 'ensemble': {**ensemble, **fields}}
    )


def make_one(num_branches=3):
    """Builds ONE on ResNet-8 as it is trained, for ten classes."""
    aggregator = {'method': 'one', 'settings': {'teacher': 'gate'}}
    return make_ensemble(['resnet8'] * num_branches, num_classes=10, aggregator=aggregator)


def write_student(folder, config, seed=0, **changes):
    """Writes a student for the data of `config`; `changes` are of its config.json."""
    source = data.open(config.data)
    description = {
        'network': 'resnet8',
        'num_classes': source.spec.num_classes,
        **student_config.data_fields(config.data, source.description()),
        **changes,
    }
    network = models.make_backbone(description['network'], description['num_classes'])()
    variables = random_variables(network, source.spec.image_shape, seed)
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(description))
    state_dict = torch_interop.to_state_dict(variables)
    safetensors.numpy.save_file(state_dict, folder / 'student.safetensors')
    return folder


def batch_norm_shapes(prefix, width):
    """Returns PyTorch's names and shapes of a batch normalisation."""
    return {
        f'{prefix}.{name}': (width,) for name in ('weight', 'bias', 'running_mean', 'running_var')
    }


def block_shapes(prefix, width_in, width):
    """Returns PyTorch's names and shapes of a basic block, projected if the width changes."""
    shapes = {
        f'{prefix}.conv1.weight': (width, width_in, 3, 3),
        f'{prefix}.conv2.weight': (width, width, 3, 3),
        **batch_norm_shapes(f'{prefix}.bn1', width),
        **batch_norm_shapes(f'{prefix}.bn2', width),
    }
    if width_in != width:
        shapes[f'{prefix}.downsample.0.weight'] = (width, width_in, 1, 1)
        shapes |= batch_norm_shapes(f'{prefix}.downsample.1', width)
    return shapes


def run_example(heading, folder, images):
    """Computes logits with the code under a heading of docs/students.md."""
    page = (REPOSITORY / 'docs/students.md').read_text()
    section = page.split(f'## {heading}\n')[1].split('\n## ')[0]
    code = section.split('```python\n')[1].split('```')[0]
    variables = {'images': images}
    exec(code.replace('students/one', str(folder)), variables)
    return np.asarray(variables['logits'])
