"""Saves and loads sessions, each in one file.

The file is in the safetensors format; docs/generation.md lists its arrays. Its size is constant
except for full attention. A window of keys and values is stored as its rows at the last update plus
the rows since; full attention as the rows in use. Fast weights are stored exactly, so that
continuing from the file is bit-identical; or smaller, as the difference from W0 in bfloat16, with
the error measured and reported.

A file belongs to one model: its fingerprint covers the configuration of the network and the inner
loop, and a sample of every weight.

The header has a checksum and holds the checksum of all arrays. Values that are not finite are
neither written nor read. Files of the previous format, "tttjax-session-2", have no checksums: their
shapes, types and counts are compared with the model's.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from tttjax.config import Config
from tttjax.config.fields import fingerprint_values
from tttjax.errors import UserError
from tttjax.inference.engine import Engine, Session
from tttjax.inference.options import PRECISIONS
from tttjax.inference.prefill import Context
from tttjax.inference.session_header import (
    FORMAT,
    SessionHeader,
    checksum,
    damaged,
    format_header,
    not_finite,
    parse_header,
)
from tttjax.io.atomic import atomic_write
from tttjax.io.paths import local_path
from tttjax.ttt.layer_norms import fast_layers, sequential_norms
from tttjax.types import Array, Params, PyTree

SAMPLE = 4096  # entries of each weight in the fingerprint
LOSSES = 256  # stored losses: those of the last chunks
# A field of the configuration in version 0.1.0, which sessions' fingerprints contain.
REMOVED = {"model": {"ttt_form": repr("dual")}, "inner": {}}


def fingerprint(config: Config, params: Params) -> str:
    """sha256 (hex) of a network's configuration, its inner loop, and a sample of every weight.

    Without fields that change no number, which a resumed run may change too.
    """
    digest = hashlib.sha256()
    for name, removed in REMOVED.items():
        rows = fingerprint_values(getattr(config, name))
        values = removed | {first_name: repr(value) for _, first_name, value in rows}
        digest.update(json.dumps(dict(sorted(values.items()))).encode())
    flat = flatten_dict({"slow": params.slow, "fast": params.fast}, sep="/")
    for path, weight in sorted(flat.items()):
        step = max(1, weight.size // SAMPLE)
        digest.update(path.encode())
        digest.update(np.asarray(weight.reshape(-1)[::step]).tobytes())
    return digest.hexdigest()


def save_session(
    path: str | os.PathLike,
    engine: Engine,
    session: Session,
    *,
    model: str,
    tokenizer: str = "",
    precision: str = "float32",
    chunk_losses: Sequence[float] = (),
    chunk_losses_after: Sequence[float | None] = (),
    source: Mapping[str, Any] | None = None,
) -> SessionHeader:
    """Writes the session to `path`, atomically.

    model: its `fingerprint`. precision: "float32" stores the fast weights exactly, "bfloat16" their
    difference from W0. Raises UserError for another precision, and for a session with values that
    are not finite.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision!r}: choose {' or '.join(PRECISIONS)}.")
    start = engine.start()
    arrays: dict[str, Any] = _states(engine, session)
    fast, drift, lost = _pack(session.learned.fast, start.learned.fast, precision)
    arrays |= fast
    for i, leaf in enumerate(jax.tree.leaves(session.learned.rule_state)):
        arrays[f"rule/{i}"] = leaf
    if session.logit_V is not None:
        arrays["logits"] = session.logit_V
    arrays |= {"pending": session.uncommitted, "counted": session.is_target.astype(np.uint8)}
    host = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    header = SessionHeader(
        format=FORMAT,
        model=model,
        tokenizer=tokenizer,
        tokens=session.tokens,
        pending=len(session.uncommitted),
        precision=precision,
        drift=drift,
        lost=lost,
        chunk_losses=list(chunk_losses)[-LOSSES:],
        source=dict(source or {}),
        layers=_layers(engine, session.learned.fast, start.learned.fast),
        chunk_losses_after=list(chunk_losses_after)[-LOSSES:],
        arrays=checksum(host),
    )
    if bad := not_finite(host, header):
        raise UserError(
            f"{path} is not written: after {session.tokens:,} tokens {bad} is not finite; use a "
            "lower inner.lr, or continue from an earlier session"
        )
    _write(local_path(path), host, format_header(header))
    return header


def read_header(path: str | os.PathLike) -> SessionHeader:
    """The header of a session file. UserError if the file is no session, or damaged."""
    with _open(path) as file:
        return parse_header(path, file.metadata())


def check_file(path: str | os.PathLike) -> None:
    """UserError if a session file is damaged. Needs no model: checks counts and checksums."""
    with _open(path) as file:
        header = parse_header(path, file.metadata())
        _check_content(path, _arrays(path, file), header)


def load_session(
    path: str | os.PathLike, engine: Engine, *, model: str, tokenizer: str = ""
) -> tuple[Session, SessionHeader]:
    """The session in a file, for the engine of the model that wrote it.

    Raises UserError for the session of another model or tokenizer, for one longer than
    `engine.max_length`, and for a damaged file.
    """
    with _open(path) as file:
        header = parse_header(path, file.metadata())
        if header.model != model:
            raise UserError(
                f"{path} is the session of another model (fingerprint {header.model[:12]}, this "
                f"one has {model[:12]}); open it with the model that wrote it."
            )
        if tokenizer and header.tokenizer and header.tokenizer != tokenizer:
            raise UserError(
                f"{path} is the session of another tokenizer (fingerprint {header.tokenizer[:12]}, "
                f"this one has {tokenizer[:12]}); give its tokenizer with --tokenizer=DIR"
            )
        engine.check((), header.tokens)
        arrays = _arrays(path, file)
    _check_content(path, arrays, header)
    _check_shapes(path, engine, arrays, header)
    return _session(engine, arrays, header), header


def _session(engine: Engine, arrays: Mapping[str, np.ndarray], header: SessionHeader) -> Session:
    start = engine.start()
    fast = _unpack(arrays, start.learned.fast)
    leaves, structure = jax.tree.flatten(start.learned.rule_state)
    rules = [jnp.asarray(arrays[f"rule/{i}"]) for i in range(len(leaves))]
    rule_state = jax.tree.unflatten(structure, rules)
    learned, now = _contexts(engine, start.learned, arrays, header)
    # Same shardings as after prefill, else functions would be compiled again.
    learned, now = (
        jax.tree.map(
            lambda x, like: jax.device_put(x, like.sharding),
            context._replace(fast=fast, rule_state=rule_state),
            start.learned,
        )
        for context in (learned, now)
    )
    logit_V = jnp.asarray(arrays["logits"]) if "logits" in arrays else None
    is_target = arrays["counted"].astype(bool)
    return Session(learned, now, arrays["pending"], is_target, header.tokens, logit_V)


# --- states -------------------------------------------------------------------------------------


PARTS = {"below": "parallel", "above": "sequential"}  # names in the file: fields of `Context`


def _rows(engine: Engine, *contexts: Context) -> Iterator[tuple[Any, ...]]:
    """(name in the file, its cache, the array of each context) of every array of the states."""
    split = engine.inference_model.chunk_model.split
    caches = {"below": split.parallel_caches, "above": split.sequential_caches}
    for part, field in PARTS.items():
        blocks = [getattr(context, field)["blocks"] for context in contexts]
        of_arrays = jax.tree.map(
            lambda cache, arrays: jax.tree.map(lambda _, cache=cache: cache, arrays),
            caches[part],
            blocks[0],
        )
        leaves = map(jax.tree.leaves, (of_arrays, *blocks))
        for i, (cache, *arrays) in enumerate(zip(*leaves, strict=True)):
            yield f"{part}/{i}", cache, *arrays


def _states(engine: Engine, session: Session) -> dict[str, Array]:
    """The arrays of both contexts, each row once."""
    arrays: dict[str, Array] = {}
    for name, cache, learned, now in _rows(engine, session.learned, session.now):
        stored = cache.to_store(learned, now, session.tokens, len(session.uncommitted))
        arrays |= {f"{name}{suffix}": array for suffix, array in stored.items()}
    return arrays


def _contexts(
    engine: Engine, start: Context, arrays: Mapping[str, np.ndarray], header: SessionHeader
) -> tuple[Context, Context]:
    """The contexts that `_states` came from, with the fast weights of `start`."""
    both: dict[str, tuple[list[Array], list[Array]]] = {part: ([], []) for part in PARTS}
    for name, cache, empty in _rows(engine, start):
        shapes = cache.stored_shapes(empty.shape, header.tokens, header.pending)
        stored = {suffix: jnp.asarray(arrays[f"{name}{suffix}"]) for suffix in shapes}
        pair = cache.from_store(stored, empty, header.tokens)
        for leaves, array in zip(both[name.split("/")[0]], pair, strict=True):
            leaves.append(array)
    contexts = []
    for which, position in enumerate((header.tokens - header.pending, header.tokens)):
        states = {}
        for part, field in PARTS.items():
            structure = jax.tree.structure(getattr(start, field)["blocks"])
            blocks = jax.tree.unflatten(structure, both[part][which])
            states[field] = {"position": jnp.asarray(position, jnp.int32), "blocks": blocks}
        contexts.append(start._replace(**states))
    return contexts[0], contexts[1]


# --- fast weights -------------------------------------------------------------------------------


def _pack(
    fast: PyTree, start: PyTree, precision: str
) -> tuple[dict[str, Array], dict[str, float], float]:
    """(arrays to store, drift by path, the largest relative error of a stored difference)."""
    arrays: dict[str, Array] = {}
    drift, lost = {}, 0.0
    zero = _flat(start)
    for path, weight in _flat(fast).items():
        change = weight - zero[path]
        size = float(jnp.linalg.norm(change))
        drift[path] = size
        if precision == "float32":
            arrays[f"fast/{path}"] = weight
            continue
        stored = arrays[f"change/{path}"] = change.astype(jnp.bfloat16)
        if size:
            error = change - stored.astype(change.dtype)
            lost = max(lost, float(jnp.linalg.norm(error)) / size)
    return arrays, drift, lost


def _layers(engine: Engine, fast: PyTree, start: PyTree) -> dict[str, list[float]]:
    """(||W - W0||, ||W0||) by layer, to seven digits."""
    split = engine.inference_model.chunk_model.split
    names = fast_layers(split.model)
    if not names:
        return {}
    drift = jax.tree.map(lambda a, b: (a - b)[0], fast, start)
    sizes = [sequential_norms(split, tree) for tree in (drift, jax.tree.map(lambda w: w[0], start))]
    rows = np.stack(sizes, axis=1).tolist()
    return {name: [float(f"{x:.7g}") for x in row] for name, row in zip(names, rows, strict=True)}


def _flat(tree: PyTree) -> dict[str, Any]:
    return flatten_dict(tree, sep="/")


def _unpack(arrays: Mapping[str, np.ndarray], start: PyTree) -> PyTree:
    fast = {}
    for path, zero in _flat(start).items():
        if f"fast/{path}" in arrays:
            fast[path] = jnp.asarray(arrays[f"fast/{path}"])
            continue
        fast[path] = zero + jnp.asarray(arrays[f"change/{path}"]).astype(zero.dtype)
    return {**start, **unflatten_dict(fast, sep="/")}


# --- the file -----------------------------------------------------------------------------------


def check_writable(path: str | os.PathLike) -> None:
    """Checks in advance that a session can be written to `path`.

    Raises UserError for a folder, and for a file that is not a session; OSError, with the path, if
    the folder is not writable.
    """
    path = local_path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file for the session.")
    if path.exists():
        try:
            read_header(path)
        except UserError as error:
            raise UserError(
                f"{path} exists and is not a session that can be replaced ({error}); name another "
                "file, or remove it first."
            ) from error
    with tempfile.TemporaryFile(dir=path.absolute().parent):
        pass


def _write(path: Path, host: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        safetensors.numpy.save_file(dict(host), temporary, metadata)


def _open(path: str | os.PathLike) -> Any:
    path = local_path(path)
    if not path.is_file():
        raise UserError(f"there is no session {path}")
    try:
        return safetensors.safe_open(path, "numpy")
    except Exception as error:  # safetensors has its own exceptions
        raise damaged(path, error) from error


def _arrays(path: str | os.PathLike, file: Any) -> dict[str, np.ndarray]:
    try:
        # An open file has keys(), but cannot be iterated over.
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors has its own exceptions
        raise damaged(path, error) from error


# --- checks -------------------------------------------------------------------------------------


def _check_content(
    path: str | os.PathLike, arrays: Mapping[str, np.ndarray], header: SessionHeader
) -> None:
    if header.arrays and checksum(arrays) != header.arrays:
        raise damaged(path, "the checksum of its arrays differs")
    if bad := not_finite(arrays, header):
        raise damaged(path, f"{bad} is not finite")


def _check_shapes(
    path: str | os.PathLike, engine: Engine, arrays: Mapping[str, np.ndarray], header: SessionHeader
) -> None:
    """UserError unless names, shapes and types are those of the engine's sessions."""
    expected = _expected(engine, header)
    if header.tokens:
        logits = (engine.inference_model.chunk_model.split.model.config.vocab_size,)
        expected["logits"] = (logits, np.dtype(np.float32))
    if missing := sorted(expected.keys() - arrays.keys()):
        raise UserError(
            f"{path} lacks {missing[0]}: it was saved with another update rule or other fast "
            "weights"
        )
    if unknown := sorted(arrays.keys() - expected.keys()):
        raise damaged(path, f"it holds {unknown[0]}, which no session of this model has")
    for name, (shape, dtype) in expected.items():
        array = arrays[name]
        if (array.shape, array.dtype) != (shape, dtype):
            raise damaged(
                path,
                f"{name} is {array.dtype.name}{list(array.shape)}, not {dtype.name}{list(shape)}",
            )
    pending, vocab = (
        arrays["pending"],
        engine.inference_model.chunk_model.split.model.config.vocab_size,
    )
    if len(pending) and not 0 <= pending.min() <= pending.max() < vocab:
        raise damaged(path, f"pending holds tokens outside the vocabulary of {vocab}")


def _expected(engine: Engine, header: SessionHeader) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of every array except the logits, by name."""
    start = engine.start()
    expected: dict[str, tuple[tuple[int, ...], np.dtype]] = {
        "pending": ((header.pending,), np.dtype(np.int32)),
        "counted": ((header.pending,), np.dtype(np.uint8)),
    }

    def add(name: str, like: Array, shape: tuple[int, ...], dtype: DTypeLike | None = None) -> None:
        expected[name] = (shape, np.dtype(dtype or like.dtype))

    for name, cache, leaf in _rows(engine, start.learned):
        shapes = cache.stored_shapes(leaf.shape, header.tokens, header.pending)
        for suffix, shape in shapes.items():
            add(f"{name}{suffix}", leaf, shape)
    for i, leaf in enumerate(jax.tree.leaves(start.learned.rule_state)):
        add(f"rule/{i}", leaf, leaf.shape)
    for path, weight in _flat(start.learned.fast).items():
        if header.precision == "float32":
            add(f"fast/{path}", weight, weight.shape)
        else:
            add(f"change/{path}", weight, weight.shape, jnp.bfloat16)
    return expected
