"""A run's model, ready to read and write: engine, tokenizer, and the marks its sessions carry."""

from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from tttjax.config import Config
from tttjax.config.limits import INT_MAX
from tttjax.data.tokenizers.base import Tokenizer
from tttjax.errors import UserError
from tttjax.inference.engine import Engine, Session
from tttjax.inference.prefill import make_inference_model
from tttjax.inference.session_file import (
    fingerprint,
    load_session,
)
from tttjax.inference.update_trace import TracingEngine
from tttjax.parallel.mesh import make_mesh
from tttjax.parallel.precision import as_configured
from tttjax.runs.run import LearningOptions, RunSpec, choose_modes, iter_eval_setups, open_run
from tttjax.runs.tokenizer import run_tokenizer


@dataclass(frozen=True)
class LoadedModel:
    """model, tokenizer_mark: fingerprints, which a session file must share."""

    config: Config
    engine: Engine
    tokenizer: Tokenizer
    model_fingerprint: str
    tokenizer_fingerprint: str


def load_model(
    workdir: Path | str,
    *,
    tokenizer: Path | str | None = None,
    mode: str = "",
    max_length: int = 0,
    learning: LearningOptions | None = None,
    trace_updates: bool = False,
) -> LoadedModel:
    """The newest weights of a run, on one device.

    tokenizer: folder of it, or of data prepared with it (default: the run's own). mode: "on",
    "off" or "dynamic" (default: on if the model has fast weights). max_length: tokens that full
    attention has room for (0: eight training sequences). observe: reading shows every update
    (`inference.telescope`).
    Raises UserError if something is missing or does not fit.
    """
    if not 0 <= max_length <= INT_MAX:
        raise UserError(f"max_length={max_length} must be from 0 to {INT_MAX}.")
    found = open_run(RunSpec(workdir))
    (modes,) = choose_modes([found], (mode,) if mode else ())
    texts = run_tokenizer(found, tokenizer)
    mesh = make_mesh(devices=jax.devices()[:1])
    with as_configured(found.config):
        way = next(iter_eval_setups(found, modes[:1], learning or LearningOptions(), mesh))[0]
        reader = make_inference_model(way.model, way.inner, way.lr, learn=way.learn)
        room = max_length or 8 * found.config.train.seq_len
        engine = (TracingEngine if trace_updates else Engine)(reader, way.params, room)
        mark = fingerprint(found.config, way.params)
    return LoadedModel(found.config, engine, texts, mark, texts.fingerprint())


LEARN = ("all", "prompt", "none")


def encode_prompt(opened: LoadedModel, text: str, *, is_first: bool) -> np.ndarray:
    """Tokens of a text, after BOS where it begins a session. UserError if it is empty."""
    token_T = opened.tokenizer.encode(text)
    if is_first and not len(token_T):
        raise UserError(
            "the prompt is empty" if not text else f"the prompt {text[:40]!r} has no tokens"
        )
    if is_first and opened.tokenizer.bos_id is not None:
        token_T = np.concatenate(([opened.tokenizer.bos_id], token_T))
    return token_T.astype(np.int32)


def load_or_start_session(opened: LoadedModel, path: str | None) -> Session:
    """That of a file, or a new one."""
    if not path:
        return opened.engine.start()
    return load_session(
        path, opened.engine, model=opened.model_fingerprint, tokenizer=opened.tokenizer_fingerprint
    )[0]
