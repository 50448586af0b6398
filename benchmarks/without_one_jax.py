"""Runs a student's programs without importing one_jax; see `students`.

python benchmarks/without_one_jax.py FOLDER IMAGES.npy LOGITS.npz
"""

import sys
from pathlib import Path

import jax.export
import numpy as np


def main(folder: Path, images: np.ndarray, output: str) -> None:
    """Writes the logits [N, C] of `student.stablehlo` and, if it exists, of `student.onnx`.

    Args:
      folder: of the student.
      images: uint8 [N, H, W, 3].
      output: the file to write, with one array per program, named after it.
    """
    path = folder / 'student.stablehlo'
    program = jax.export.deserialize(bytearray(path.read_bytes()))
    logits = {path.name: np.asarray(program.call(images))}
    path = folder / 'student.onnx'
    if path.is_file():
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
        (logits[path.name],) = session.run(['logits'], {'images': images})
    assert 'one_jax' not in sys.modules
    np.savez(output, **logits)


if __name__ == '__main__':
    main(Path(sys.argv[1]), np.load(sys.argv[2]), sys.argv[3])
