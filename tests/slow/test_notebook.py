"""The quickstart notebook: as committed, and executed in a fresh kernel on small settings."""

import base64
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_helpers import REPOSITORY, environment
from PIL import Image

from one_jax.students import student

nbformat = pytest.importorskip('nbformat')
nbclient = pytest.importorskip('nbclient')

NOTEBOOK = REPOSITORY / 'notebooks/quickstart.ipynb'
WITH_PICTURES = ('data', 'curves', 'comparison', 'gate', 'predict', 'wrong')
# Appended to the executed copy, to print what its variables hold.
REVEAL = """
import json
print(json.dumps({'predicted': predicted.tolist(), 'labels': test.labels.tolist()}))
"""


def execute(directory: Path) -> Any:
    """Executes a copy of the notebook for one epoch, in a new kernel that writes to `directory`."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(REVEAL, id='reveal'))
    variables = environment(
        ONE_JAX_NOTEBOOK_EPOCHS='1',
        ONE_JAX_NOTEBOOK_RUNS=str(directory / 'runs'),
        TFDS_DATA_DIR=str(directory / 'data'),
        # For the kernel's history and profile.
        IPYTHONDIR=str(directory / 'ipython'),
        PYTHONPATH=str(REPOSITORY),
    )
    client = nbclient.NotebookClient(
        notebook, timeout=240, resources={'metadata': {'path': str(NOTEBOOK.parent)}}
    )
    with pytest.MonkeyPatch.context() as patch:
        # For connection files; the default folder may hold another kernel, which would take
        # precedence over this environment's.
        patch.setenv('JUPYTER_DATA_DIR', str(directory / 'jupyter'))
        return client.execute(env=variables)


def outputs(notebook: Any, cell_id: str) -> list[Any]:
    return next(cell for cell in notebook.cells if cell.id == cell_id).outputs


def printed(notebook: Any, cell_id: str) -> str:
    """Returns what a cell wrote to standard output."""
    found = [output for output in outputs(notebook, cell_id) if output.get('name') == 'stdout']
    return ''.join(output.text for output in found)


def shown(notebook: Any, cell_id: str, kind: str) -> str:
    """Returns the one output of a cell of this MIME type."""
    data = [output.get('data', {}) for output in outputs(notebook, cell_id)]
    (content,) = (entry[kind] for entry in data if kind in entry)
    return content


def read_result(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / 'result.json').read_text())


def test_notebook_as_committed_holds_no_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert NOTEBOOK.stat().st_size < 30_000
    assert notebook.metadata.kernelspec.name == 'python3'
    assert set(notebook.metadata) <= {'kernelspec', 'language_info'}
    for cell in notebook.cells:
        assert cell.metadata == {}, cell.id
        if cell.cell_type == 'code':
            assert cell.outputs == [], cell.id
            assert cell.execution_count is None, cell.id


# One test, because every worker of pytest-xdist would execute the notebook.
def test_notebook_runs_in_a_fresh_kernel(tmp_path):
    notebook = execute(tmp_path)
    runs = tmp_path / 'runs/1_epochs'
    plain, one = read_result(runs / 'plain'), read_result(runs / 'one')

    for cell in notebook.cells:
        if cell.cell_type == 'code':
            assert cell.execution_count, cell.id
            assert 'stderr' not in [output.get('name') for output in cell.outputs], cell
    for name in ('train-plain', 'train-one'):
        assert 'step 40/40' in printed(notebook, name)
        assert 'epoch 1  test top-1: branches' in printed(notebook, name)

    table = printed(notebook, 'table')
    for name, result in (('plain', plain), ('one', one)):
        row = next(line for line in table.splitlines() if line.startswith(f'{name} '))
        assert f'  {result["deployed_top1"]:.2f}  ' in row
    assert ' '.join(f'{top1:.2f}' for top1 in one['branch_top1']) in table

    figure = shown(notebook, 'imports', 'image/svg+xml')
    expected_figure = (REPOSITORY / 'docs/one.svg').read_text()
    assert ElementTree.canonicalize(figure, strip_text=True) == ElementTree.canonicalize(
        expected_figure, strip_text=True
    )
    for name in WITH_PICTURES:
        file = io.BytesIO(base64.b64decode(shown(notebook, name, 'image/png')))
        picture = np.asarray(Image.open(file).convert('L'))
        assert min(picture.shape) > 100, name
        assert picture.std() > 10, f'{name} is blank'

    revealed = json.loads(printed(notebook, 'reveal'))
    predicted, labels = np.array(revealed['predicted']), np.array(revealed['labels'])
    assert np.bincount(labels).tolist() == [100] * 10
    accuracy = 100 * (predicted == labels).mean()
    # Well above chance, 10 %, after 40 steps.
    assert accuracy > 15
    assert accuracy == pytest.approx(one['deployed_top1'])
    top1 = f'{accuracy:.2f} %'
    assert printed(notebook, 'predict') == f'student: {top1}, branch 0 in the run: {top1}\n'
    wrong = re.match(r'(\d+) of 1000 ', printed(notebook, 'wrong'))
    assert int(wrong[1]) == (predicted != labels).sum()
    assert student.load_student(runs / 'student').label_names == [str(i) for i in range(10)]
