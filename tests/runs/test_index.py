"""`tttjax runs`: the runs below a folder and how they differ."""

import pandas as pd
import pytest

from tttjax.cli.main import main
from tttjax.errors import UserError
from tttjax.runs.index import differing_fields, index_runs


@pytest.fixture(scope="module")
def folder(make_run):
    """A folder with two runs that differ in width and seed."""
    wide = make_run("index/wide", seed=1, embed_dim=16)
    make_run("index/deeper/narrow", step=2)
    return wide.parent


def test_runs_at_any_depth_and_what_they_differ_in(folder):
    runs = index_runs(folder)
    assert [(run.name, run.step, run.loss) for run in runs] == [
        ("deeper/narrow", 2, 1.0),
        ("wide", 3, 1.0),
    ]
    assert differing_fields(runs) == ["model.embed_dim", "train.seed"]


def test_the_command_prints_a_row_for_each_and_writes_all_fields(folder, tmp_path, capsys):
    assert main(["runs", str(folder), f"--csv={tmp_path / 'index.csv'}"]) == 0
    out = capsys.readouterr().out
    assert "| deeper/narrow |    2 |     3 |    1 |         8 |    0 |" in out
    frame = pd.read_csv(tmp_path / "index.csv")
    assert list(frame["model.embed_dim"]) == [8, 16]
    assert {"train.steps", "inner.chunk_size", "data.seed"} <= set(frame.columns)


def test_a_run_without_steps_has_no_loss(make_run, capsys):
    make_run("index_new/old")
    new = make_run("index_new/new")
    (new / "metrics.jsonl").unlink()
    assert main(["runs", str(new.parent)]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| new"))
    assert "nan" not in row
    assert " - " in row


def test_a_run_is_not_searched_for_others(folder):
    assert [run.name for run in index_runs(folder / "wide")] == ["."]


def test_a_folder_without_runs_is_refused(tmp_path, capsys):
    with pytest.raises(UserError, match="no runs"):
        index_runs(tmp_path)
    assert main(["runs", str(tmp_path / "missing")]) == 2
