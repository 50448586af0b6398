"""`import_weights` and `predict` as a user types them."""

import safetensors.numpy
from command_helpers import run
from PIL import Image
from student_fixtures import generated_config, random_variables, write_student

from one_jax import models
from one_jax.students import torch_interop


def test_import_weights_prints_the_command_that_evaluates(tmp_path):
    weights, folder = tmp_path / 'weights.safetensors', tmp_path / 'student'
    variables = random_variables(models.make_backbone('resnet8', 10)(), (32, 32, 3))
    safetensors.numpy.save_file(torch_interop.to_state_dict(variables), weights)
    output, _ = run(
        'import_weights',
        f'--weights={weights}',
        '--network=resnet8',
        '--config=configs/cifar10_resnet32.py:smoke',
        '--config.data.data_dir=here',
        f'--output={folder}',
    )
    assert f'{folder}: resnet8, 78,042 parameters' in output
    assert output.splitlines()[-1] == (
        f'python -m one_jax.evaluate --student={folder} --config=configs/cifar10_resnet32.py '
        '--config.data.data_dir=here'
    )


def test_predict_needs_neither_tfds_nor_tensorflow(tmp_path):
    """Modules in their place, which cannot be imported, are not missed."""
    for package in ('tensorflow_datasets', 'tensorflow'):
        (tmp_path / f'{package}.py').write_text('raise ImportError("not needed")')
    student = write_student(tmp_path / 'student', generated_config())
    Image.new('RGB', (8, 8)).save(tmp_path / 'image.png')
    output, _ = run(
        'predict', f'--student={student}', str(tmp_path / 'image.png'), PYTHONPATH=str(tmp_path)
    )
    assert str(tmp_path / 'image.png') in output
