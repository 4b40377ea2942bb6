"""A run, session, data set and export of version 0.1.0 still give that version's numbers.

`fixtures/version_0_1_0/expected.json` holds what 0.1.0 itself computed from them (CPU, jax 0.10.2).
"""

import json
import shutil
from functools import partial
from pathlib import Path

import jax
import pytest

from tttjax.cli import main
from tttjax.parallel.mesh import make_mesh
from tttjax.runs import run

pytestmark = pytest.mark.slow

VERSION_0_1_0 = Path(__file__).parent / "fixtures" / "version_0_1_0"
EXPECTED = json.loads((VERSION_0_1_0 / "expected.json").read_text())


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Models are opened on one device, since its programs compile faster."""
    monkeypatch.setattr(run, "make_mesh", partial(make_mesh, devices=jax.devices()[:1]))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the files, as current folder."""
    shutil.copytree(VERSION_0_1_0, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def test_run_evaluates_as_before(folder):
    assert main.main(["evaluate", "run", "--out=results"]) == 0
    series = json.loads((folder / "results" / "results.json").read_text())["series"]
    loss = {
        f"{one['mode']} {length}": found["all"]["nats_per_token"]["mean"]
        for one in series
        for length, found in one["contexts"].items()
    }
    assert loss == pytest.approx(EXPECTED["loss"], rel=1e-5)


def test_session_generates_as_before(folder, capsys):
    words = ["--session=book.session", "--prompt= the", "--temperature=0", "--max-tokens=8"]
    assert main.main(["generate", "run", "--json", *words]) == 0
    found = json.loads(capsys.readouterr().out)[0]
    assert found["tokens"] == EXPECTED["generated"]["tokens"]
    assert found["logprobs"] == pytest.approx(EXPECTED["generated"]["logprobs"], rel=1e-4)


@pytest.mark.exhaustive
def test_run_resumes_with_the_same_losses(folder):
    words = ["--config=recipe.py", "--workdir=run", "--config.mesh.tensor=2"]  # of eight devices
    assert main.main(["train", *words]) == 0
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()[-2:]
    for line, expected in zip(lines, EXPECTED["resumed"], strict=True):
        assert {k: json.loads(line)[k] for k in expected} == pytest.approx(expected, rel=1e-4)


def test_data_set_is_whole(folder):
    assert main.main(["prepare", "--check=data"]) == 0


def test_export_imports_and_generates_alike(folder, capsys):
    assert main.main(["import", "export", "--workdir=imported"]) == 0
    words = ["--prompt=the ", "--temperature=0", "--max-tokens=4", "--json"]
    written = []
    for name in ("run", "imported"):
        capsys.readouterr()
        assert main.main(["generate", name, *words]) == 0
        written.append(json.loads(capsys.readouterr().out)[0]["tokens"])
    assert written[0] == written[1]
