"""Measures the cost of each form of an exported student, and whether its files agree.

    python -m benchmarks.students --workdir=RUN [--branch=N|ensemble|teacher] [--noonnx]

Exports a run's student in every form into a temporary folder: as it is, with folded batch
normalisation, and with float16, bfloat16 and int8 weights; evaluates each folder; then runs
`student.stablehlo` and `student.onnx` on up to 1,000 test images in a process that never imports
one_jax, and compares their logits with each other and with `load_student`'s.
"""

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from absl import flags

from one_jax.errors import UserError
from one_jax.reporting.tables import markdown_table
from one_jax.runtime import cli, environment
from one_jax.students import self_check
from one_jax.students.evaluation import evaluate_students
from one_jax.students.student import MODEL, WEIGHTS, Student
from one_jax.training import workdir
from one_jax.training.export import Options, export_student

ELSEWHERE = Path(__file__).with_name('without_one_jax.py')
FORMS = {
    'as it is': {},
    '`--fold_batch_norm`': {'fold_batch_norm': True},
    '`--weights=float16`': {'weights': 'float16'},
    '`--weights=bfloat16`': {'weights': 'bfloat16'},
    '`--weights=int8`': {'weights': 'int8'},
    '`--fold_batch_norm --weights=int8`': {'fold_batch_norm': True, 'weights': 'int8'},
}


def load_images(directory: Path, student: Student) -> np.ndarray:
    """Reads up to 1,000 test images of a run, uint8 [N, H, W, 3]."""
    shape = [*student.config['input_size'], 3]
    fields = ('num_classes', 'label_names')
    description = {'image_shape': shape, **{name: student.config[name] for name in fields}}
    data_config = workdir.read_config(directory).data
    return self_check.load_images(data_config, description, required=True).images


def logits_elsewhere(folder: Path, images: np.ndarray) -> Mapping[str, np.ndarray]:
    """Runs the programs in a folder in a process without one_jax; logits by the file's name."""
    with tempfile.TemporaryDirectory() as scratch:
        given, made = Path(scratch) / 'images.npy', Path(scratch) / 'logits.npz'
        np.save(given, images)
        subprocess.run([sys.executable, ELSEWHERE, folder, given, made], check=True)
        with np.load(made) as logits:
            return dict(logits)


def compare(first: np.ndarray, second: np.ndarray) -> str:
    """Formats the largest difference of logits [N, C] and the images with the same class."""
    same = int((first.argmax(-1) == second.argmax(-1)).sum())
    return f'{np.abs(first - second).max():.2g}, {same:,} of {len(first):,}'


def measure(folder: Path, student: Student, images: np.ndarray) -> tuple[dict, dict]:
    """Returns a form's cells in the table of costs and in the table of files."""
    record = evaluate_students([folder])
    check = student.config['checks']['formats'][WEIGHTS]
    cost = {
        'bytes of the weights': f'{(folder / WEIGHTS).stat().st_size:,}',
        'top-1 %': record['deployed_top1'],
        'negative log-likelihood': f'{record["deployed_nll"]:.4f}',
        'largest difference of a logit': f'{check["largest_difference"]:.2g}',
        'same class %': check['same_argmax'],
    }
    ours, theirs = self_check.run(student, images), logits_elsewhere(folder, images)
    files = {f'`{name}`': compare(logits, ours) for name, logits in theirs.items()}
    if MODEL in theirs:
        files['between the two'] = compare(*theirs.values())
    return cost, files


def main() -> None:
    """Exports every form and prints both tables."""
    given = flags.FLAGS
    if not given.workdir:
        raise UserError('give --workdir=DIR, the run')
    directory, costs, files = Path(given.workdir), [], []
    with tempfile.TemporaryDirectory() as scratch:
        for number, (form, fields) in enumerate(FORMS.items()):
            folder = Path(scratch) / str(number)
            options = Options(onnx=given.onnx, **fields)
            student = export_student(directory, folder, given.branch, options)
            images = load_images(directory, student)
            cost, agreement = measure(folder, student, images)
            costs.append({'form': form, **cost})
            files.append({'form': form, **agreement})
    name, branch = student.config['network'], student.config['branch']
    print(f'{name}, branch {branch}, {len(images):,} test images, {environment.device_name()}\n')
    for table in (costs, files):
        print(markdown_table(table, list(table[0])), end='\n\n')


if __name__ == '__main__':
    flags.DEFINE_string('workdir', None, 'The directory of a run.')
    flags.DEFINE_string('branch', None, 'See one_jax.export.')
    flags.DEFINE_boolean('onnx', True, 'Whether to include student.onnx.')
    cli.run(main)
