"""Invalid input on the command line: exit code 2, one error line, and no files written.

Every case is rejected before anything is compiled.
"""

import os
import re
from pathlib import Path

import pytest
from helpers.paths import TINY

from tttjax.cli import main
from tttjax.config import load_config
from tttjax.data.preparation import prepare
from tttjax.evaluation import compare, files
from tttjax.runs import run as runs
from tttjax.runs.run import Run

TRAIN = ["train", f"--config={TINY}:ttt_e2e", "--workdir=run", "--config.data.sources=data"]
PREPARE = ["prepare", "--out=new"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad_input")
    (folder / "text.txt").write_text("The cat sat on the mat.\n" * 100)
    return prepare([folder / "text.txt"], folder / "data", num_workers=0).folder


@pytest.fixture
def workspace(tmp_path, monkeypatch, prepared):
    """The current directory, with valid data and text, and the invalid files of the cases."""
    monkeypatch.chdir(tmp_path)
    Path("data").symlink_to(prepared)
    Path("text.txt").write_text("good " * 100)
    Path("empty.txt").write_text("")
    Path("binary.txt").write_bytes(b"\x7fELF\xff\x00")
    Path("file").write_text("precious")
    return tmp_path


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_rejected(workspace, capsys, words, message):
    before = content(workspace), sorted(workspace.iterdir())
    assert main.main(words) == 2
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert err.splitlines()[-1:] == errors  # one, after any progress lines
    assert re.search(message, errors[0]), errors[0]
    assert "Traceback" not in err
    assert (content(workspace), sorted(workspace.iterdir())) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*PREPARE], "No input was given: name files"),
        ([*PREPARE, "nowhere.txt"], r"nowhere\.txt does not exist; "),
        ([*PREPARE, "empty.txt"], r"empty .*empty\.txt"),
        ([*PREPARE, "binary.txt"], r"binary\.txt is a binary file, not text"),
        ([*PREPARE, "text.txt", "--val-fraction=2"], "val_fraction=2.0 must be"),
        ([*PREPARE, "text.txt", "--tokenizer=nowhere.model"], r"nowhere\.model"),
        ([*PREPARE, "text.txt", "--tokenizer=sentencepiece"], "(?i)vocabulary of 4096 .*; use a"),
        (["prepare", "text.txt", "--out=file"], "file is a file; name a folder"),
        (["prepare", "text.txt", "--out=file/new"], "file"),
        (["prepare", "text.txt", "--out=data", "--seed=5"], "was prepared with other .*seed .*; "),
    ],
)
def test_prepare(workspace, capsys, words, message):
    check_rejected(workspace, capsys, words, message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config=nowhere.py"], r"no experiment file nowhere\.py; "),
        (["--config=file"], "--config=file must name a Python file"),
        (["--config.train.step=3"], r"no configuration field .*Did you mean .*train\.steps"),
        (
            ["--config.trian.steps=3"],
            "no configuration field 'trian.steps'. Did you mean 'train.steps'",
        ),
        (["--config.train.steps=-1"], "train.steps = -1 must be at least"),
        (["--config.train.steps=many"], "train.steps = .*many"),
        (["--config.train.seq_len=33"], "33 is not a multiple of inner.chunk_size = 8; .* 32 or"),
        (["--config.model.window_size=4"], "window_size = 4 is smaller than inner.chunk_size = 8"),
        (["--config.model.suffix_layers=5"], "suffix_layers = 5 is more than .* = 1"),
        (["--config.mesh.fsdp=3"], "does not divide the number of devices, 8"),
        (["--config.mesh.fsdp=32"], "does not divide the number of devices, 8"),
        (["--config.train.batch_size=7"], "7 sequences cannot be divided .*; choose a multiple"),
        (
            ["--config.inner.fast_paths=foo"],
            "'foo' matches no weight; .* nearest to it are( [^ ,]+,?){3}$",
        ),
        (["--config.data.sources=nowhere"], "nowhere does not exist .*; make it with"),
        (["--config.data.sources=file"], r"file .* make it with|file .*; "),
        (["--config.model.vocab_size=100"], "vocab_size=100 is smaller than the vocabulary"),
        (["--config.train.seq_len=64000"], "fewer than one sequence of 64000"),
        (
            ["--config.train.seq_len=64000", "--config.data.layout=documents"],
            "longest document .* fewer than one sequence of 64000",
        ),
        (["--workdir=file"], "file is a file; choose another"),
        (["--workdir=file/run"], "file/run cannot .* file is a file; "),
        (["--stop-after=0"], "--stop-after=0 must be a step"),
        (["--from-step=7"], "no checkpoint of that step; it has none"),
    ],
)
def test_train(workspace, capsys, words, message):
    check_rejected(workspace, capsys, [*TRAIN, *words], message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "nowhere"], "nowhere holds no checkpoint: give a work directory"),
        (["evaluate", "file"], "file passes through a file .*; choose another"),
        (["verify", "nowhere"], "no folder nowhere; "),
        (["bench", "data", "--data=nowhere"], "nowhere does not exist .*; make it with"),
        (["report", "file", "--inner-rule=custom"], "(?i)inner-rule.*custom.*sgd"),
        (["prepare", "--check=nowhere"], "nowhere does not exist .*; make it with"),
    ],
)
def test_other_commands(workspace, capsys, words, message):
    check_rejected(workspace, capsys, words, message)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file", "file is a file; .*--out"),
        ("file/results", "file is a file; .*--out"),
        ("closed/results", "no write permission for .*closed; .*--out"),
    ],
)
def test_out_is_checked_before_evaluation(workspace, capsys, monkeypatch, out, message):
    """Also if the tests run as a user who can write everywhere."""
    run = Run("first", load_config(f"{TINY}", []), weights=None)
    monkeypatch.setattr(runs, "open_run", lambda spec: run)
    monkeypatch.setattr(compare, "compare", lambda *args, **options: pytest.fail("it computes"))
    Path("closed").mkdir()
    access = files.os.access
    monkeypatch.setattr(
        files.os, "access", lambda path, mode: path.name != "closed" and access(path, mode)
    )
    check_rejected(workspace, capsys, ["evaluate", "run", f"--out={out}"], message)


@pytest.mark.parametrize("name", ["text.txt", "lines.jsonl"])
def test_unreadable_text_is_an_error(workspace, capsys, monkeypatch, name):
    Path("lines.jsonl").write_text('{"text": "good"}\n')
    opened = Path.open

    def refuse(self, *args, **options):
        if self.name == name:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **options)

    with monkeypatch.context() as unreadable:
        unreadable.setattr(Path, "open", refuse)
        words = [*PREPARE, name, "--num-workers=0"]
        assert main.main(words) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(rf"error: Cannot read {name} \(Permission denied\); repair .*\n", err), err
    assert not Path("new").exists()


def test_an_unreadable_folder_is_an_error(workspace, capsys, monkeypatch):
    Path("folder/closed").mkdir(parents=True)
    Path("folder/text.txt").write_text("good " * 100)
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    with monkeypatch.context() as unreadable:
        unreadable.setattr(os, "scandir", refuse)
        assert main.main([*PREPARE, "folder"]) == 2
    assert "Cannot read folder/closed (Permission denied); repair" in capsys.readouterr().err
    assert not Path("new").exists()
