"""Executes notebooks. Outputs are stored without anything that depends on machine or time.

    python -m tests.helpers.notebooks docs/notebooks/bend_it.ipynb

executes a notebook in place, in an empty temporary folder as its working directory.
"""

import base64
import os
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from tttjax.io.atomic import atomic_write

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 600  # for one cell, on a machine that does other things too
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:\w|\.\w)[\w.-]*/|\b[A-Z]:\\")  # /tmp/..., C:\...


def execute(path: Path) -> NotebookNode:
    """The notebook with new outputs. Raises CellExecutionError for the first error in a cell."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)  # of the tests, which simulate several devices
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=SECONDS,
            kernel_name=KERNEL["name"],
            record_timing=False,
            resources={"metadata": {"path": folder}},
        )
        client.execute(env=environment, stderr=subprocess.DEVNULL)  # of the kernel, not of cells
    return strip(notebook)


def strip(notebook: NotebookNode) -> NotebookNode:
    """The notebook without progress lines (stderr) and what the kernel adds to it."""
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
            for output in cell.outputs:
                if "metadata" in output:
                    output.metadata = {}
    return notebook


def texts(notebook: NotebookNode) -> list[str]:
    """What the outputs of a notebook say."""
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    return [out.get("text", "") + out.get("data", {}).get("text/plain", "") for out in outputs]


def images(notebook: NotebookNode) -> list[bytes]:
    """The PNG images among the outputs of a notebook."""
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    data = [out["data"]["image/png"] for out in outputs if "image/png" in out.get("data", {})]
    return [base64.b64decode(png) for png in data]


def width(png: bytes) -> int:
    """Of an image, in pixels."""
    return struct.unpack(">I", png[16:20])[0]


def main() -> None:
    """Executes the notebooks that the command line names, and stores them."""
    for path in map(Path, sys.argv[1:]):
        notebook = execute(path)
        with atomic_write(path) as temporary:
            nbformat.write(notebook, temporary)


if __name__ == "__main__":
    main()
