"""Evaluates every branch, the teacher and the ensemble of a run, or exported students.

python -m one_jax.evaluate --workdir=DIR
python -m one_jax.evaluate --student=DIR[,DIR...] [--config=configs/X.py] [--data_root=DIR]
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from one_jax.errors import UserError
from one_jax.reporting.tables import run_table
from one_jax.runtime import cli
from one_jax.students.evaluation import evaluate_students
from one_jax.training.evaluation import evaluate_workdir


def main() -> None:
    """Evaluates what the flags name and prints the table."""
    directory, student = flags.FLAGS.workdir, flags.FLAGS.student
    if bool(directory) == bool(student):
        raise UserError(
            'give either --workdir=DIR, a run, or --student=DIR, an exported student (or several, '
            'separated by commas: a seed ensemble)'
        )
    if student:
        folders = list(map(Path, student.split(',')))
        record = evaluate_students(folders, flags.FLAGS.config, flags.FLAGS.data_root)
    else:
        record = evaluate_workdir(Path(directory))
    print(run_table(record))


if __name__ == '__main__':
    flags.DEFINE_string('workdir', None, 'The directory of a run.')
    flags.DEFINE_string('student', None, 'An exported student, or several, separated by commas.')
    config_flags.DEFINE_config_file('config', None, "The data set; by default the students' own.")
    flags.DEFINE_string('data_root', None, 'Where the folder of images of the students is now.')
    cli.run(main)
