"""Plans a run by the compiler: memory, communication and, for TPUs, estimated time; trains nothing.

    python -m one_jax.plan --config=configs/X.py [--devices=8 | --topology=v5e:4x4] [--json]

Without a topology it compiles for this machine. A topology is a slice of TPUs; the compiler of the
extra `tpu` needs none of them.
"""

import json

from absl import flags
from ml_collections import config_flags

from one_jax.errors import UserError, require
from one_jax.runtime import cli
from one_jax.training import planning


def _fits(batch_size: int) -> bool:
    """Whether the run that the flags name fits with batches of that size."""
    given = flags.FLAGS
    config = given.config.copy_and_resolve_references()
    config.data.batch_size = batch_size
    try:
        planning.make_plan(config, given.devices, given.topology, given.slices)
    except UserError as error:
        if 'few enough images for the step' not in str(error):
            raise
        return False
    return True


def main() -> None:
    """Prints the plan for the config that the flags name."""
    given = flags.FLAGS
    allowed = 'left out with --topology, which says how many there are'
    require(not (given.topology and given.devices), 'devices', given.devices, allowed)
    require(given.topology or given.slices == 1, 'slices', given.slices, '1 without --topology')
    plan = planning.make_plan(given.config, given.devices, given.topology, given.slices)
    fields = plan.as_dict()
    if given.largest_batch:
        fields['largest_batch'] = planning.largest_batch(_fits, plan.num_devices)
    if given.json:
        print(json.dumps(fields, indent=2))
    else:
        print(plan)
        if given.largest_batch:
            print(f'largest batch that fits, to an eighth: {fields["largest_batch"]}')


if __name__ == '__main__':
    config_flags.DEFINE_config_file('config', None, 'The recipe, e.g. configs/X.py[:options].')
    flags.DEFINE_integer(
        'devices', None, "Devices that share the batch; default: this machine's.", lower_bound=1
    )
    flags.DEFINE_string('topology', None, 'A slice of TPUs: v5e:2x4, v5p:2x2x1, v6e:1x1, ...')
    flags.DEFINE_integer('slices', 1, 'How many such slices there are.', lower_bound=1)
    flags.DEFINE_boolean('largest_batch', False, 'Also finds the largest batch that fits.')
    flags.DEFINE_boolean('json', False, 'Prints JSON.')
    cli.run(main, config='configs/X.py')
