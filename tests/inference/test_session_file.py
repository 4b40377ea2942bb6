"""Saved sessions continue bit-identically, and only with their own model."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from helpers.exhaustive import only
from helpers.inference import SYSTEMS, make_engine
from helpers.small import worst

from tttjax.errors import UserError
from tttjax.inference.session_file import load_session, read_header, save_session
from tttjax.inference.session_header import HEADER, parse_header
from tttjax.io.sealed import sealed

pytestmark = pytest.mark.slow

MODEL = "a" * 64


def same(a, b) -> bool:
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in leaves)


def session_of(engine, token, length=11):
    """Half prefilled, half decoded token by token."""
    session, _ = engine.read(engine.start(), token[0, : length - 5])
    batch = engine.start_batch([session])
    for t in token[0, length - 5 : length]:
        batch.step([int(t)])
    return batch.session(0)


@pytest.mark.parametrize("name", only(["ttt_e2e"], SYSTEMS))
def test_loaded_session_continues_bit_identically(tmp_path, name):
    engine, token = make_engine(name)
    session = session_of(engine, token)
    header = save_session(tmp_path / "s", engine, session, model=MODEL, tokenizer="t")
    assert header.lost == 0
    assert read_header(tmp_path / "s") == header
    loaded, _ = load_session(tmp_path / "s", engine, model=MODEL)
    assert loaded.tokens == session.tokens
    batches = [engine.start_batch([s]) for s in (session, loaded)]
    for t in token[0, 11:17]:
        for batch in batches:
            batch.step([int(t)])
        assert same(batches[0].logit_RV, batches[1].logit_RV)
    results = [batch.session(0) for batch in batches]
    assert same(results[0].learned.fast, results[1].learned.fast)


@pytest.mark.parametrize("name", SYSTEMS)
def test_empty_session_round_trip(tmp_path, name):
    engine, _ = make_engine(name)
    save_session(tmp_path / "s", engine, engine.start(), model=MODEL)
    loaded, header = load_session(tmp_path / "s", engine, model=MODEL)
    assert header.tokens == loaded.tokens == 0
    assert loaded.logit_V is None
    assert same(loaded.learned, engine.start().learned)
    assert same(loaded.now, engine.start().now)


def test_file_size_does_not_depend_on_text_length(tmp_path):
    engine, token = make_engine("ttt_e2e")
    sizes = []
    for length in (7, 11, 19):
        save_session(tmp_path / "s", engine, session_of(engine, token, length), model=MODEL)
        sizes.append((tmp_path / "s").stat().st_size)
    assert max(sizes) - min(sizes) < 64  # numbers in the header have more digits or fewer


def test_compressed_files_report_their_error(tmp_path):
    engine, token = make_engine("ttt_e2e")
    session = session_of(engine, token)
    fast = session.learned.fast
    drift = worst(fast, engine.start().learned.fast)
    header = save_session(tmp_path / "s", engine, session, model=MODEL, precision="bfloat16")
    loaded, _ = load_session(tmp_path / "s", engine, model=MODEL)
    error = worst(loaded.learned.fast, fast)
    assert 0 < error <= header.lost * sum(header.drift.values())
    assert error < 0.01 * drift
    assert not list(tmp_path.glob("*.tmp"))


def test_low_rank_files_of_earlier_versions_are_refused(tmp_path):
    engine, token = make_engine("ttt_e2e")
    header = save_session(tmp_path / "s", engine, session_of(engine, token), model=MODEL)
    values = sealed({**dataclasses.asdict(header), "rank": 2})
    with pytest.raises(UserError, match=r"low-rank.*the version that wrote it"):
        parse_header("s", {HEADER: json.dumps(values)})
    values = sealed({**dataclasses.asdict(header), "rank": 0})
    assert parse_header("s", {HEADER: json.dumps(values)}) == header


def test_bad_files_are_refused(tmp_path):
    engine, token = make_engine("ttt_e2e")
    path = tmp_path / "s"
    with pytest.raises(UserError, match="there is no session"):
        read_header(path)
    save_session(path, engine, session_of(engine, token), model=MODEL)
    with pytest.raises(UserError, match="session of another model"):
        load_session(path, engine, model="b" * 64)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="not a whole session file"):
        load_session(path, engine, model=MODEL)
    path.write_bytes(content.replace(b"tttjax-session-3", b"tttjax-session-9"))
    with pytest.raises(UserError, match=r"session-9.*this version reads tttjax-session-3"):
        read_header(path)
    with pytest.raises(UserError, match="choose float32 or bfloat16"):
        save_session(path, engine, session_of(engine, token), model=MODEL, precision="float16")
