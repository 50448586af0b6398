"""The content of result.json, and what a run keeps of its data for the student."""

from typing import Any

from jax.sharding import Mesh

from one_jax import models, parallel, workdir
from one_jax.data import datasets, jpeg
from one_jax.models import cost
from one_jax.recipe import Recipe


def describe_data(dataset: datasets.Dataset | datasets.StreamedDataset) -> dict[str, Any]:
    """What a student needs to know of the data it was trained on."""
    fields = ('num_classes', 'image_shape', 'mean', 'std')
    description = {field: getattr(dataset.spec, field) for field in fields}
    # The share of the shorter side that the test images show.
    crop = jpeg.EVALUATION_CROP if dataset.spec.streamed else 1.0
    return {**description, 'crop': crop, 'label_names': list(dataset.label_names)}


def make_result(recipe: Recipe, progress: dict[str, Any], name: str, mesh: Mesh) -> dict[str, Any]:
    """The content of `result.json`: the test split after the last step, never a chosen epoch.

    Args:
      recipe: of the run.
      progress: `evaluations`, `seconds` and `teachers`.
      name: of the run.
      mesh: its devices.
    """
    config, spec = recipe.config, recipe.spec
    method = recipe.method
    parameters, flops = cost.forward_cost(recipe.network, spec.image_shape)
    costs = {
        name: cost.forward_cost(models.make_backbone(name, spec.num_classes)(), spec.image_shape)
        for name in set(method.members)
    }
    if method.deployed == 'ensemble':
        ensemble = recipe.network.clone(make_aggregator=None)
        deployed_parameters, deployed_flops = cost.forward_cost(ensemble, spec.image_shape)
    else:
        deployed = method.members[int(method.deployed.removeprefix('branch '))]
        deployed_parameters, deployed_flops = costs[deployed]
    unlike = {}
    if len(costs) > 1:
        unlike['branch_network'] = list(method.members)
        unlike['branch_parameters'] = [costs[name][0] for name in method.members]
        unlike['branch_flops'] = [costs[name][1] for name in method.members]
    return {
        'name': name,
        'method': config.method.name,
        'network': config.model.name,
        'dataset': config.data.name,
        'seed': config.seed,
        'epochs': recipe.total_epochs,
        'split': 'test',
        **progress['evaluations']['test'],
        **{f'validation_{k}': v for k, v in progress['evaluations'].get('validation', {}).items()},
        'deployed': method.deployed,
        **unlike,
        'teachers': progress['teachers'],
        'parameters': parameters,
        'deployed_parameters': deployed_parameters,
        'flops': flops,
        'deployed_flops': deployed_flops,
        'seconds': round(progress['seconds'], 1),
        'versions': workdir.versions(),
        'device': workdir.device_name(),
        'num_devices': parallel.data_devices(mesh),
    }
