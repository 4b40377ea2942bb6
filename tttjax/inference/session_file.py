"""Sessions as files: everything that was read, in one file of constant size.

The file is in the safetensors format. Of windows of keys and values, each row lies in it once:
those before the last chunk that was learned from, and those after; of full attention, the rows that
were read. Fast weights are stored as they are, so that going on from the file is going on, bit for
bit; or smaller, as their difference from W0 in bfloat16, or that difference as the best product of
two thin matrices (`rank`), at a loss that is measured and told.

A file belongs to one model: its fingerprint is over the configuration of the network and the inner
loop and a sample of every weight.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from tttjax.config import Config
from tttjax.config.fields import unset_additions
from tttjax.errors import UserError
from tttjax.fast_layers import fast_layers, norms_above
from tttjax.inference.engine import Engine, Session
from tttjax.inference.reading import Context
from tttjax.paths import local_path
from tttjax.types import Array, Params, PyTree
from tttjax.whole_files import whole_file

FORMAT = "tttjax-session-2"
PRECISIONS = ("float32", "bfloat16")
SAMPLE = 4096  # entries of each weight that the fingerprint is over
HEADER = "session"
LOSSES = 256  # of the last chunks, that are kept
CHANGES_NO_NUMBER = ("remat", "form", "trajectory", "attention_kernel", "scan_chunk")


@dataclasses.dataclass(frozen=True)
class About:
    """What a file says of itself, without a model.

    drift: ||W - W0|| of every fast weight by its path. lost: the relative error of the stored
    difference from W0, largest over weights; 0 if it is stored as it is. chunk_losses: NLL of the
    last chunks before learning from each, oldest first. source: of `tttjax read`, the text and how
    far it was read. layers: (||W - W0||, ||W0||) by layer (`fast_layers`). chunk_losses_after: of
    the same chunks, read again with the weights that they left; None where nobody looked.
    """

    format: str
    model: str
    tokenizer: str
    tokens: int
    pending: int
    precision: str
    rank: int
    drift: dict[str, float]
    lost: float
    chunk_losses: list[float]
    source: dict[str, Any]
    layers: dict[str, list[float]]
    chunk_losses_after: list[float | None]


def fingerprint(config: Config, params: Params) -> str:
    """sha256 (hex) of a network, its inner loop, and a sample of every weight."""
    digest = hashlib.sha256()
    for section in (config.model, config.inner):
        values = {name: repr(value) for name, value in sorted(vars(section).items())}
        for name in (*CHANGES_NO_NUMBER, *unset_additions(section)):
            values.pop(name, None)
        digest.update(json.dumps(values).encode())
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
    rank: int = 0,
    chunk_losses: Sequence[float] = (),
    chunk_losses_after: Sequence[float | None] = (),
    source: Mapping[str, Any] | None = None,
) -> About:
    """Writes the session; what stands at `path` before is replaced only when all is written.

    model: its `fingerprint`. precision: "float32" keeps the fast weights as they are, "bfloat16"
    their difference from W0. rank: of that difference; 0: not made smaller.
    Raises UserError for impossible choices.
    """
    check_stored(precision, rank)
    start = engine.start()
    arrays: dict[str, Any] = _states(engine, session)
    fast, drift, lost = _pack(session.learned.fast, start.learned.fast, precision, rank)
    arrays |= fast
    for i, leaf in enumerate(jax.tree.leaves(session.learned.rule_state)):
        arrays[f"rule/{i}"] = leaf
    if session.logit_V is not None:
        arrays["logits"] = session.logit_V
    arrays |= {"pending": session.pending, "counted": session.counted.astype(np.uint8)}
    about = About(
        format=FORMAT,
        model=model,
        tokenizer=tokenizer,
        tokens=session.tokens,
        pending=len(session.pending),
        precision=precision,
        rank=rank,
        drift=drift,
        lost=lost,
        chunk_losses=list(chunk_losses)[-LOSSES:],
        source=dict(source or {}),
        layers=_layers(engine, session.learned.fast, start.learned.fast),
        chunk_losses_after=list(chunk_losses_after)[-LOSSES:],
    )
    _write(local_path(path), arrays, {HEADER: json.dumps(dataclasses.asdict(about))})
    return about


def read_about(path: str | os.PathLike) -> About:
    """What a session file says of itself. UserError if it is none, or damaged."""
    with _open(path) as file:
        return _about(path, file.metadata())


def check_stored(precision: str, rank: int) -> None:
    """UserError for what no session can be stored as."""
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision!r}: choose {' or '.join(PRECISIONS)}.")
    if rank < 0 or (rank and precision == "float32"):
        raise UserError(f"rank={rank} must be at least 0, and needs the precision bfloat16.")


def load_session(
    path: str | os.PathLike, engine: Engine, *, model: str, tokenizer: str = ""
) -> tuple[Session, About]:
    """The session in a file, for the engine of the model that wrote it.

    Raises UserError for the session of another model or tokenizer, or one that needs more room than
    `engine.max_length`.
    """
    with _open(path) as file:
        about = _about(path, file.metadata())
        if about.model != model:
            raise UserError(
                f"{path} is the session of another model (fingerprint {about.model[:12]}, this one "
                f"has {model[:12]}): what was read lies in the weights, so open it with its own."
            )
        if tokenizer and about.tokenizer and about.tokenizer != tokenizer:
            raise UserError(
                f"{path} was read with another tokenizer (fingerprint {about.tokenizer[:12]}, this "
                f"one has {tokenizer[:12]}); give that one with --tokenizer=DIR"
            )
        engine.check((), about.tokens)
        try:
            # An open file has keys(), but cannot be iterated over.
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:  # the library has its own kinds of errors
            raise _damaged(path, error) from error
    try:
        return _session(engine, arrays, about), about
    except KeyError as missing:
        raise UserError(
            f"{path} lacks {missing}: it was saved with another update rule or other fast weights"
        ) from missing


def _session(engine: Engine, arrays: Mapping[str, np.ndarray], about: About) -> Session:
    start = engine.start()
    fast = _unpack(arrays, start.learned.fast)
    leaves, structure = jax.tree.flatten(start.learned.rule_state)
    rules = [jnp.asarray(arrays[f"rule/{i}"]) for i in range(len(leaves))]
    rule_state = jax.tree.unflatten(structure, rules)
    learned, now = _contexts(engine, start.learned, arrays, about)
    # Placed as those that reading leaves, else it would be compiled once more.
    learned, now = (
        jax.tree.map(
            lambda x, like: jax.device_put(x, like.sharding),
            context._replace(fast=fast, rule_state=rule_state),
            start.learned,
        )
        for context in (learned, now)
    )
    logit_V = jnp.asarray(arrays["logits"]) if "logits" in arrays else None
    counted = arrays["counted"].astype(bool)
    return Session(learned, now, arrays["pending"], counted, about.tokens, logit_V)


# --- states -------------------------------------------------------------------------------------


HALVES = ("below", "above")


def _kinds(engine: Engine) -> dict[str, list[str]]:
    """How the arrays of both halves' states grow, in the order of their leaves."""
    cut = engine.reader.learner.cut
    kinds = {"below": cut.keeps_below(), "above": cut.keeps()}
    return {half: jax.tree.leaves(kinds[half]) for half in HALVES}


def _leaves(context: Context, half: str) -> list[Array]:
    return jax.tree.leaves(getattr(context, half)["blocks"])


def _states(engine: Engine, session: Session) -> dict[str, Array]:
    """What both contexts keep, each row once."""
    pending, tokens = len(session.pending), session.tokens
    arrays: dict[str, Array] = {}
    for half, kinds in _kinds(engine).items():
        both = (_leaves(context, half) for context in (session.learned, session.now))
        for i, (kind, learned, now) in enumerate(zip(kinds, *both, strict=True)):
            name = f"{half}/{i}"
            if kind == "whole":  # what stands behind the learned rows is never looked at
                arrays[name] = now[:, :, :tokens]
            elif kind == "window":
                arrays[name] = learned
                arrays[f"{name}/new"] = now[:, :, max(0, now.shape[2] - pending) :]
            else:
                arrays |= {name: learned, f"{name}/now": now}
    return arrays


def _contexts(
    engine: Engine, start: Context, arrays: Mapping[str, np.ndarray], about: About
) -> tuple[Context, Context]:
    """The contexts that `_states` came from, with the fast weights of `start`."""
    places = about.tokens - about.pending, about.tokens
    contexts = [start, start]
    for half, kinds in _kinds(engine).items():
        pairs = []
        for i, (kind, empty) in enumerate(zip(kinds, _leaves(start, half), strict=True)):
            name = f"{half}/{i}"
            stored = jnp.asarray(arrays[name])
            if kind == "whole":
                filled = empty.at[:, :, : about.tokens].set(stored)
                pairs.append((filled, filled))
            elif kind == "window":
                rows = jnp.concatenate((stored, jnp.asarray(arrays[f"{name}/new"])), axis=2)
                pairs.append((stored, rows[:, :, rows.shape[2] - stored.shape[2] :]))
            else:
                pairs.append((stored, jnp.asarray(arrays[f"{name}/now"])))
        structure = jax.tree.structure(getattr(start, half)["blocks"])
        for which, place in enumerate(places):
            blocks = jax.tree.unflatten(structure, [pair[which] for pair in pairs])
            state = {"position": jnp.asarray(place, jnp.int32), "blocks": blocks}
            contexts[which] = contexts[which]._replace(**{half: state})
    return contexts[0], contexts[1]


# --- fast weights -------------------------------------------------------------------------------


def _pack(
    fast: PyTree, start: PyTree, precision: str, rank: int
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
        if rank and min(change.shape[-2:]) > rank:
            u, s, v = jnp.linalg.svd(change, full_matrices=False)
            thin = {"left": u[..., :rank] * s[..., None, :rank], "right": v[..., :rank, :]}
        else:
            thin = {"change": change}
        stored = {f"{name}/{path}": x.astype(jnp.bfloat16) for name, x in thin.items()}
        arrays |= stored
        if size:
            error = change - _change(stored.values(), change.dtype)
            lost = max(lost, float(jnp.linalg.norm(error)) / size)
    return arrays, drift, lost


def _change(stored: Iterable[Any], dtype: jnp.dtype) -> Array:
    first, *second = (jnp.asarray(x).astype(dtype) for x in stored)
    return first @ second[0] if second else first


def _layers(engine: Engine, fast: PyTree, start: PyTree) -> dict[str, list[float]]:
    """(||W - W0||, ||W0||) by layer, to seven digits."""
    cut = engine.reader.learner.cut
    names = fast_layers(cut.model)
    if not names:
        return {}
    moved = jax.tree.map(lambda a, b: (a - b)[0], fast, start)
    sizes = [norms_above(cut, tree) for tree in (moved, jax.tree.map(lambda w: w[0], start))]
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
        whole = f"change/{path}" in arrays
        names = ("change",) if whole else ("left", "right")
        fast[path] = zero + _change((arrays[f"{n}/{path}"] for n in names), zero.dtype)
    return {**start, **unflatten_dict(fast, sep="/")}


# --- the file -----------------------------------------------------------------------------------


def check_writable(path: str | os.PathLike) -> None:
    """OSError, with the path, where no session could be written: known before anything is read."""
    with tempfile.TemporaryFile(dir=local_path(path).absolute().parent):
        pass


def _write(path: Path, arrays: Mapping[str, Any], metadata: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    host = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    with whole_file(path) as temporary:
        safetensors.numpy.save_file(host, temporary, metadata)


def _open(path: str | os.PathLike) -> Any:
    path = local_path(path)
    if not path.is_file():
        raise UserError(f"there is no session {path}")
    try:
        return safetensors.safe_open(path, "numpy")
    except Exception as error:  # the library has its own kinds of errors
        raise _damaged(path, error) from error


def _about(path: str | os.PathLike, metadata: Mapping[str, str] | None) -> About:
    try:
        values = json.loads((metadata or {})[HEADER])
        values["format"]
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} is a safetensors file, but no session of tttjax") from error
    if values.get("format") != FORMAT:
        raise UserError(
            f"{path} has the session format {values.get('format')!r}; this version reads {FORMAT}"
        )
    try:
        return About(**values)
    except TypeError as error:
        raise _damaged(path, error) from error


def _damaged(path: str | os.PathLike, error: Exception) -> UserError:
    return UserError(
        f"{path} is not a whole session file ({error}); it was cut short or is something else"
    )
