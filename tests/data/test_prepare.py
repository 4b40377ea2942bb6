"""`tttjax prepare`: deterministic, resumable, atomic, with clear errors."""

import argparse
import errno
import filecmp
import json
import subprocess
import sys
import textwrap

import numpy as np
import pyarrow.parquet
import pytest
import tokenizers as hf

from tttjax.cli import prepare as command
from tttjax.data import preparation, prepare_pass, prepared_folder, writer
from tttjax.data.preparation import prepare
from tttjax.data.shards import JOURNAL, open_prepared
from tttjax.errors import UserError
from tttjax.io.locks import FOLDER_LOCK, hold
from tttjax.io.sealed import SEAL


def write_corpus(folder, sizes, seed=0):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i, size in enumerate(sizes):
        letters = rng.choice(np.frombuffer(b"abcdefgh    \n", np.uint8), size)
        (folder / f"doc{i:03d}.txt").write_bytes(letters.tobytes())
    return folder


def same_files(a, b):
    """Whether two folders have the same files with the same content, the manifest's paths aside."""
    names = sorted(p.relative_to(a).as_posix() for p in a.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(b).as_posix() for p in b.rglob("*") if p.is_file())
    return not filecmp.cmpfiles(a, b, [n for n in names if n != "manifest.json"], False)[1]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("c") / "corpus"
    return write_corpus(folder, np.random.default_rng(1).integers(50, 3000, 60))


def test_the_number_of_workers_changes_nothing(corpus, tmp_path):
    options = {"tokenizer": "sentencepiece", "vocab_size": 300, "shard_tokens": 5000}
    one = prepare([corpus], tmp_path / "one", num_workers=0, **options)
    two = prepare([corpus], tmp_path / "two", num_workers=2, **options)
    assert same_files(one.folder, two.folder)
    assert one.manifest == two.manifest


def test_counts_filter_and_borders(corpus, tmp_path):
    data = prepare(
        [corpus], tmp_path / "d", min_document_tokens=1000, add_eos=True, shard_tokens=10_000
    )
    sizes = [path.stat().st_size for path in corpus.iterdir()]
    expected = [size for size in sizes if size + 2 >= 1000]
    assert sum(s["documents"] for s in data.splits.values()) == len(expected)
    assert sum(s["bytes"] for s in data.splits.values()) == sum(expected)
    assert data.manifest["skipped"] == {
        "empty": 0,
        "short": len(sizes) - len(expected),
        "duplicates": 0,
    }
    assert max(s["longest_document"] for s in data.splits.values()) == max(expected) + 2
    for name in data.splits:
        split = data.split(name)
        starts, stops = split.document_bounds()
        tokens = split.read(0, split.num_tokens)
        assert (tokens[starts] == data.tokenizer.bos_id).all()
        assert (tokens[stops - 1] == data.tokenizer.eos_id).all()


def test_documents_split_does_not_depend_on_others(corpus, tmp_path):
    everything = prepare([corpus], tmp_path / "all", val_fraction=0.3)
    some = prepare([corpus], tmp_path / "some", val_fraction=0.3, pattern="doc00*.txt")
    other_seed = prepare([corpus], tmp_path / "seed", val_fraction=0.3, seed=1)
    held_out = set(everything.split("val").document_names())
    assert 5 < len(held_out) < 35
    part = {name for name in held_out if "/doc00" in name}
    assert set(some.split("val").document_names()) == part
    assert set(other_seed.split("val").document_names()) != held_out


@pytest.mark.parametrize("val_fraction", [1e-9, 0.999999])
def test_no_split_is_empty_by_chance(tmp_path, val_fraction):
    corpus = write_corpus(tmp_path / "c", [400, 500, 600, 0])
    data = prepare([corpus], tmp_path / "d", val_fraction=val_fraction)
    counts = {name: split["documents"] for name, split in data.splits.items()}
    assert sorted(counts.values()) == [1, 2]
    assert data.manifest["skipped"]["empty"] == 1


def test_end_of_single_document_is_held_out(tmp_path):
    corpus = write_corpus(tmp_path / "c", [4000])
    data = prepare([corpus], tmp_path / "d", val_fraction=0.25)
    train, val = data.split("train"), data.split("val")
    assert (train.num_tokens, val.num_tokens) == (3001, 1001)
    tokens = np.concatenate([s.read(1, s.num_tokens) for s in (train, val)])
    assert tokens.astype(np.uint8).tobytes() == (corpus / "doc000.txt").read_bytes()
    assert (train.num_bytes, val.num_bytes) == (3000, 1000)


def test_end_of_only_long_document_is_held_out(tmp_path):
    corpus = write_corpus(tmp_path / "c", [700, 700, 2000, 700])
    data = prepare([corpus], tmp_path / "d", val_fraction=0.5, min_document_tokens=800)
    train, val = data.split("train"), data.split("val")
    assert list(train.document_names()) == ["c/doc002.txt"]
    assert list(val.document_names()) == ["c/doc002.txt#tail"]
    tokens = np.concatenate([s.read(1, s.num_tokens) for s in (train, val)])
    assert tokens.astype(np.uint8).tobytes() == (corpus / "doc002.txt").read_bytes()
    assert data.manifest["skipped"]["short"] == 3
    with pytest.raises(UserError, match=r"No document is left to hold out: .* 4 shorter than"):
        prepare([corpus], tmp_path / "e", val_fraction=0.2, min_document_tokens=800)
    with pytest.raises(UserError, match=r"No document is left to train on: .* 4 shorter than"):
        prepare([corpus], tmp_path / "e", val_fraction=0.8, min_document_tokens=800)
    assert not (tmp_path / "e").exists()


def test_split_manifest(tmp_path):
    corpus = write_corpus(tmp_path / "c", [300, 300, 300])
    table = tmp_path / "splits.tsv"
    table.write_text("name\tsplit\ndoc000\ttrain\ndoc001.txt\tval\nc/doc002.txt\ttest\n")
    data = prepare([corpus], tmp_path / "d", split_manifest=str(table))
    names = {split: list(data.split(split).document_names()) for split in data.splits}
    assert names == {"train": ["c/doc000.txt"], "val": ["c/doc001.txt"], "test": ["c/doc002.txt"]}
    table.write_text("name\tsplit\ndoc000\ttrain\n")
    with pytest.raises(UserError, match=r"doc001\.txt is not in the split manifest"):
        prepare([corpus], tmp_path / "e", split_manifest=str(table))
    table.write_text("name\tpart\ndoc000\ttrain\n")
    with pytest.raises(UserError, match='no column "split"'):
        prepare([corpus], tmp_path / "e", split_manifest=str(table))


def test_again_is_free_and_other_settings_are_refused(corpus, tmp_path):
    out = tmp_path / "d"
    prepare([corpus], out)
    before = (out / "manifest.json").stat().st_mtime_ns
    logged = []
    prepare([corpus], out, log=logged.append)
    assert logged == [f"prepare: {out} is already prepared with these settings"]
    assert (out / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"was prepared with other val_fraction \(0\.05\)"):
        prepare([corpus], out, val_fraction=0.2)
    assert open_prepared(out).manifest["settings"]["val_fraction"] == 0.05
    data = prepare([corpus], out, val_fraction=0.2, overwrite=True)
    assert data.manifest["settings"]["val_fraction"] == 0.2
    (out / "train-00000.tokens").write_bytes(b"damage")
    prepare([corpus], out, val_fraction=0.2, overwrite=True)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_overwriting_with_bad_input_keeps_the_old_data(tmp_path):
    good, bad = write_corpus(tmp_path / "good", [300, 300]), write_corpus(tmp_path / "bad", [300])
    (bad / "not_text.txt").write_bytes(b"\xff\xfe\x00")
    out = tmp_path / "d"
    prepare([good], out)
    before = names_in(out)
    for settings in ({}, {"min_document_tokens": 5000}, {"tokenizer": "gpt9"}):
        with pytest.raises(UserError):
            prepare([bad if not settings else good], out, overwrite=True, **settings)
        assert names_in(tmp_path) == ["bad", "d", "good"]
        assert names_in(out) == before
        assert open_prepared(out, verify=True).splits.keys() == {"train", "val"}


def test_overwriting_is_continued_and_spares_other_files(corpus, tmp_path, monkeypatch):
    real, out = tmp_path / "real", tmp_path / "d"
    real.mkdir()
    out.symlink_to(real)
    prepare([corpus], out)
    (out / "notes.md").write_text("precious")
    again = {"seed": 1, "shard_tokens": 9000, "overwrite": True, "num_workers": 0}
    monkeypatch.setattr("tttjax.data.encode._TASK_BYTES", 2000)
    monkeypatch.setattr(prepare_pass, "JOURNAL_SECONDS", 0.0)
    with monkeypatch.context() as interrupted:
        interrupted.setattr(prepare_pass._Progress, "report", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare([corpus], out, **again)
    assert json.loads((tmp_path / ".real.preparing" / "prepare.journal").read_text())["tasks"] > 0
    assert open_prepared(out).manifest["settings"]["seed"] == 0
    with monkeypatch.context() as killed:
        killed.setattr(preparation, "replace_folder", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare([corpus], out, **again)
    logged = []
    data = prepare([corpus], out, **again, log=logged.append)
    assert (logged, data.manifest["settings"]["seed"]) == ([], 1)  # only the rename was missing
    assert (out / "notes.md").read_text() == "precious"
    (out / "notes.md").unlink()
    whole = prepare([corpus], tmp_path / "whole", **again)
    assert same_files(out, whole.folder)
    assert names_in(tmp_path) == ["d", "real", "whole"]


def _interrupt(*args):
    raise KeyboardInterrupt


def test_bad_input_keeps_the_work_of_earlier_calls(tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path / "c", [300, 300, 300])
    with monkeypatch.context() as interrupted:
        interrupted.setattr(preparation, "_finish", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare([corpus], tmp_path / "d")
    before = names_in(tmp_path / "d")
    with monkeypatch.context() as unreadable:
        unreadable.setattr("tttjax.data.documents.open_stream", _not_permitted)
        with pytest.raises(UserError, match="Cannot read"):
            prepare([corpus], tmp_path / "d")
    assert names_in(tmp_path / "d") == before
    assert prepare([corpus], tmp_path / "d").splits.keys() == {"train", "val"}


def _not_permitted(path):
    raise PermissionError(errno.EACCES, "Permission denied", path)


def test_changed_input_is_noticed(tmp_path):
    corpus = write_corpus(tmp_path / "c", [300, 300])
    prepare([corpus], tmp_path / "d")
    (corpus / "doc000.txt").write_text("something else")
    with pytest.raises(UserError, match="other content of its input files"):
        prepare([corpus], tmp_path / "d")


def test_one_process_at_a_time_prepares_a_folder(corpus, tmp_path):
    out = tmp_path / "d"
    with hold(out):
        for overwrite in (False, True):
            with pytest.raises(UserError, match="d is being written by another command"):
                prepare([corpus], out, overwrite=overwrite)
    assert not out.exists()
    prepare([corpus], out)
    with hold(out):  # a finished data set needs no lock
        assert prepare([corpus], out).folder == out
        with pytest.raises(UserError, match="is being written"):
            prepare([corpus], out, seed=1, overwrite=True)
    assert prepare([corpus], out, seed=1, overwrite=True).manifest["settings"]["seed"] == 1
    assert FOLDER_LOCK not in names_in(out)
    assert names_in(tmp_path) == ["d"]


def test_unrelated_folders_stay(corpus, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="is not empty and has no prepared data"):
        prepare([corpus], tmp_path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="is a file"):
        prepare([corpus], tmp_path / "thesis.tex")


def test_bad_text_leaves_nothing_behind(tmp_path):
    corpus = write_corpus(tmp_path / "c", [300, 300])
    (corpus / "doc999.txt").write_bytes(b"\xff\xfe\x00")
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"doc999\.txt is not UTF-8"):
            prepare([corpus], tmp_path / "d", num_workers=workers)
        assert not (tmp_path / "d").exists()
    with pytest.raises(UserError, match="No document is left at all: 0 were empty, 2 shorter than"):
        prepare([corpus], tmp_path / "d", pattern="doc00*", min_document_tokens=5000)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"min_document_tokens": -1}, "min_document_tokens=-1"),
        ({"num_workers": -2}, "num_workers=-2"),
        ({"tokenizer": "gpt9"}, "Tokenizer 'gpt9' is unknown"),
    ],
)
def test_bad_settings(corpus, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        prepare([corpus], tmp_path / "d", **settings)
    assert not (tmp_path / "d").exists()


KILLED = textwrap.dedent(
    """
    import os, signal, sys
    from tttjax.data import encode, prepare_pass
    from tttjax.data.preparation import prepare

    encode._TASK_BYTES, prepare_pass.JOURNAL_SECONDS = 2000, 0.0
    record, remaining = prepare_pass.PreparePass._record, [int(sys.argv[3])]

    def record_and_die(self, *args):
        if remaining[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)  # with documents on disk that no journal knows
        record(self, *args)
        remaining[0] -= 1

    prepare_pass.PreparePass._record = record_and_die
    prepare([sys.argv[1]], sys.argv[2], shard_tokens=9000, num_workers=0)
    """
)


@pytest.mark.parametrize("kills", [(0,), (3, 7, 1)])
def test_killed_and_run_again(corpus, tmp_path, monkeypatch, kills):
    out = tmp_path / "killed"
    for journals in kills:
        child = subprocess.run(
            [sys.executable, "-c", KILLED, str(corpus), str(out), str(journals)], timeout=60
        )
        assert child.returncode == -9
        with pytest.raises(UserError, match="is half prepared"):
            open_prepared(out)
    journal = json.loads((out / "prepare.journal").read_text())
    assert journal.get("tasks", 0) == sum(kills)
    with pytest.raises(UserError, match=r"is half prepared with other seed \(0\)"):
        prepare([corpus], out, seed=5)
    monkeypatch.setattr("tttjax.data.encode._TASK_BYTES", 2000)
    again = prepare([corpus], out, shard_tokens=9000, num_workers=0)
    whole = prepare([corpus], tmp_path / "whole", shard_tokens=9000, num_workers=0)
    assert same_files(again.folder, whole.folder)
    assert again.manifest == whole.manifest


def test_no_space_left(corpus, tmp_path, monkeypatch):
    out = tmp_path / "full"
    monkeypatch.setattr("tttjax.data.encode._TASK_BYTES", 2000)
    monkeypatch.setattr(prepare_pass, "JOURNAL_SECONDS", 0.0)
    write, capacity = writer._ShardFiles.write, [100]

    def write_until_full(self, part, content):
        capacity[0] -= 1
        if capacity[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, part, content)

    with monkeypatch.context() as full:
        full.setattr(writer._ShardFiles, "write", write_until_full)
        with pytest.raises(UserError, match=r"No space left for .*full; free some and run"):
            prepare([corpus], out, num_workers=0)
    assert not (out / "manifest.json").exists()
    assert not list(out.rglob("*.tmp"))
    again = prepare([corpus], out, num_workers=0)
    whole = prepare([corpus], tmp_path / "whole", num_workers=0)
    assert same_files(again.folder, whole.folder)
    with monkeypatch.context() as full:
        full.setattr(prepared_folder, "write_json", _disk_full)
        with pytest.raises(UserError, match="No space left"):
            prepare([corpus], tmp_path / "new", num_workers=0)
    assert not (tmp_path / "new").exists()


def _disk_full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_eos_of_a_tokenizer_without_one(corpus, tmp_path):
    tokenizer = hf.Tokenizer(hf.models.WordLevel({"<s>": 0, "a": 1}, "a"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    options = {"tokenizer": str(tmp_path / "tokenizer.json"), "add_eos": True}
    with pytest.raises(UserError, match="has no EOS; give its id with --eos-id"):
        prepare([corpus], tmp_path / "d", **options)
    data = prepare([corpus], tmp_path / "d", eos_id=1, **options)
    assert data.split("train").read(0, 1).tolist() == [0]


def test_command_line(corpus, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    out = str(tmp_path / "d")
    arguments = [str(corpus), f"--out={out}", "--eos", "--no-bos", "--min-document-tokens=100"]
    assert command.run(parser.parse_args(arguments)) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out}\n"
    assert "100% of the input" in captured.err
    settings = open_prepared(out).manifest["settings"]
    assert (settings["add_bos"], settings["add_eos"]) == (False, True)
    assert settings["min_document_tokens"] == 100
    assert command.run(parser.parse_args(["--check", out])) == 0
    assert "all 6 checksums match" in capsys.readouterr().out
    with pytest.raises(UserError, match="--out=DIR"):
        command.run(parser.parse_args([str(corpus)]))


def test_single_json_documents_of_folders_are_left_out(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.txt").write_text("text " * 9)
    (tmp_path / "c" / "b.json").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "c" / "package.json").write_text('{\n  "name": "c"\n}\n')
    lines = []
    data = prepare([tmp_path / "c"], tmp_path / "d", num_workers=0, log=lines.append)
    assert sum(entry["documents"] for entry in data.splits.values()) == 3
    assert any("1 .json files" in line and "package.json" in line for line in lines)
    for inputs, settings in (
        ([tmp_path / "c" / "package.json"], {}),
        ([tmp_path / "c"], {"pattern": "*.json"}),
        ([tmp_path / "c" / "a.txt", tmp_path / "c" / "package.json"], {}),
    ):
        with pytest.raises(UserError, match=r"package\.json is one JSON document, not JSON lines"):
            prepare(inputs, tmp_path / "e", num_workers=0, **settings)
        assert not (tmp_path / "e").exists()


def test_the_text_key_is_part_of_the_settings(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n{"body": "three"}\n')
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    arguments = [str(tmp_path / "a.jsonl"), f"--out={tmp_path / 'd'}", "--num-workers=0"]
    with pytest.raises(UserError, match=r'keys with text: "body"\); name one with --text-key'):
        command.run(parser.parse_args(arguments))
    assert command.run(parser.parse_args([*arguments, "--text-key=body"])) == 0
    data = open_prepared(tmp_path / "d")
    assert sum(entry["bytes"] for entry in data.splits.values()) == len("onethree")
    with pytest.raises(UserError, match=r"prepared with other text_key \('body'\)"):
        command.run(parser.parse_args(arguments))
    with pytest.raises(UserError, match="text_key is empty"):
        command.run(parser.parse_args([*arguments, "--text-key="]))


def test_data_older_than_a_setting_are_found_finished(corpus, tmp_path):
    prepare([corpus], tmp_path / "d", num_workers=0)
    path = tmp_path / "d" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["settings"]["text_key"], manifest[SEAL]
    path.write_text(json.dumps(manifest | {"version": 1}))
    lines = []
    prepare([corpus], tmp_path / "d", num_workers=0, log=lines.append)
    assert any("already prepared" in line for line in lines)


def test_journal_of_an_earlier_version_is_not_continued(corpus, tmp_path):
    out = tmp_path / "d"
    prepare([corpus], out, num_workers=0)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").unlink()
    journal = {name: manifest[name] for name in ("settings", "inputs")}
    # Earlier journals have no checksum.
    (out / JOURNAL).write_text(json.dumps({**journal, "tasks": 1}))
    with pytest.raises(UserError, match="by an earlier version"):
        prepare([corpus], out, num_workers=0)
    assert prepare([corpus], out, num_workers=0, overwrite=True).splits


def test_parquet_goes_on_after_a_kill(tmp_path, monkeypatch):
    table = pyarrow.table({"text": [f"document {i} " * 9 for i in range(300)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=50)
    monkeypatch.setattr("tttjax.data.encode._TASK_BYTES", 2000)
    monkeypatch.setattr(prepare_pass, "JOURNAL_SECONDS", 0.0)
    whole = prepare([tmp_path / "a.parquet"], tmp_path / "whole", num_workers=0)
    assert sum(entry["documents"] for entry in whole.splits.values()) == 300
    record, remaining = prepare_pass.PreparePass._record, [4]

    def record_and_stop(self, *args):
        record(self, *args)
        remaining[0] -= 1
        if not remaining[0]:
            raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(prepare_pass.PreparePass, "_record", record_and_stop)
        with pytest.raises(KeyboardInterrupt):
            prepare([tmp_path / "a.parquet"], tmp_path / "d", num_workers=0)
    assert json.loads((tmp_path / "d" / "prepare.journal").read_text())["tasks"] == 4
    again = prepare([tmp_path / "a.parquet"], tmp_path / "d", num_workers=0)
    assert same_files(again.folder, whole.folder)
