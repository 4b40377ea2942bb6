"""Starts of a run: what they leave behind, who may write, and where their data are found."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from helpers.paths import TINY

from tttjax.cli.main import main
from tttjax.config import read_config
from tttjax.config.run_info import CONFIG, ENVIRONMENT
from tttjax.data.preparation import prepare
from tttjax.errors import UserError
from tttjax.evaluation.text import _open_data
from tttjax.io import locks
from tttjax.io.locks import FOLDER_LOCK, Lock, hold
from tttjax.runs.run import RunSpec, open_run
from tttjax.training import loop as train_module
from tttjax.training.loop import train

SHORT = ("train.steps=4", "optim.warmup_steps=1")


def content(folder):
    """Files by name; TensorBoard's have the time of each start in them."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "tensorboard" not in path.parts
    }


@pytest.fixture(scope="module")
def begun(tiny, tmp_path_factory):
    """A work directory whose run was stopped after two of four steps."""
    workdir = tmp_path_factory.mktemp("begun") / "run"
    train(tiny(*SHORT), workdir, stop_after=2)
    return workdir


@pytest.fixture
def copied(begun, tmp_path):
    return Path(shutil.copytree(begun, tmp_path / "project" / "runs" / "run"))


# What a failed start leaves -----------------------------------------------------------------------


def test_a_start_without_its_weights_leaves_nothing(tiny, tmp_path):
    config = tiny(f"train.init_from={tmp_path / 'nowhere'}")
    with pytest.raises(UserError, match="holds no checkpoint"):
        train(config, tmp_path / "new" / "run")
    assert not any(tmp_path.iterdir())
    (tmp_path / "log.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no checkpoint"):
        train(config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]


def test_a_start_stopped_before_its_first_step_leaves_nothing(
    tiny, begun, copied, tmp_path, monkeypatch
):
    def interrupt(self, step):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_module.Profiler, "before", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(KeyboardInterrupt):
        train(tiny(*SHORT), copied)
    assert content(copied) == content(begun)


def test_what_a_killed_start_leaves_blocks_no_other(tiny, tmp_path, capsys):
    gone = dataclasses.replace(locks._Holder.me(), started="1")
    (tmp_path / FOLDER_LOCK).write_text(json.dumps(dataclasses.asdict(gone)))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    other = tiny("train.steps=1", "train.seed=3", "optim.warmup_steps=0")
    assert train(other, tmp_path).step == 1
    assert "taking over" in capsys.readouterr().err
    assert not (tmp_path / FOLDER_LOCK).exists()


# One writer ---------------------------------------------------------------------------------------


def test_a_second_start_is_refused_and_changes_nothing(data, copied, capsys):
    before = content(copied)
    command = ["train", f"--config={TINY}", f"--workdir={copied}"]
    command += [f"--config.{override}" for override in (*SHORT, f"data.sources={data}")]
    with hold(copied):
        assert main(command) == 2
        assert content(copied).keys() - before.keys() == {FOLDER_LOCK}
    assert "is being written by another command (process" in capsys.readouterr().err
    assert content(copied) == before


def test_a_run_that_was_taken_over_ends(tiny, tmp_path, monkeypatch):
    @contextlib.contextmanager
    def lost(workdir):
        lock = Lock(workdir)
        lock.lost.set()
        workdir.mkdir()
        yield lock

    monkeypatch.setattr(train_module, "lock_workdir", lost)
    with pytest.raises(UserError, match="took over"):
        train(tiny(*SHORT), tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


# Where data are -----------------------------------------------------------------------------------


def test_moved_data_are_known_by_their_content(tiny, data, copied, tmp_path):
    moved = shutil.copytree(data, tmp_path / "moved")
    (tmp_path / "text.txt").write_text("something else " * 1000)
    other = prepare([tmp_path / "text.txt"], tmp_path / "other", num_workers=0).folder
    before = content(copied)
    with pytest.raises(UserError, match=r"another content .* data\.sources"):
        train(tiny(*SHORT, f"data.sources={other}"), copied)
    assert content(copied) == before
    assert train(tiny(*SHORT, f"data.sources={moved}"), copied).step == 4
    assert read_config(copied).data.sources == (str(moved),)


def test_relative_paths_lead_there_from_every_folder(data, tmp_path, monkeypatch):
    home, project = tmp_path / "home", tmp_path / "home" / "project"
    shutil.copytree(data, project / "data")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(project)
    command = ["train", f"--config={TINY}", "--config.data.sources=data", "--stop-after=1"]
    assert main([*command, "--workdir=~/project/runs/first"]) == 75
    assert [path.name for path in project.iterdir() if path.name.startswith("~")] == []
    assert read_config("runs/first").data.sources == (str(project / "data"),)
    monkeypatch.chdir(tmp_path)
    assert found_data(project / "runs" / "first") == project / "data"

    moved = project.rename(tmp_path / "elsewhere")
    assert found_data(moved / "runs" / "first") == moved / "data"
    shutil.copytree(moved / "data", moved / "kept")
    shutil.rmtree(moved / "data")
    with pytest.raises(UserError, match=rf"tried {project}/data, {moved}/data\); .*--data=DIR"):
        found_data(moved / "runs" / "first")
    assert found_data(moved / "runs" / "first", moved / "kept") == moved / "kept"


def found_data(workdir, given=None):
    return _open_data([open_run(RunSpec(workdir))], given).folder


def test_older_runs_find_relative_data_above_them(data, copied, tmp_path, monkeypatch):
    """They recorded paths as they were given, and not where they were."""
    config = json.loads((copied / CONFIG).read_text())
    config["data"]["sources"] = ["data/books"]
    (copied / CONFIG).write_text(json.dumps(config))
    starts = json.loads((copied / ENVIRONMENT).read_text())
    (copied / ENVIRONMENT).write_text(json.dumps([{**starts[0], "workdir": ""}]))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("something else " * 1000)
    prepare(["text.txt"], copied.parent / "data" / "books", num_workers=0)
    with pytest.raises(UserError, match="are not there"):  # nearer, and of another content
        found_data(copied)
    right = tmp_path / "project" / "data" / "books"
    shutil.copytree(data, right)
    assert found_data(copied) == right


def test_an_origin_that_was_moved_along_is_the_same(tiny, begun, tmp_path):
    project = tmp_path / "project"
    shutil.copytree(begun, project / "first")
    config = [f"train.init_from={project / 'first'}", "train.steps=2", "optim.warmup_steps=0"]
    train(tiny(*config), project / "second", stop_after=1)
    moved = project.rename(tmp_path / "moved")
    config[0] = f"train.init_from={begun}"
    with pytest.raises(UserError, match=r"train\.init_from was"):
        train(tiny(*config), moved / "second")
    config[0] = f"train.init_from={moved / 'first'}"
    assert train(tiny(*config), moved / "second").step == 2
