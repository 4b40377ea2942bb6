"""`tttjax read`: update traces, snapshots, stop and resume, rewinding, forks."""

import functools
import io
import json
import os
import shutil

import pytest
from helpers.inference import StopAfter
from matplotlib.figure import Figure
from safetensors.numpy import load_file

import tttjax.cli.read
import tttjax.evaluation.update_trace
from tttjax.cli.main import main
from tttjax.evaluation.update_trace_plot import draw
from tttjax.inference.session_file import read_header
from tttjax.io.locks import hold
from tttjax.runs.snapshots import list_snapshots
from tttjax.training import stopping

pytestmark = pytest.mark.slow

TEXT = "the cat sat on the mat. " * 19  # 7 prefill calls of 64 bytes, and a shorter one
SNAPSHOT_FLAGS = ("--keep-every=64", "--keep-most=3")


class Picture:
    """The plot of one trace, drawn once for all tests that write it."""

    def __init__(self, *arguments):
        self._arguments = arguments

    @functools.cached_property
    def _png(self):
        file = io.BytesIO()
        draw(*self._arguments).savefig(file, format="png")
        return file.getvalue()

    def savefig(self, path, format):
        path.write_bytes(self._png if format == "png" else b"")


@pytest.fixture(scope="module", autouse=True)
def picture():
    """A plot of each trace: drawing takes seconds."""
    pictures = {}

    def picture(about, means):
        key = json.dumps(about), means.tobytes()
        return pictures.setdefault(key, Picture(about, means))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tttjax.evaluation.update_trace, "draw", picture)
        yield picture


@pytest.fixture
def call(monkeypatch, capsys, shared_models, picture):
    """call(words..., stop=None) -> (exit code, stdout, stderr)."""

    def call(*words, stop=None):
        monkeypatch.setattr(stopping, "StopRequest", lambda: StopAfter(stop))
        # The plot of a part of the text is replaced by that of the whole.
        plot = (lambda *_: Figure()) if stop else picture
        monkeypatch.setattr(tttjax.evaluation.update_trace, "draw", plot)
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "cat.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def uninterrupted(run, text, tmp_path_factory, open_once):
    """A folder with the outputs of an uninterrupted prefill."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tttjax.cli.read, "load_from_args", open_once)
        assert main(["read", run, str(text), *outputs(folder)]) == 0
    return folder


def outputs(folder):
    names = {"save-session": "s", "telescope": "trace", "log": "log.csv"}
    return [*(f"--{option}={folder / name}" for option, name in names.items()), *SNAPSHOT_FLAGS]


def content(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_stopped_and_killed_prefill_is_bit_identical(run, text, uninterrupted, tmp_path, call):
    folder = tmp_path / "here"
    read = ("read", run, text, *outputs(folder))
    folder.mkdir()
    assert call(*read, stop=3)[0] == 75
    shutil.copy(folder / "s", tmp_path / "early")
    assert call(*read, stop=2)[0] == 75
    # As if killed before the last save: there are lines and snapshots beyond the session.
    shutil.copy(tmp_path / "early", folder / "s")
    with (folder / "trace" / "chunks.jsonl").open("a") as file:
        file.write('{"tokens": 352, "lo')
    assert call(*read, stop=1)[0] == 75
    # As if killed between a session and its snapshot, which is due after four calls.
    (folder / "s.kept" / f"{4 * 64 + 1:012}.session").unlink()
    code, _, err = call(*read)
    assert code == 0
    assert " -> " in err
    assert "clipped" in err
    assert content(folder) == content(uninterrupted)


def test_missing_summary_is_written_by_same_command(run, text, uninterrupted, tmp_path, call):
    shutil.copytree(uninterrupted, tmp_path / "w")
    (tmp_path / "w" / "trace" / "telescope.json").unlink()
    (tmp_path / "w" / "trace" / "telescope.png").unlink()
    assert call("read", run, text, *outputs(tmp_path / "w"))[0] == 0
    assert content(tmp_path / "w") == content(uninterrupted)


def test_update_trace_files_agree_with_session(uninterrupted, call):
    about = read_header(uninterrupted / "s")
    lines = (uninterrupted / "trace" / "chunks.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["tokens"] for row in rows] == [8 * (i + 1) for i in range(len(TEXT) // 8)]
    assert [row["loss"] for row in rows] == pytest.approx(about.chunk_losses, rel=1e-6)
    assert [row["loss_after"] for row in rows] == pytest.approx(about.chunk_losses_after, rel=1e-6)
    assert all(row["clipped"] == (row["grad_norm"] >= 1) for row in rows)
    summary = json.loads((uninterrupted / "trace" / "telescope.json").read_text())
    assert summary["layers"] == list(about.layers) == ["layer0"]
    assert summary["chunks"] == len(rows)
    assert summary["loss"] == pytest.approx(sum(about.chunk_losses) / len(rows), rel=1e-6)
    assert summary["clip_rate"] == pytest.approx(sum(r["clipped"] for r in rows) / len(rows))
    for i, (name, (drift, start)) in enumerate(about.layers.items()):
        assert rows[-1]["layer_drift"][i] == summary["drift"][name] == pytest.approx(drift)
        assert summary["start_norm"][i] == pytest.approx(start)
    by_weight = sum(size**2 for size in about.drift.values())
    assert by_weight == pytest.approx(sum(drift**2 for drift, _ in about.layers.values()))
    assert (uninterrupted / "trace" / "telescope.png").read_bytes().startswith(b"\x89PNG")
    code, summary_text, _ = call("sessions", uninterrupted / "s")
    assert code == 0
    last = f"{about.chunk_losses[-1]:.4f} -> {about.chunk_losses_after[-1]:.4f}"
    assert last in summary_text
    assert "layer0  drift" in summary_text
    assert [snapshot.tokens for snapshot in list_snapshots(uninterrupted / "s").values()] == [
        1,
        129,
        257,
    ]
    for snapshot in list_snapshots(uninterrupted / "s").values():
        assert f"{snapshot.tokens:12,} tokens  " in summary_text
    header = json.loads(call("sessions", uninterrupted / "s", "--json")[1])[
        str(uninterrupted / "s")
    ]
    assert len(header["kept"]) == 3


def test_prefill_from_snapshot_is_bit_identical(run, text, uninterrupted, tmp_path, call):
    rewind = ("sessions", uninterrupted / "s", "--to", tmp_path / "s")
    code, _, err = call(*rewind, "--rewind=300")
    assert code == 0
    assert "the session at 257 tokens" in err
    assert "--run=WORKDIR and --text=FILE" in err
    assert call("read", run, text, *outputs(tmp_path))[0] == 0
    assert (tmp_path / "s").read_bytes() == (uninterrupted / "s").read_bytes()


def test_rewind_to_any_chunk(run, text, uninterrupted, tmp_path, call):
    """The session is bit-identical to that of a text that ends there."""
    position = 8 * 38 + 1
    exactly = ("--run", run, "--text", text)
    rewound = call(
        "sessions", uninterrupted / "s", f"--rewind={position}", "--to", tmp_path / "s", *exactly
    )
    assert rewound[0] == 0
    assert f"the session at {position} tokens" in rewound[2]
    (tmp_path / "cut.txt").write_text(TEXT[: position - 1])
    cut = ("--save-session", tmp_path / "cut", "--telescope", tmp_path / "trace")
    assert call("read", run, tmp_path / "cut.txt", *cut)[0] == 0
    actual, expected = load_file(tmp_path / "s"), load_file(tmp_path / "cut")
    assert actual.keys() == expected.keys()
    assert all((actual[name] == expected[name]).all() for name in actual)
    a, b = (read_header(tmp_path / name) for name in ("s", "cut"))
    assert (a.tokens, a.chunk_losses, a.layers) == (b.tokens, b.chunk_losses, b.layers)


def test_forks_differ_only_by_their_prompts(run, uninterrupted, tmp_path, call):
    snapshot = list(list_snapshots(uninterrupted / "s"))[1]
    before = snapshot.read_bytes()
    for name, prompt in (("a", "a dog"), ("b", "a dog"), ("c", "a log")):
        fork = ("--session", snapshot, "--save-session", tmp_path / name, "--prompt", prompt)
        assert call("generate", run, *fork, "--max-tokens=0")[0] == 0
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c
    assert snapshot.read_bytes() == before
    pending = [load_file(tmp_path / name)["pending"].tobytes() for name in "ac"]
    assert pending[0] != pending[1]


def test_progress_without_update_trace(run, text, tmp_path, call):
    code, _, err = call("read", run, text, "--save-session", tmp_path / "s")
    assert code == 0
    assert "gradient" in err
    assert "clipped" in err
    assert " -> " not in err
    assert read_header(tmp_path / "s").chunk_losses_after == [None] * (len(TEXT) // 8)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--rewind=5"], "both --rewind=TOKENS and --to=NEW"),
        (["--rewind=-5", "--to=new"], "--rewind=-5 must be at least 0"),
        (
            ["--rewind=0", "--to=new"],
            "cannot rewind to 0 tokens: it has no snapshots before 1",
        ),
        (["--rewind=999", "--to=new"], "has 457 tokens; give a smaller --rewind"),
        (["--rewind=50", "--to=SELF"], "exists already"),
        (["--rewind=50", "--to=new", "--text=TEXT"], "both --run=WORKDIR and --text=FILE"),
        (["--rewind=50", "--to=new", "--text=OTHER", "--run=RUN"], "is not the text of"),
        (["more", "--rewind=50", "--to=new"], "needs one session file, not 2"),
        (["--text=TEXT"], "--run and --text need --rewind=TOKENS"),
    ],
)
def test_invalid_rewinds_are_refused(
    run, text, uninterrupted, tmp_path, monkeypatch, call, words, sentence
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.txt").write_text(TEXT.upper())
    names = {"SELF": uninterrupted / "s", "TEXT": text, "OTHER": tmp_path / "other.txt", "RUN": run}
    for name, value in names.items():
        words = [word.replace(name, str(value)) for word in words]
    code, _, err = call("sessions", uninterrupted / "s", *words)
    assert code == 2
    assert sentence in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["other.txt"]


def test_rewind_without_snapshots_explains_keep_every(uninterrupted, tmp_path, call):
    shutil.copy(uninterrupted / "s", tmp_path / "s")
    code, _, err = call("sessions", tmp_path / "s", "--rewind=9", "--to", tmp_path / "t")
    assert code == 2
    assert "it has no snapshots; make them with `tttjax read --keep-every" in err


def test_invalid_read_options_are_refused(run, text, uninterrupted, tmp_path, call):
    read = ("read", run, text, "--save-session", tmp_path / "s")
    assert "has no fast weights, or --learn=none" in refused(
        call, *read, "--learn=none", "--telescope", tmp_path / "trace"
    )
    assert "--keep-most=1 must be at least 2" in refused(call, *read, "--keep-most=1")
    assert "is a file; name a folder" in refused(call, *read, "--telescope", text)
    shutil.copytree(uninterrupted / "s.kept", tmp_path / "s.kept")
    assert "holds sessions of an earlier reading" in refused(call, *read, *SNAPSHOT_FLAGS)
    shutil.copy(uninterrupted / "s", tmp_path / "u")
    again = ("read", run, text, "--save-session", tmp_path / "u", "--learn=none")
    assert "and would go on without learning: give the same --learn" in refused(call, *again)
    other = tmp_path / "other.txt"
    other.write_text(TEXT.upper())
    read = ("read", run, other, "--save-session", tmp_path / "t")
    before = content(uninterrupted)
    trace_flags = ("--telescope", uninterrupted / "trace")
    assert "another model or text" in refused(call, *read, *trace_flags)
    assert content(uninterrupted) == before
    assert not (tmp_path / "s").exists()
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("output", ["s", "log.csv", "trace", "compare"])
def test_locked_outputs_are_refused(run, text, uninterrupted, tmp_path, call, output):
    read = ["read", run, text, "--save-session", tmp_path / "s", *SNAPSHOT_FLAGS]
    read += ["--log", tmp_path / "log.csv", "--telescope", tmp_path / "trace"]
    read += ["--compare", tmp_path / "compare"]
    with hold(tmp_path / output, beside=output in ("s", "log.csv")):
        assert f"{output} is being written by another command" in refused(call, *read)
    assert not any(tmp_path.iterdir())
    rewind = ("sessions", uninterrupted / "s", "--rewind=128", "--to", tmp_path / "t")
    generate = ("generate", run, "--prompt=a", "--save-session", tmp_path / "t")
    with hold(tmp_path / "t", beside=True):
        for words in (rewind, generate):
            assert "t is being written by another command" in refused(call, *words)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_session_permissions_follow_umask(run, tmp_path, call, umask, mode):
    (tmp_path / "a.txt").write_text(TEXT[:70])
    before = os.umask(umask)
    try:
        read = ("read", run, tmp_path / "a.txt", "--save-session", tmp_path / "s", *SNAPSHOT_FLAGS)
        assert call(*read)[0] == 0
    finally:
        os.umask(before)
    files = [tmp_path / "s", *list_snapshots(tmp_path / "s")]
    assert len(files) > 1
    assert {path.stat().st_mode & 0o777 for path in files} == {mode}


def refused(call, *words):
    code, _, err = call(*words)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err
