"""Student folders with random weights, for the tests that read some."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from one_jax import models, torch_interop
from one_jax.data import datasets


def random_variables(network, image_shape=(8, 8, 3), seed=0):
    """Random variables of a network, with running variances that a network can have."""
    template = jax.eval_shape(
        lambda key, images: network.init(key, images, train=False),
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, *image_shape), jnp.float32),
    )
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        values = generator.normal(size=leaf.shape) / np.sqrt(max(1, np.prod(leaf.shape[:-1])))
        if path[-1].key in ('var', 'scale'):
            values = generator.uniform(0.5, 1.5, leaf.shape)
        return values.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, template)


def write_student(folder, config, seed=0, **changes):
    """A folder with a student of `network` for the data of `config`; `changes` are of its
    config.json."""
    spec = datasets.describe(config.data)
    description = {
        'network': 'resnet8',
        'num_classes': spec.num_classes,
        'label_names': [str(label) for label in range(spec.num_classes)],
        'input_size': list(spec.image_shape[:2]),
        'mean': list(spec.mean),
        'std': list(spec.std),
        **changes,
    }
    network = models.make_backbone(description['network'], description['num_classes'])()
    weights = torch_interop.to_state_dict(random_variables(network, spec.image_shape, seed))
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(description))
    safetensors.numpy.save_file(weights, folder / 'student.safetensors')
    return folder
