"""Makes a student folder of weights that were trained elsewhere.

    python -m one_jax.import_weights --weights=FILE --network=NAME --config=configs/X.py \\
        --output=DIR [--layout=plain|one] [--branch=N|ensemble|teacher]

The folder can be a frozen teacher (`method.teachers`), a start for fine-tuning (`model.init_from`),
or a student to predict with. The config names the data set that the weights were trained for: its
classes, image size, mean and standard deviation.
"""

import re
import shlex
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from one_jax.runtime import cli
from one_jax.students.importing import LAYOUTS, import_student


def _evaluate_command(output: str) -> str:
    """Returns the command that evaluates the student on the real images of the data set."""
    config = flags.FLAGS['config'].config_filename
    if flags.FLAGS.config.data.generated_examples:
        # An option such as :smoke may have set it.
        config = config.partition(':')[0]
    overrides = [arg for arg in sys.argv[1:] if re.match(r'--?config\.data\.(?!generated)', arg)]
    arguments = [f'--student={output}', f'--config={config}', *overrides]
    return shlex.join(['python', '-m', 'one_jax.evaluate', *arguments])


def main() -> None:
    """Imports what the flags name."""
    given = flags.FLAGS
    weights, output = Path(given.weights), Path(given.output)
    student = import_student(
        weights, given.network, given.config.data, output, given.layout, given.branch
    )
    print(
        f'{given.output}: {given.network}, {student.config["parameters"]:,} parameters. '
        f'Evaluate it:\n{_evaluate_command(given.output)}'
    )


if __name__ == '__main__':
    flags.DEFINE_string('weights', None, 'A file of weights: .safetensors, .pth or .pt.')
    flags.DEFINE_string('network', None, 'The network that was trained, as in model.name.')
    flags.DEFINE_string('output', None, 'The folder to write: a new or an empty one.')
    flags.DEFINE_string('layout', LAYOUTS[0], "'plain', or 'one': a checkpoint of ONE's authors.")
    flags.DEFINE_string('branch', None, "With layout 'one': from 0, 'ensemble' or 'teacher'.")
    config_flags.DEFINE_config_file('config', None, 'The data set that the weights are for.')
    cli.run(main, weights='FILE', network='NAME', config='configs/X.py', output='NEW_DIR')
