"""Starting a run: clean-up after failures, the lock, resolving moved data."""

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
from tttjax.io.lock_holder import LockHolder
from tttjax.io.locks import FOLDER_LOCK, Lock, hold
from tttjax.runs.run import RunSpec, open_run
from tttjax.training import loop as train_module
from tttjax.training import train_run
from tttjax.training.failed_starts import FAILED_STARTS
from tttjax.training.loop import train

pytestmark = pytest.mark.slow

SHORT = ("train.steps=4", "optim.decay_steps=12")  # the programs of 12 steps


def content(folder):
    """Files by name, without TensorBoard's, which hold the time of each start."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "tensorboard" not in path.parts
    }


@pytest.fixture(scope="module")
def stopped_run(tiny, tmp_path_factory):
    """A work directory whose run was stopped after two of four steps."""
    workdir = tmp_path_factory.mktemp("stopped_run") / "run"
    train(tiny(*SHORT), workdir, stop_after=2)
    return workdir


@pytest.fixture
def copied(stopped_run, tmp_path):
    return Path(shutil.copytree(stopped_run, tmp_path / "project" / "runs" / "run"))


# Failed starts -----------------------------------------------------------------------------------


def test_failed_start_leaves_no_files(tiny, tmp_path):
    config = tiny(f"train.init_from={tmp_path / 'nowhere'}")
    with pytest.raises(UserError, match="holds no checkpoint"):
        train(config, tmp_path / "new" / "run")
    assert not any(tmp_path.iterdir())
    (tmp_path / "log.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no checkpoint"):
        train(config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]


def test_start_interrupted_before_first_step_leaves_no_files(
    tiny, stopped_run, copied, tmp_path, monkeypatch
):
    def interrupt(self, step):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_module.Profiler, "before", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(KeyboardInterrupt):
        train(tiny(*SHORT), copied)
    assert content(copied) == content(stopped_run)


def test_files_of_a_killed_start_are_taken_over(tiny, tmp_path, capsys):
    killed = dataclasses.replace(LockHolder.me(), started="1")
    (tmp_path / FOLDER_LOCK).write_text(json.dumps(dataclasses.asdict(killed)))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    other_config = tiny("train.steps=1", "train.seed=3")
    assert train(other_config, tmp_path).step == 1
    assert "taking over" in capsys.readouterr().err
    assert not (tmp_path / FOLDER_LOCK).exists()


def test_crashes_are_counted_and_then_refused(tiny, tmp_path, monkeypatch):
    def crash(*_, **__):
        raise RuntimeError("a device is broken")

    config, workdir = tiny(*SHORT, "train.max_failed_starts=2"), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train_run, "open_batches", crash)
        for _ in range(2):
            with pytest.raises(RuntimeError):
                train(config, workdir)
            assert [path.name for path in workdir.iterdir()] == [FAILED_STARTS]
        with pytest.raises(UserError, match="last 2 starts"):
            train(config, workdir)
        assert not any(workdir.iterdir())
        with pytest.raises(RuntimeError):
            train(config, workdir)
    assert train(config, workdir, stop_after=2).interrupted
    assert not (workdir / FAILED_STARTS).exists()
    for _ in range(3):  # the last steps, then none
        assert train(config, workdir).step == 4
    assert not (workdir / FAILED_STARTS).exists()


# The lock ----------------------------------------------------------------------------------------


def test_second_start_is_refused_without_changes(data, copied, capsys):
    before = content(copied)
    command = ["train", f"--config={TINY}", f"--workdir={copied}"]
    command += [f"--config.{override}" for override in (*SHORT, f"data.sources={data}")]
    with hold(copied):
        assert main(command) == 2
        assert content(copied).keys() - before.keys() == {FOLDER_LOCK}
    assert "is being written by another command (process" in capsys.readouterr().err
    assert content(copied) == before


def test_run_ends_when_it_loses_its_lock(tiny, tmp_path, monkeypatch):
    @contextlib.contextmanager
    def lost(workdir, max_failed_starts):
        lock = Lock(workdir)
        lock.lost.set()
        workdir.mkdir()
        yield lock

    monkeypatch.setattr(train_module, "lock_workdir", lost)
    with pytest.raises(UserError, match="took over"):
        train(tiny(*SHORT), tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


# Moved data --------------------------------------------------------------------------------------


def test_moved_data_are_recognised_by_content(tiny, data, copied, tmp_path):
    moved = shutil.copytree(data, tmp_path / "moved")
    (tmp_path / "text.txt").write_text("something else " * 1000)
    other_data = prepare([tmp_path / "text.txt"], tmp_path / "other", num_workers=0).folder
    before = content(copied)
    with pytest.raises(UserError, match=r"data differ .* data\.sources"):
        train(tiny(*SHORT, f"data.sources={other_data}"), copied)
    assert content(copied) == before
    assert train(tiny(*SHORT, f"data.sources={moved}"), copied).step == 4
    assert read_config(copied).data.sources == (str(moved),)


def test_relative_paths_resolve_from_any_folder(data, tmp_path, monkeypatch):
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
    shutil.copytree(moved / "data", moved / "copy")
    shutil.rmtree(moved / "data")
    with pytest.raises(UserError, match=rf"tried {project}/data, {moved}/data\); .*--data=DIR"):
        found_data(moved / "runs" / "first")
    assert found_data(moved / "runs" / "first", moved / "copy") == moved / "copy"


def found_data(workdir, given=None):
    return _open_data([open_run(RunSpec(workdir))], given).folder


def test_older_runs_find_relative_data_in_parent_folders(data, copied, tmp_path, monkeypatch):
    """Their configuration holds relative paths, and no working directory."""
    config = json.loads((copied / CONFIG).read_text())
    config["data"]["sources"] = ["data/books"]
    (copied / CONFIG).write_text(json.dumps(config))
    starts = json.loads((copied / ENVIRONMENT).read_text())
    (copied / ENVIRONMENT).write_text(json.dumps([{**starts[0], "workdir": ""}]))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("something else " * 1000)
    prepare(["text.txt"], copied.parent / "data" / "books", num_workers=0)
    with pytest.raises(UserError, match="were not found"):  # nearer, with other content
        found_data(copied)
    expected = tmp_path / "project" / "data" / "books"
    shutil.copytree(data, expected)
    assert found_data(copied) == expected


def test_init_from_may_move_with_the_run(tiny, stopped_run, tmp_path):
    project = tmp_path / "project"
    shutil.copytree(stopped_run, project / "first")
    config = [f"train.init_from={project / 'first'}", "train.steps=2"]
    train(tiny(*config), project / "second", stop_after=1)
    moved = project.rename(tmp_path / "moved")
    config[0] = f"train.init_from={stopped_run}"
    with pytest.raises(UserError, match=r"train\.init_from was"):
        train(tiny(*config), moved / "second")
    config[0] = f"train.init_from={moved / 'first'}"
    assert train(tiny(*config), moved / "second").step == 2
