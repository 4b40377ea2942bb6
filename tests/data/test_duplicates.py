"""Duplicates are dropped the same way by any number of workers, spans, and after a kill."""

import json

import numpy as np
import pytest

from tttjax.data import documents, near_duplicates, preparation, prepare_pass
from tttjax.data.near_duplicates import bands, carried_words, merge, signature
from tttjax.data.preparation import prepare
from tttjax.errors import UserError

SETTINGS = {"num_workers": 0, "shard_tokens": 4000, "val_fraction": 0.3}


def words(count, seed):
    rng = np.random.default_rng(seed)
    return [f"w{n}" for n in rng.integers(0, 10_000, count)]


def variants(seed):
    """A text, a near duplicate (one word of 300 differs), and one that shares half of it."""
    text = words(300, seed)
    return text, [*text[:-1], "other"], [*text[:150], *words(150, seed + 1000)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Twenty texts, each followed somewhere by a copy, a near duplicate, and a half duplicate."""
    path = tmp_path_factory.mktemp("duplicates") / "a.jsonl"
    rows = []
    for seed in range(20):
        text, near, half = (" ".join(variant) for variant in variants(seed))
        rows += [(seed, "text", text), (seed, "copy", text), (seed, "near", near.upper())]
        rows += [(seed, "half", half)]
    order = np.random.default_rng(0).permutation(len(rows))
    with path.open("w") as file:
        for i in order:
            file.write(json.dumps({"text": rows[i][2]}) + "\n")
    return path, [rows[i][:2] for i in order]


def kept(data, rows):
    """(seed, kind) of the documents, in the order of the input."""
    numbers = sorted(
        int(name.rpartition(":")[2]) - 1
        for split in data.splits
        for name in data.split(split).document_names()
    )
    return [rows[number] for number in numbers]


def first_of(rows, *groups):
    """The rows without those whose group (kinds that count as one) came before."""
    seen, result = set(), []
    for seed, kind in rows:
        key = seed, next((group for group in groups if kind in group), kind)
        result += [(seed, kind)] * (key not in seen)
        seen.add(key)
    return result


@pytest.mark.parametrize(
    ("kind", "group", "count"), [("exact", "text copy", 20), ("near", "text copy near", 40)]
)
def test_the_first_of_duplicates_is_kept(corpus, tmp_path, kind, group, count):
    path, rows = corpus
    lines = []
    options = SETTINGS | {"drop_duplicates": kind}
    data = prepare([path], tmp_path / "d", log=lines.append, **options)
    assert kept(data, rows) == first_of(rows, tuple(group.split()))
    assert data.manifest["skipped"] == {"empty": 0, "short": 0, "duplicates": count}
    assert f"prepare: {count} documents repeat an earlier one, and are dropped" in lines
    assert not list(data.folder.glob("prepare.*"))
    assert sum(split["documents"] for split in data.splits.values()) == len(rows) - count
    if kind == "near":  # whose signatures workers compute
        again = prepare([path], tmp_path / "e", **options | {"num_workers": 2})
        assert again.manifest == data.manifest
    with pytest.raises(UserError, match=rf"other drop_duplicates \('{kind}'\)"):
        prepare([path], tmp_path / "d", **SETTINGS)


@pytest.mark.parametrize("kind", ["exact", "near"])
def test_an_interrupted_run_drops_the_same(corpus, tmp_path, monkeypatch, kind):
    path, _ = corpus
    options = SETTINGS | {"drop_duplicates": kind}
    monkeypatch.setattr("tttjax.data.encode._TASK_BYTES", 2000)
    monkeypatch.setattr(prepare_pass, "JOURNAL_SECONDS", 0.0)
    whole = prepare([path], tmp_path / "whole", **options)
    record, remaining = prepare_pass.PreparePass._record, [0]

    def record_and_stop(self, *args):
        if not remaining[0]:
            raise KeyboardInterrupt  # with documents and digests that no journal knows
        remaining[0] -= 1
        record(self, *args)

    for tasks in (0, 9, 11):
        remaining[0] = tasks
        with monkeypatch.context() as stopped:
            stopped.setattr(prepare_pass.PreparePass, "_record", record_and_stop)
            with pytest.raises(KeyboardInterrupt):
                prepare([path], tmp_path / "d", **options)
    assert json.loads((tmp_path / "d" / "prepare.journal").read_text())["tasks"] == 20
    again = prepare([path], tmp_path / "d", **options)
    assert again.manifest == whole.manifest
    assert not list(again.folder.glob("prepare.*"))
    with monkeypatch.context() as stopped:
        stopped.setattr(preparation, "_finish", _stop)
        with pytest.raises(KeyboardInterrupt):
            prepare([path], tmp_path / "f", **options)
    digests = tmp_path / "f" / "prepare.digests"
    digests.write_bytes(b"\0" * digests.stat().st_size)
    with pytest.raises(UserError, match=r"prepare\.digests has changed"):
        prepare([path], tmp_path / "f", **options)


def _stop(*args):
    raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["exact", "near"])
def test_conversations_are_compared(tmp_path, kind):
    answers = ("four of them", "not 5", "four of them")
    records = [{"prompt": "2 + 2?", "completion": answer} for answer in answers]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    options = {"chat": True, "val_fraction": 0, "num_workers": 0}
    data = prepare([path], tmp_path / "d", drop_duplicates=kind, **options)
    assert list(data.split("train").document_names()) == ["chats.jsonl:1", "chats.jsonl:2"]


@pytest.mark.parametrize("kind", ["exact", "near"])
def test_long_documents_count_as_a_whole(tmp_path, monkeypatch, kind):
    """Texts with an equal first span, of files that are read in spans, and of lines."""
    folder = tmp_path / "c"
    folder.mkdir()
    beginning = " ".join(words(6000, 1))
    texts = [f"{beginning} {' '.join(words(6000, seed))}" for seed in (2, 3, 4)]
    for i, text in enumerate((*texts, texts[1])):
        (folder / f"{i}.txt").write_text(text)
    (folder / "more.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts[1:]))
    whole = prepare([folder], tmp_path / "whole", drop_duplicates=kind, num_workers=0)
    monkeypatch.setattr(documents, "_BLOCK", 20_000)
    options = SETTINGS | {"drop_duplicates": kind, "shard_tokens": 100_000}
    data = prepare([folder], tmp_path / "d", **options)
    names = [name for split in data.splits for name in data.split(split).document_names()]
    assert sorted(names) == ["c/0.txt", "c/1.txt", "c/2.txt"]
    assert data.manifest["skipped"] == whole.manifest["skipped"]
    assert data.manifest["skipped"]["duplicates"] == 3
    for split in data.splits:  # nothing is left of those that were dropped
        tokens = data.split(split)
        for document in tokens.documents():
            text = data.tokenizer.decode(tokens.read(document.start, document.stop))
            assert text == texts[int(document.name[2])]


def test_the_only_document_of_a_shard_is_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_BLOCK", 20_000)
    text = " ".join(words(9000, 0))
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(text)
    inputs = [tmp_path / "a.txt", tmp_path / "b.txt"]
    options = {"drop_duplicates": "exact", "num_workers": 0, "shard_tokens": 100}
    data = prepare(inputs, tmp_path / "d", **options, val_fraction=0)
    assert [shard["documents"] for shard in data.splits["train"]["shards"]] == [1]
    assert len(list(data.folder.glob("*.tokens"))) == 1
    halves = prepare(inputs, tmp_path / "e", **options, val_fraction=0.25)  # as of one document
    assert {name: split["documents"] for name, split in halves.splits.items()} == {
        "train": 1,
        "val": 1,
    }
    assert halves.manifest["skipped"]["duplicates"] == 1


def test_short_documents_are_not_remembered(tmp_path):
    texts = [" ".join(words(n, 0)) for n in (100, 101, 102)]  # all near duplicates
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    options = {"num_workers": 0, "min_document_tokens": len(texts[1]) + 1}
    data = prepare([path], tmp_path / "d", drop_duplicates="near", val_fraction=0, **options)
    assert data.manifest["skipped"] == {"empty": 0, "short": 1, "duplicates": 1}
    assert next(data.split("train").document_names()) == "a.jsonl:2"


@pytest.mark.parametrize("seed", range(4))
def test_signatures_of_spans_make_that_of_the_text(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(near_duplicates, "_BATCH", 7)
    monkeypatch.setattr(near_duplicates, "_LONGEST", 9)
    pieces = [" ", "\n\n", "\u3000", "a", "Bé", "ΑΣ", "abcdefghijkl", "  "]
    text = "".join(rng.choice(pieces, 200))
    cuts = np.sort(rng.integers(0, len(text), 12 * seed))
    carried, merged = "", b""
    for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True):
        part = signature(carried, text[start:stop], stop == len(text))
        merged = merge(merged, part) if merged else part
        carried = carried_words(carried, text[start:stop])
        assert len(carried) <= 6 * 10
    assert merged == signature("", text, True)


def test_matches_follow_the_similarity():
    """The share of pairs that match is near 1 - (1 - s^8)^14."""
    for shared, low, high in ((0, 0, 0), (0.3, 0, 0.1), (0.75, 0.6, 0.92), (0.97, 0.99, 1)):
        matches = 0
        for seed in range(60):
            size = round(2 * 600 * shared / (1 + shared)) // 2  # shingles that both have
            both = words(size, seed)
            a, b = (both + words(300 - size, seed + shift) for shift in (1000, 2000))
            marks = [set(bands(signature("", " ".join(text), True))) for text in (a, b)]
            matches += not marks[0].isdisjoint(marks[1])
        assert low <= matches / 60 <= high


def test_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasketch", None)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"needs datasketch: .*\[dedup\]"):
        prepare([tmp_path / "a.txt"], tmp_path / "d", drop_duplicates="near")
    with pytest.raises(UserError, match="drop_duplicates=some must be exact or near"):
        prepare([tmp_path / "a.txt"], tmp_path / "d", drop_duplicates="some")
