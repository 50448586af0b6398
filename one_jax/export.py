"""Exports a student from a run.

    python -m one_jax.export --workdir=DIR --output=DIR [--branch=N|ensemble|teacher]
        [--fold_batch_norm] [--weights=float32|float16|bfloat16|int8] [--onnx] [--latency]
        [--data_dir=DIR] [--data_root=DIR]

The folder holds `student.safetensors` (PyTorch's names and layout), `config.json`, a model card
(`README.md`) and `student.stablehlo`: a program from uint8 images to logits, for any batch size,
which `jax.export.deserialize` loads without one_jax. With --onnx also `student.onnx`, the same for
ONNX Runtime. Every file is compared with the network in training on test images of the run before
the folder appears.
"""

import dataclasses
from pathlib import Path

from absl import flags

from one_jax.runtime import cli
from one_jax.students import quantisation, selection, self_check
from one_jax.training.export import Options, export_student


def main() -> None:
    """Exports what the flags name."""
    values = flags.FLAGS
    fields = [field.name for field in dataclasses.fields(Options)]
    options = Options(**{name: values[name].value for name in fields})
    student = export_student(Path(values.workdir), Path(values.output), values.branch, options)
    metric = student.config['metric']
    score = f', {metric["split"]} top-1 {metric["top1"]:.2f} %' if metric else ''
    print(
        f'{values.output}: {student.config["network"]}, '
        f'{selection.in_words(student.config["branch"])}, '
        f'{student.config["parameters"]:,} parameters{score}'
    )
    print(self_check.summary(student.config['checks']))


if __name__ == '__main__':
    flags.DEFINE_string('workdir', None, 'The directory of a run.')
    flags.DEFINE_string('output', None, 'The folder to write: a new or an empty one.')
    flags.DEFINE_string(
        'branch',
        None,
        "A branch's number from 0, 'ensemble' or 'teacher'; by default what the method deploys.",
    )
    flags.DEFINE_boolean('fold_batch_norm', False, 'Fold batch normalisations into convolutions.')
    types = ', '.join(quantisation.TYPES)
    flags.DEFINE_string('weights', 'float32', f'How kernels are stored: {types}.')
    flags.DEFINE_boolean('onnx', False, "Also write student.onnx; pip install 'one_jax[onnx]'.")
    flags.DEFINE_boolean('latency', False, 'Measure latencies on this machine for the model card.')
    flags.DEFINE_string('data_dir', None, "Where the run's data set is now, for the check.")
    flags.DEFINE_string('data_root', None, 'The same for a folder of images.')
    cli.run(main, workdir='DIR', output='NEW_DIR')
