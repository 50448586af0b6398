"""student.onnx: the same logits in ONNX Runtime, at any batch size."""

import sys

import numpy as np
import pytest
from student_fixtures import random_variables

from one_jax import onnx_export, student
from one_jax.errors import UserError

GATE = {'method': 'one', 'settings': {'teacher': 'gate'}}
ENSEMBLE = {'members': ['resnet8'] * 2, 'share_stages': 2, 'share_stem': False}
NETWORKS = {
    'plain': {'network': 'resnet8'},
    'folded': {'network': 'resnet8', 'batch_norm': 'folded'},
    'pre-activation': {'network': 'wrn10_1'},
    'teacher': {'network': 'resnet8', 'ensemble': {**ENSEMBLE, 'aggregator': GATE}},
}


def test_without_the_packages_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'jax2onnx', None)
    with pytest.raises(UserError, match=r"pip install 'one_jax\[onnx\]'"):
        onnx_export.require_packages()


# Of libraries older than ours.
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', NETWORKS)
def test_onnx_runtime_computes_the_same(tmp_path, kind):
    pytest.importorskip('jax2onnx')
    pytest.importorskip('onnxruntime')
    import onnx

    config = {
        **NETWORKS[kind],
        'num_classes': 7,
        'input_size': [12, 8],
        'mean': [0.5, 0.4, 0.3],
        'std': [0.2, 0.25, 0.3],
    }
    network = student.make_network(config)
    exported = student.Student(config, network, random_variables(network, (12, 8, 3)))
    path = tmp_path / 'student.onnx'
    path.write_bytes(onnx_export.export_model(exported))
    graph = onnx.load(path).graph
    dimensions = [
        [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (graph.input[0], graph.output[0])
    ]
    assert dimensions == [['batch', 12, 8, 3], ['batch', 7]]
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    predict = onnx_export.load_model(path)
    for batch_size in (1, 3):
        shape = (batch_size, 12, 8, 3)
        images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        expected = np.asarray(exported(images))
        tolerance = 1e-5 * max(1, np.abs(expected).max())
        np.testing.assert_allclose(predict(images), expected, rtol=0, atol=tolerance)
