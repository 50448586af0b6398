"""Converts a student to ONNX with jax2onnx; `pip install 'one_jax[onnx]'`."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from one_jax.errors import explain
from one_jax.students.student import Student

INPUT, OUTPUT = 'images', 'logits'
# Calls, which ONNX lacks, by the parameter that holds the called jaxpr.
_CALLS = {
    'custom_jvp_call': 'call_jaxpr',
    'custom_vjp_call': 'call_jaxpr',
    'custom_vmap_call': 'call',
    'jit': 'jaxpr',
    'pjit': 'jaxpr',
}


def require_packages() -> None:
    """Raises `UserError` if a package is missing."""
    # The converter logs a traceback for every plugin whose library is too new for it, and warnings
    # about shapes: none of them matter to a student.
    for library in ('jax2onnx', 'onnx_ir'):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    with explain("--onnx requires more packages (pip install 'one_jax[onnx]')", ImportError):
        import jax2onnx  # noqa: F401
        import onnxruntime  # noqa: F401


def export_model(student: Student) -> bytes:
    """Serialises an ONNX model: `images` uint8 [batch, H, W, 3] to `logits` float32 [batch, C].

    Raises `UserError` if a package is missing, or the converter lacks an operation.
    """
    require_packages()
    from jax2onnx import to_onnx

    height, width = student.config['input_size']
    (batch,) = jax.export.symbolic_shape('batch')
    images = jax.ShapeDtypeStruct((batch, height, width, 3), jnp.uint8)
    closed = jax.make_jaxpr(lambda images: student.predict(student.variables, images))(images)

    # The converter gets primitive operations only: it would replace Flax's layers by its own, and
    # cannot convert the custom derivatives of our convolution.
    def operations(images: jax.Array) -> jax.Array:
        return _evaluate(closed.jaxpr, closed.consts, [images])[0]

    with explain('--onnx: jax2onnx cannot convert this network', NotImplementedError):
        model = to_onnx(
            operations, [images], model_name='student', input_names=[INPUT], output_names=[OUTPUT]
        )
    # Some of the intermediate shapes that the converter records are wrong; nothing needs them.
    del model.graph.value_info[:]
    return model.SerializeToString()


def _evaluate(jaxpr: core.Jaxpr, constants: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr with everything that it calls inlined."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *arguments], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        if called := _CALLS.get(equation.primitive.name):
            inner = equation.params[called]
            outputs = _evaluate(inner.jaxpr, inner.consts, inputs)
        elif equation.primitive.name == 'stack':
            # The converter does not support it yet.
            axis = equation.params['axis']
            outputs = [lax.concatenate([jnp.expand_dims(x, axis) for x in inputs], axis)]
        elif equation.primitive.name == 'reduce_window_max':
            outputs = [_max_pool(*inputs, **equation.params)]
        else:
            outputs = equation.primitive.bind(*inputs, **equation.params)
            if not equation.primitive.multiple_results:
                outputs = [outputs]
        values |= dict(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _max_pool(images: jax.Array, **parameters: Any) -> jax.Array:
    """Pools images [B, H, W, C] as [B C, H, W].

    The converter pools over every axis, and ONNX Runtime supports three at most.
    """
    batch, height, width, channels = images.shape
    maps = images.transpose(0, 3, 1, 2).reshape(batch * channels, height, width)
    # Each parameter has an entry for each axis; that of the channels is the same as of the batch.
    parameters = {name: values[:3] for name, values in parameters.items()}
    pooled = lax.reduce_window_max_p.bind(maps, **parameters)
    return pooled.reshape(batch, channels, *pooled.shape[1:]).transpose(0, 2, 3, 1)


def load_model(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Loads the model in a file as a function of uint8 images [batch, H, W, 3], on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return lambda images: session.run([OUTPUT], {INPUT: np.asarray(images)})[0]
