"""Writing a student's folder, whole or not at all, and only if its files compute the same."""

import dataclasses
import fcntl
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from one_jax.errors import explain, require
from one_jax.models import cost
from one_jax.runtime import environment, files
from one_jax.students import model_card, quantisation, self_check, torch_interop, weights_file
from one_jax.students import onnx as onnx_export
from one_jax.students.self_check import Predict
from one_jax.students.student import CARD, CONFIG, MODEL, PROGRAM, WEIGHTS, Student, load_student

PLATFORMS = ('cpu', 'cuda', 'tpu')
# Of the latencies: batch sizes, and the most calls and seconds for each.
BATCH_SIZES = (1, 256)
_REPETITIONS, _SECONDS = 20, 5.0


def require_new(output: Path) -> None:
    """Raises `ConfigError` if `output` exists and is not an empty folder."""
    with explain(f'output={str(output)!r} cannot be written', OSError):
        new = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    require(new, 'output', str(output), 'a new folder: nothing is overwritten')


def write_student(
    output: Path,
    student: Student,
    reference: Predict,
    examples: self_check.Images,
    weights: str = 'float32',
    onnx: bool = False,
    latency: bool = False,
    ensemble: Student | None = None,
    training: Mapping[str, Any] | None = None,
    choices: Sequence[Mapping[str, Any]] = (),
) -> Student:
    """Writes weights, programs, config.json and model card, and reads the student back.

    Args:
      output: a folder that does not exist, or is empty.
      student: with float32 variables; its config becomes complete here.
      reference: the network in training; `RuntimeError` if a file differs on the `examples`.
      examples: from `self_check`.
      weights: how kernels are stored, one of `quantisation.TYPES`.
      onnx: whether to write an ONNX model too.
      latency: whether to measure latencies, also of `ensemble`.
      ensemble: all branches, if the student is one of several.
      training, choices: see `model_card.render`.
    """
    parameters, flops = cost.forward_cost(student.network, (*student.config['input_size'], 3))
    config = {
        **student.config,
        'weights': weights,
        'parameters': parameters,
        'flops': flops,
        'versions': environment.versions(),
    }
    with whole_or_not_at_all(output) as folder:
        written = write_weights(folder, dataclasses.replace(student, config=config), weights)
        config = {**written.config}
        formats = {WEIGHTS: written, **write_programs(folder, written, onnx)}
        config['checks'] = self_check.compare(formats, reference, weights != 'float32', examples)
        if latency:
            if ensemble is not None:
                ensemble = dataclasses.replace(ensemble, config={**config, **ensemble.config})
                with tempfile.TemporaryDirectory() as scratch:
                    of_ensemble = write_programs(Path(scratch), ensemble, onnx)
                of_ensemble = {WEIGHTS: ensemble, **of_ensemble}
                formats |= {f'ensemble {name}': call for name, call in of_ensemble.items()}
            milliseconds = measure_latency(formats, tuple(config['input_size']))
            config['latency'] = {'device': environment.device_name(), 'milliseconds': milliseconds}
        files.write_json(folder / CONFIG, config)
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        (folder / CARD).write_text(model_card.render(config, sizes, training, choices))
    return load_student(output)


@contextmanager
def whole_or_not_at_all(output: Path) -> Iterator[Path]:
    """Yields a temporary folder that replaces `output` if the block ends without an error."""
    with explain(f'output={str(output)!r} cannot be written', OSError):
        output.parent.mkdir(parents=True, exist_ok=True)
        for litter in files.temporaries(output):
            with _locked(litter) as is_ours:
                # An empty folder may be so new that it is not locked yet.
                if is_ours and any(litter.iterdir()):
                    shutil.rmtree(litter, ignore_errors=True)
        temporary = files.temporary_beside(output)
        temporary.mkdir()
        try:
            with _locked(temporary):
                yield temporary
                # Another export may have written it meanwhile; a rename replaces an empty folder
                # only.
                require_new(output)
                temporary.rename(output)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Locks a folder; yields whether it could: it is there, and no other process has locked it."""
    with ExitStack() as stack:
        locked = False
        with suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        yield locked


def write_weights(folder: Path, student: Student, weights: str) -> Student:
    """Writes config.json and the weights, and reads the student back, with rounded weights."""
    state_dict = torch_interop.to_state_dict(student.variables, student.num_branches)
    state_dict = quantisation.encode(state_dict, weights)
    for name in [name for name in state_dict if name.endswith('.running_mean')]:
        counter = name.removesuffix('running_mean') + 'num_batches_tracked'
        state_dict[counter] = np.asarray(student.config['step'], np.int64)
    (folder / WEIGHTS).write_bytes(safetensors.numpy.save(state_dict, metadata={'format': 'pt'}))
    sha256 = weights_file.digest(folder / WEIGHTS)
    files.write_json(folder / CONFIG, {**student.config, 'weights_sha256': sha256})
    return load_student(folder)


def write_programs(folder: Path, student: Student, onnx: bool) -> dict[str, Predict]:
    """Writes the StableHLO program and, on request, the ONNX model; reads both back.

    Returns functions of uint8 images [batch, H, W, 3] by the file's name.
    """
    height, width = student.config['input_size']
    (batch,) = jax.export.symbolic_shape('batch')
    images = jax.ShapeDtypeStruct((batch, height, width, 3), jnp.uint8)
    predict = jax.jit(lambda images: student.predict(student.variables, images))
    exported = jax.export.export(predict, platforms=PLATFORMS)(images)
    (folder / PROGRAM).write_bytes(exported.serialize())
    read_back = jax.export.deserialize(bytearray((folder / PROGRAM).read_bytes()))
    formats = {PROGRAM: jax.jit(read_back.call)}
    if onnx:
        (folder / MODEL).write_bytes(onnx_export.export_model(student))
        formats[MODEL] = onnx_export.load_model(folder / MODEL)
    return formats


def measure_latency(
    formats: Mapping[str, Predict], image_size: tuple[int, int]
) -> dict[str, dict[str, float]]:
    """Measures the median milliseconds by format and batch size (a string).

    Images come from the host's memory and logits return there, as in use. Calls alternate between
    the formats, so that other load on the machine affects all of them.
    """
    medians: dict[str, dict[str, float]] = {name: {} for name in formats}
    for batch_size in BATCH_SIZES:
        images = self_check.random_images((*image_size, 3), batch_size).images
        times: dict[str, list[float]] = {name: [] for name in formats}
        for predict in formats.values():
            np.asarray(predict(images))  # the first call compiles
        end = time.perf_counter() + _SECONDS * len(formats)
        for repetition in range(_REPETITIONS):
            if repetition >= 3 and time.perf_counter() > end:
                break
            for name, predict in formats.items():
                before = time.perf_counter()
                np.asarray(predict(images))
                times[name].append(1000 * (time.perf_counter() - before))
        for name in formats:
            medians[name][str(batch_size)] = statistics.median(times[name])
    return medians
