"""Batches are a function of (seed, step): resuming, epochs, processes, mixtures, layouts."""

import json

import numpy as np
import pytest
import tokenizers

from tttjax.data.held_out import eval_documents
from tttjax.data.pipeline import StreamOptions, make_batch, make_train_stream
from tttjax.data.preparation import prepare
from tttjax.data.records import PADDING, document_records, stream_records
from tttjax.errors import UserError

T = 64
OPTIONS = StreamOptions(seq_len=T, batch_size=4, seed=3)


def take(stream, count):
    return [next(stream) for _ in range(count)]


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        np.testing.assert_array_equal(batch.inputs, other.inputs)
        np.testing.assert_array_equal(batch.targets, other.targets)
        np.testing.assert_array_equal(batch.mask, other.mask)


def epoch_steps(data, options=OPTIONS):
    return len(stream_records(data.split("train"), options.seq_len)) // options.batch_size


def test_stream_records_are_slices_of_the_stream(prepared):
    split = prepared.split("train")
    records = stream_records(split, T)
    tokens = split.read(0, split.num_tokens)
    assert len(records) == (split.num_tokens - 1) // T
    for i in range(len(records)):
        np.testing.assert_array_equal(records[i].tokens_S, tokens[i * T : (i + 1) * T + 1])


def test_batches_shift_and_mask(prepared):
    stream = make_train_stream([prepared], OPTIONS)
    for batch in take(stream, 5):
        assert batch.inputs.shape == batch.targets.shape == batch.mask.shape == (4, T)
        assert (batch.inputs.dtype, batch.mask.dtype) == (np.int32, np.bool_)
        np.testing.assert_array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])
        np.testing.assert_array_equal(batch.mask, batch.targets != prepared.tokenizer.bos_id)
    stream.close()


def test_make_batch_by_hand():
    tokens_BS = np.array([[9, 1, 2, 9, 3], [9, 4, 5, PADDING, PADDING]])
    exclude_BS = np.array([[1, 0, 0, 1, 0], [1, 0, 0, 0, 0]], bool)
    batch = make_batch(tokens_BS, exclude_BS, 7)
    assert batch.inputs.tolist() == [[9, 1, 2, 9], [9, 4, 5, 7]]
    assert batch.targets.tolist() == [[1, 2, 9, 3], [4, 5, 7, 7]]
    assert batch.mask.tolist() == [[True, True, False, True], [True, True, False, False]]


def test_epoch_is_permutation_and_next_another(prepared):
    steps = epoch_steps(prepared)
    stream = make_train_stream([prepared], OPTIONS)
    first, second = take(stream, steps), take(stream, steps)
    stream.close()
    rows = [tuple(row) for batch in first for row in batch.inputs]
    assert len(set(rows)) == len(rows) == 4 * steps
    assert rows != [tuple(row) for batch in second for row in batch.inputs]
    unshuffled = StreamOptions(seq_len=T, batch_size=4, shuffle=False)
    stream = make_train_stream([prepared], unshuffled)
    assert_same(take(stream, steps), [stream.batch_at(steps + i) for i in range(steps)])
    stream.close()


def test_seeds_differ_and_repeat(prepared):
    streams = [
        make_train_stream([prepared], StreamOptions(seq_len=T, batch_size=4, seed=seed))
        for seed in (0, 0, 1)
    ]
    one, again, other = (take(stream, 6) for stream in streams)
    assert_same(one, again)
    assert any((a.inputs != b.inputs).any() for a, b in zip(one, other, strict=True))
    for stream in streams:
        stream.close()


@pytest.mark.parametrize("layout", ["stream", "documents"])
@pytest.mark.parametrize("prefetch", [0, 4])
def test_two_resumes_across_an_epochs_end(prepared, layout, prefetch):
    options = StreamOptions(seq_len=T, batch_size=4, layout=layout)
    total = 3 * epoch_steps(prepared) + 5
    stream = make_train_stream([prepared], options)
    whole = take(stream, total)
    stream.close()
    result, state = [], None
    for count in (epoch_steps(prepared) - 2, 7, total - epoch_steps(prepared) - 5):
        stream = make_train_stream([prepared.folder], options, prefetch=prefetch)
        if state is not None:
            stream.set_state(json.loads(json.dumps(state)))
        result += take(stream, count)
        state = stream.get_state()
        stream.close()
    assert_same(result, whole)
    assert state["step"] == total


def test_random_access_by_step(prepared):
    stream = make_train_stream([prepared], OPTIONS)
    whole = take(stream, 20)
    for step in (13, 2, 19):
        stream.set_state({**stream.get_state(), "step": step})
        assert_same([next(stream)], [whole[step]])
        assert_same([stream.batch_at(step)], [whole[step]])
        assert stream.step == step + 1
    stream.close()


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_single_process_batch(prepared, count):
    steps = 2 * epoch_steps(prepared) + 1
    stream = make_train_stream([prepared], OPTIONS)
    whole = take(stream, steps)
    streams = [
        make_train_stream([prepared], OPTIONS, process_index=p, process_count=count)
        for p in range(count)
    ]
    for batch in whole:
        parts = [next(local) for local in streams]
        np.testing.assert_array_equal(np.concatenate([p.inputs for p in parts]), batch.inputs)
        np.testing.assert_array_equal(np.concatenate([p.mask for p in parts]), batch.mask)
    # A checkpoint of one process count continues on another.
    streams[0].set_state(stream.get_state())
    assert next(streams[0]).inputs.tolist() == next(stream).inputs[: 4 // count].tolist()
    for each in (stream, *streams):
        each.close()


def test_documents_are_never_mixed(prepared):
    split = prepared.split("train")
    records = document_records(split, T)
    tokens, bos = split.read(0, split.num_tokens), prepared.tokenizer.bos_id
    expected = []
    for document in split.documents():
        for start in range(document.start, document.stop - 1, T):
            span = tokens[start : min(start + T + 1, document.stop)]
            expected.append(np.pad(span, (0, T + 1 - len(span)), constant_values=PADDING))
    np.testing.assert_array_equal([records[i].tokens_S for i in range(len(records))], expected)
    assert (np.stack(expected)[:, 1:] != bos).all()
    long = document_records(split, T, min_length=T)
    assert len(long) == sum(PADDING not in record for record in np.array(expected))
    assert all(PADDING not in long[i].tokens_S for i in range(len(long)))


@pytest.fixture(scope="module")
def bos_is_eos(tmp_path_factory):
    """Documents of a tokenizer whose BOS is its EOS, in several shards."""
    folder = tmp_path_factory.mktemp("same")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, [])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "texts").mkdir()
    for i, size in enumerate((3, 30, 1, 64, 17, 5)):
        (folder / "texts" / f"{i}.txt").write_text("abcdefgh"[i] * size)
    options = {"tokenizer": str(folder / "tokenizer.json"), "num_workers": 0, "val_fraction": 0.0}
    return prepare(
        [folder / "texts"], folder / "data", add_eos=True, shard_tokens=30, **options
    ), prepare([folder / "texts"], folder / "bare", add_bos=False, add_eos=True, **options)


@pytest.mark.parametrize("layout", ["stream", "documents"])
def test_eos_is_trained_on_where_it_is_bos(bos_is_eos, layout):
    data, _ = bos_is_eos
    assert data.tokenizer.bos_id == data.tokenizer.eos_id == 256
    assert len(data.manifest["splits"]["train"]["shards"]) > 1
    split = data.split("train")
    starts, stops = split.document_bounds()
    stream = make_train_stream(
        [data], StreamOptions(seq_len=1, batch_size=1, shuffle=False), prefetch=0
    )
    # One target a record: target i is token i + 1 of the stream.
    mask = [bool(stream.batch_at(i).mask.item()) for i in range(split.num_tokens - 1)]
    assert [i + 1 for i, counts in enumerate(mask) if not counts] == starts[1:].tolist()
    size = 8
    options = StreamOptions(seq_len=size, batch_size=1, shuffle=False, layout=layout)
    stream = make_train_stream([data], options, prefetch=0)
    if layout == "documents":
        records = document_records(split, size)
        ends = sum(int(stop in stops) for stop in records.stops)
        assert ends == len(stops)
        count = len(records)
    else:
        count = len(stream_records(split, size))
        ends = int((stops <= count * size + 1).sum())
    batches = [stream.batch_at(i) for i in range(count)]
    trained = sum(int(((batch.targets == 256) & batch.mask).sum()) for batch in batches)
    assert trained == ends
    assert (
        eval_documents(data, max_length=99, split="train").batch().mask.sum()
        == (stops - starts - 1).sum()
    )


def test_without_bos_every_eos_is_a_target(bos_is_eos):
    _, data = bos_is_eos
    stream = make_train_stream([data], StreamOptions(seq_len=8, batch_size=1), prefetch=0)
    assert stream.batch_at(0).mask.all()
    assert (stream.batch_at(0).targets == 256).sum() + (stream.batch_at(1).targets == 256).sum() > 0


def test_document_starts_of_any_range(bos_is_eos):
    for data in bos_is_eos:
        split = data.split("train")
        starts, _ = split.document_bounds()
        for first in range(split.num_tokens):
            for last in range(first, split.num_tokens + 1):
                inside = starts[(starts >= first) & (starts < last)]
                assert split.document_starts(first, last).tolist() == inside.tolist()


def test_a_corpus_of_short_documents_is_refused(prepared):
    split = prepared.split("train")
    longest = max(document.stop - document.start for document in split.documents())
    records = document_records(split, longest - 1)
    assert sum(PADDING not in records[i].tokens_S for i in range(len(records))) == 1
    with pytest.raises(UserError, match=rf"has {longest} tokens, fewer .* of {longest} \+ 1; "):
        document_records(split, longest)


def test_padding_is_masked_and_valid(prepared):
    stream = make_train_stream(
        [prepared], StreamOptions(seq_len=T, batch_size=4, layout="documents")
    )
    batches = take(stream, 20)
    stream.close()
    assert any(not batch.mask.all() for batch in batches)
    for batch in batches:
        assert batch.inputs.min() >= 0
        assert batch.inputs.max() < prepared.tokenizer.vocab_size
        # padding only at the end
        assert (np.diff(batch.mask.astype(int), axis=1) <= 0).all()


def test_mixture_keeps_its_proportions_and_resumes(tmp_path):
    sources = []
    for letter in ("a", "b"):
        folder = tmp_path / letter
        folder.mkdir()
        (folder / "long.txt").write_text(letter * 9000)
        (folder / "other.txt").write_text(letter * 9000)
        sources.append(prepare([folder], tmp_path / f"{letter}_data", val_fraction=0.01))
    options = StreamOptions(seq_len=T, batch_size=4, weights=(3.0, 1.0))
    stream = make_train_stream(sources, options)
    whole = take(stream, 100)
    letters = np.concatenate([batch.inputs[:, 1] for batch in whole])
    assert (letters == ord("a")).mean() == pytest.approx(0.75, abs=0.01)
    stream.set_state({**stream.get_state(), "step": 40})
    assert_same(take(stream, 60), whole[40:])
    stream.close()
    one_each = StreamOptions(seq_len=T, batch_size=1, weights=(1.0, 1.0))
    stream = make_train_stream(sources, one_each)
    assert {int(next(stream).inputs[0, 1]) for _ in range(4)} == {ord("a"), ord("b")}
    stream.close()


def test_bad_options_are_refused(prepared, corpus, tmp_path):
    def make(sources=(prepared,), process_count=1, **options):
        options = {"seq_len": T, "batch_size": 4} | options
        return make_train_stream(sources, StreamOptions(**options), process_count=process_count)

    with pytest.raises(UserError, match="fewer than one sequence of 100000"):
        make(seq_len=100_000)
    with pytest.raises(UserError, match="fewer than one batch of 100000"):
        make(batch_size=100_000)
    with pytest.raises(UserError, match="batch of 4 sequences cannot be divided among 3"):
        make(process_count=3)
    with pytest.raises(UserError, match=r"data\.layout='packed' is unknown"):
        make(layout="packed")
    with pytest.raises(UserError, match="No data"):
        make(sources=())
    with pytest.raises(UserError, match="2 entries for 1 sources"):
        make(weights=(1.0, 2.0))
    with pytest.raises(UserError, match="must all be above 0"):
        make(weights=(0.0,))
    with pytest.raises(UserError, match="min_length=65"):
        make(layout="documents", min_length=65)
    other = prepare([corpus], tmp_path / "d", tokenizer="sentencepiece", vocab_size=290)
    with pytest.raises(UserError, match="made by another tokenizer"):
        make(sources=(prepared, other))
    with pytest.raises(UserError, match="made by another tokenizer"):
        make_train_stream([prepared], OPTIONS, fingerprint=other.fingerprint)


def test_a_state_of_other_batches_is_refused(prepared):
    stream = make_train_stream([prepared], OPTIONS)
    other = make_train_stream([prepared], StreamOptions(seq_len=T, batch_size=8, seed=3))
    with pytest.raises(UserError, match=r"batch_size=8, this run has 4"):
        stream.set_state(other.get_state())
