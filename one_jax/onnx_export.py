"""A student as an ONNX model, by jax2onnx; `pip install 'one_jax[onnx]'`."""

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

from one_jax.errors import UserError
from one_jax.student import Student

INPUT, OUTPUT = 'images', 'logits'
# Calls that ONNX has not, by the parameter that holds what they call.
_CALLS = {
    'custom_jvp_call': 'call_jaxpr',
    'custom_vjp_call': 'call_jaxpr',
    'custom_vmap_call': 'call',
    'jit': 'jaxpr',
    'pjit': 'jaxpr',
}


def require_packages() -> None:
    """Raises `UserError` where the packages are missing."""
    # The converter shows the traceback of every plugin whose library is too new for it, and warns
    # of shapes that it does not note; a student needs none of them.
    for library in ('jax2onnx', 'onnx_ir'):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    try:
        import jax2onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--onnx needs the package {error.name}: pip install 'one_jax[onnx]'"
        ) from None


def export_model(student: Student) -> bytes:
    """A serialised ONNX model: `images` uint8 [batch, H, W, 3] to `logits` float32 [batch, C].

    Raises:
      UserError: the packages are missing, or the converter lacks an operation.
    """
    require_packages()
    from jax2onnx import to_onnx

    height, width = student.config['input_size']
    (batch,) = jax.export.symbolic_shape('batch')
    images = jax.ShapeDtypeStruct((batch, height, width, 3), jnp.uint8)
    closed = jax.make_jaxpr(lambda images: student.predict(student.variables, images))(images)

    # The converter is given operations only: it would replace Flax's layers by its own, and knows
    # nothing of our convolution's derivatives.
    def operations(images: jax.Array) -> jax.Array:
        (logits,) = _evaluate(closed.jaxpr, closed.consts, [images])
        return logits

    try:
        model = to_onnx(
            operations, [images], model_name='student', input_names=[INPUT], output_names=[OUTPUT]
        )
    except NotImplementedError as error:
        raise UserError(f'--onnx: jax2onnx cannot convert this network: {error}') from error
    # The converter's notes of the shapes in between are wrong for some, and nothing needs them.
    del model.graph.value_info[:]
    return model.SerializeToString()


def _evaluate(jaxpr: core.Jaxpr, constants: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """The values of a jaxpr, with all that it calls written out in line."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *arguments], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        if called := _CALLS.get(equation.primitive.name):
            inner = equation.params[called]
            outputs = _evaluate(inner.jaxpr, inner.consts, inputs)
        elif equation.primitive.name == 'stack':
            # The converter does not know it yet.
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


def _max_pool(
    images: jax.Array,
    *,
    window_dimensions: Sequence[int],
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **dilations: Any,
) -> jax.Array:
    """The pooling of images [B, H, W, C], over three axes.

    The converter pools over every axis that there is, and ONNX Runtime over three at most.
    """
    batch, height, width, channels = images.shape
    maps = images.transpose(0, 3, 1, 2).reshape(batch * channels, height, width)
    pooled = lax.reduce_window_max_p.bind(
        maps,
        window_dimensions=(1, *window_dimensions[1:3]),
        window_strides=(1, *window_strides[1:3]),
        padding=((0, 0), *padding[1:3]),
        **{name: (1, *values[1:3]) for name, values in dilations.items()},
    )
    return pooled.reshape(batch, channels, *pooled.shape[1:]).transpose(0, 2, 3, 1)


def load_model(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The model in a file as a function of uint8 images [batch, H, W, 3], on the processor."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return lambda images: session.run([OUTPUT], {INPUT: np.asarray(images)})[0]
