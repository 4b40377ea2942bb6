"""Masked data: the answers of conversations survive preparation, and only they are learned."""

import json
import re
import shutil

import numpy as np
import pytest
from helpers.chat import CHATML, answers, chatml_tokenizer, write_chats

from tttjax.cli import main
from tttjax.data.file_checks import check_sums, crc32_of
from tttjax.data.held_out import eval_documents, eval_sequences
from tttjax.data.pipeline import StreamOptions, make_train_stream
from tttjax.data.preparation import prepare
from tttjax.data.records import document_records, stream_records
from tttjax.data.shards import MANIFEST, open_prepared, read_manifest
from tttjax.data.writer import EncodedSpan, SplitWriter
from tttjax.errors import UserError
from tttjax.io.sealed import SEAL, sealed


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chats")
    return folder / "chats.jsonl", write_chats(folder / "chats.jsonl", 40)


@pytest.fixture(scope="module")
def masked(chats, tmp_path_factory):
    """Bytes, several shards, about a third held out."""
    out = tmp_path_factory.mktemp("masked") / "data"
    return prepare([chats[0]], out, chat=True, val_fraction=0.3, shard_tokens=900, num_workers=0)


def targets_of(split, document):
    """The text of every run of targets of a document."""
    chosen = split.targets(document.start, document.stop)
    edges = np.flatnonzero(np.diff(chosen.astype(int), prepend=0, append=0)).reshape(-1, 2)
    return [split.read(document.start + a, document.start + b) for a, b in edges]


def check_answers(data, records):
    for name in data.splits:
        split = data.split(name)
        for document in split.documents():
            record = records[int(document.name.rpartition(":")[2]) - 1]
            texts = targets_of(split, document)
            assert [data.tokenizer.decode(t[:-1]) for t in texts] == answers(record)
            assert all(t[-1] == texts[0][-1] for t in texts)
        assert split.is_masked
        assert data.splits[name]["targets"] == split.targets(0, split.num_tokens).sum()


def test_the_targets_are_the_answers(chats, masked):
    check_answers(masked, chats[1])
    assert len(masked.splits["train"]["shards"]) > 1
    assert check_sums(masked.folder, masked.manifest) == 4 * sum(
        len(split["shards"]) for split in masked.splits.values()
    )


@pytest.mark.parametrize("kind", ["chatml", "sentencepiece"])
def test_workers_and_tokenizers_change_nothing(chats, tmp_path, kind):
    tokenizer = kind
    if kind == "chatml":
        chatml_tokenizer(tmp_path)
        tokenizer = str(tmp_path / "tokenizer.json")
    options = {"tokenizer": tokenizer, "vocab_size": 300, "chat": True, "shard_tokens": 500}
    data = prepare([chats[0]], tmp_path / "a", num_workers=0, **options)
    check_answers(data, chats[1])
    if kind == "chatml":
        again = prepare([chats[0]], tmp_path / "b", num_workers=2, **options)
        assert again.manifest["splits"] == data.manifest["splits"]
        # The tokenizer of a data set brings its template along.
        options["tokenizer"] = str(data.folder)
        third = prepare([chats[0]], tmp_path / "c", num_workers=0, **options)
        assert third.manifest["splits"] == data.manifest["splits"]
        (data.folder / "tokenizer" / "chat_template.jinja").write_text(CHATML + "\n")
        with pytest.raises(UserError, match="was prepared with other content"):
            prepare([chats[0]], tmp_path / "c", num_workers=0, **options)


def test_reading_targets_across_shards(masked):
    split = masked.split("train")
    whole = split.targets(0, split.num_tokens)
    assert 0 < whole.sum() < len(whole)
    rng = np.random.default_rng(0)
    ranges = np.sort(rng.integers(0, split.num_tokens + 1, (300, 2)), axis=1)
    for start, stop in ranges:
        np.testing.assert_array_equal(split.targets(start, stop), whole[start:stop])
    expected = [whole[start:stop].any() for start, stop in ranges]
    np.testing.assert_array_equal(split.has_targets(*ranges.T), expected)


def test_writing_resumes_with_targets(tmp_path):
    """An interrupted writer goes on from its state as if it had never stopped."""
    rng = np.random.default_rng(0)
    spans = [
        EncodedSpan(str(i), rng.integers(0, 9, 20), 20, targets=rng.random(20) < 0.4)
        for i in range(9)
    ]

    def make(folder, state=None):
        return SplitWriter(
            folder,
            "train",
            np.dtype("<u2"),
            shard_tokens=70,
            bos=7,
            is_masked=True,
            state=state,
        )

    (tmp_path / "a").mkdir()
    whole = make(tmp_path / "a")
    for span in spans:
        whole.append(span)
    expected = whole.finish()
    first = make(tmp_path / "a")
    for span in spans[:5]:
        first.append(span)
    state = json.loads(json.dumps(first.state()))
    first.append(spans[5])
    first.abandon()
    second = make(tmp_path / "a", state)
    for span in spans[5:]:
        second.append(span)
    assert second.finish() == expected
    assert expected["targets"] == sum(span.targets.sum() for span in spans)


def test_records_without_targets_are_left_out(masked):
    split = masked.split("train")
    whole = split.targets(0, split.num_tokens)
    records = stream_records(split, 8)
    assert 0 < len(records) < (split.num_tokens - 1) // 8
    assert all(records[i].targets_S[1:].any() for i in range(len(records)))
    total = sum(records[i].targets_S[1:].sum() for i in range(len(records)))
    assert total == whole[1 : (split.num_tokens - 1) // 8 * 8 + 1].sum()
    documents = document_records(split, 16)
    assert all(documents[i].targets_S[1:].any() for i in range(len(documents)))
    assert sum(documents[i].targets_S[1:].sum() for i in range(len(documents))) == whole.sum()


@pytest.mark.parametrize("make_records", [stream_records, document_records])
def test_a_split_without_targets_is_refused(masked, monkeypatch, make_records):
    split = masked.split("train")
    monkeypatch.setattr(split, "has_targets", lambda starts, stops: np.zeros(len(starts), bool))
    with pytest.raises(UserError, match="has a target; prepare more conversations"):
        make_records(split, 16)


@pytest.mark.parametrize("layout", ["stream", "documents"])
def test_weights_of_batches_are_the_targets(masked, layout):
    stream = make_train_stream(
        [masked], StreamOptions(seq_len=16, batch_size=4, layout=layout), prefetch=0
    )
    end, colon = masked.tokenizer.eos_id, ord(":")
    seen = 0
    for step in range(20):
        batch = stream.batch_at(step)
        assert batch.weight.dtype == bool
        assert not (batch.weight & ~batch.mask).any()
        assert batch.weight.any(axis=1).all()
        assert not np.isin(batch.targets[batch.weight], [colon, masked.tokenizer.bos_id]).any()
        ends = (batch.targets == end) & batch.mask
        assert batch.weight[ends].all()
        seen += ends.sum()
    assert seen


def test_without_a_mask_all_tokens_of_a_mixture_are_targets(masked, prepared):
    options = StreamOptions(seq_len=16, batch_size=4, weights=(1.0, 1.0))
    stream = make_train_stream([masked, prepared], options, prefetch=0)
    batches = [stream.batch_at(step) for step in range(10)]
    full = np.concatenate([(b.weight == b.mask).all(axis=1) for b in batches])
    assert 0.3 < full.mean() < 0.7
    alone = make_train_stream([prepared], StreamOptions(seq_len=16, batch_size=4), prefetch=0)
    assert alone.batch_at(0).weight is None


def test_other_targets_are_other_data(masked, chats, tmp_path):
    """A checkpoint's batches do not go on with the same tokens under another mask."""
    record = masked.manifest["splits"]["train"]["shards"][0]["files"]["targets"]
    before = masked.content_id("train")
    changed = json.loads(json.dumps(masked.manifest))
    changed["splits"]["train"]["shards"][0]["files"]["targets"]["crc32"] = record["crc32"] ^ 1
    assert type(masked)(masked.folder, changed, masked.tokenizer).content_id("train") != before


def test_held_out_losses_are_of_the_targets(masked):
    split = masked.split("val")
    held_out = eval_sequences(masked, length=52, num=6)
    scored, batch = held_out.scored(), held_out.batch()
    assert batch.weight is None
    assert 0 < scored.sum() < batch.mask.sum()
    starts, _ = split.document_bounds()
    for i in range(len(held_out)):
        first = starts[held_out.document[i]] + held_out.offset[i]
        np.testing.assert_array_equal(scored[i], split.targets(first + 1, first + 53))
    sizes = held_out.target_bytes(masked.tokenizer.token_bytes())
    assert sizes.sum() == scored.sum() - (batch.targets[scored] == masked.tokenizer.eos_id).sum()
    padded = eval_documents(masked, max_length=400)
    assert padded.scored().sum() == split.targets(0, split.num_tokens).sum()
    with pytest.raises(UserError, match=r"No token of the sequences .* is a target"):
        eval_sequences(masked, length=4, num=1)


@pytest.fixture
def copy(masked, tmp_path):
    return shutil.copytree(masked.folder, tmp_path / "copy")


def rewrite(folder, change):
    manifest = read_manifest(folder)
    manifest.pop(SEAL, None)
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(sealed(manifest)))


def test_damaged_targets_are_refused(copy):
    path = copy / "train-00000.targets"
    content = path.read_bytes()
    path.write_bytes(content[:-8])
    with pytest.raises(UserError, match=r"train-00000\.targets is truncated"):
        open_prepared(copy, verify=False)
    path.write_bytes(content[:-1] + b"\1")
    with pytest.raises(UserError, match=r"train-00000\.targets is corrupt"):
        open_prepared(copy)
    path.unlink()
    with pytest.raises(UserError, match=r"train-00000\.targets is missing"):
        open_prepared(copy)
    for swapped, problem in ((slice(None, None, -1), "out of order"), (slice(1, None), "marks")):
        spans = np.frombuffer(content, "<i8").reshape(-1, 2)[swapped]
        path.write_bytes(spans.tobytes())
        entry = {"size": path.stat().st_size, "crc32": crc32_of(path)}
        rewrite(
            copy, lambda m, e=entry: m["splits"]["train"]["shards"][0]["files"].update(targets=e)
        )
        with pytest.raises(UserError, match=f"train-00000.targets .*{problem}"):
            open_prepared(copy)


def test_a_masked_data_set_does_not_pass_for_another(copy, prepared):
    rewrite(copy, lambda m: m.update(version=4))
    with pytest.raises(UserError, match="format version 4, but this tttjax reads 1 to 3"):
        open_prepared(copy)
    assert prepared.manifest["version"] == 2
    assert "targets" not in prepared.splits["train"]


def test_another_chat_template_than_that_of_the_data_is_refused(copy):
    rewrite(copy, lambda m: m["tokenizer"].update(chat_template_crc32=1))
    with pytest.raises(UserError, match=r"chat template in .* is not the one that made the data"):
        open_prepared(copy)


def test_the_end_of_a_single_conversation_is_held_out_with_its_targets(tmp_path):
    records = write_chats(tmp_path / "one.jsonl", 3)[2:]
    (tmp_path / "one.jsonl").write_text(json.dumps(records[0]) + "\n")
    data = prepare([tmp_path / "one.jsonl"], tmp_path / "d", chat=True, num_workers=0)
    counts = {name: split["targets"] for name, split in data.splits.items()}
    assert sum(counts.values()) == sum(len(answer) + 1 for answer in answers(records[0]))
    assert counts["val"] > 0


@pytest.mark.parametrize(
    ("name", "content", "flags", "sentence"),
    [
        ("a.jsonl", '{"text": "x"}\n', [], r"a\.jsonl, line 1: a conversation needs the key"),
        ("a.jsonl", '\n{"messages": 3\n', [], r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", '{"prompt": "x", "prompt": "y"}\n', [], r'the key "prompt" occurs twice'),
        ("a.txt", "User: hi\n", [], "a.txt is text, and conversations are read from JSON lines"),
        ("a.json", "[\n]", [], "is one JSON document, not JSON lines"),
        ("a.jsonl", '{"prompt": "x", "completion": "y"}\n', ["--eos"], "do not apply to conv"),
        ("a.jsonl", '{"prompt": "x", "completion": "y"}\n', ["--text-key=a"], "do not apply to"),
        (
            "a.jsonl",
            '{"prompt": "x", "completion": "y"}\n',
            ["--tokenizer=ids"],
            "neither a chat template nor an EOS",
        ),
    ],
)
def test_what_is_no_conversation_is_one_sentence(tmp_path, capsys, name, content, flags, sentence):
    (tmp_path / name).write_text(content)
    out = tmp_path / "out"
    code = main.main(["prepare", str(tmp_path / name), f"--out={out}", "--chat", *flags])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2
    assert re.search(sentence, error)
    assert not out.exists() or not any(out.iterdir())
