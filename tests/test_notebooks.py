"""The notebooks run, and are stored as they run: with outputs, without paths of a machine."""

import nbformat
import pytest
from helpers.notebooks import MACHINE_PATH, execute, images, texts, width
from helpers.paths import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_those_of_any_machine(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(not cell.metadata for cell in notebook.cells)
    assert not [out for cell in code for out in cell.outputs if out.get("name") == "stderr"]
    assert "".join(texts(notebook))
    assert not [text for text in texts(notebook) if MACHINE_PATH.search(text)]
    assert images(notebook)
    assert all(len(png) < 100_000 and width(png) <= 800 for png in images(notebook))


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Jupyter's own libraries
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path):
    stored, executed = nbformat.read(path, as_version=4), execute(path)
    assert not [text for text in texts(executed) if MACHINE_PATH.search(text)]
    assert len(images(executed)) == len(images(stored))


def test_paths_of_machines_are_recognised():
    for text in ("in /tmp/x", "'/home/me/run'", "(/srv/.cache/x)", "C:\\x"):
        assert MACHINE_PATH.search(text)
    for text in ("1/2", "runs/first", "https://a.org/b/c", "tok/s and w1/w2", "a / b"):
        assert not MACHINE_PATH.search(text)
