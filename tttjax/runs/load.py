"""Loading the model of a run for inference: engine, tokenizer, fingerprints."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from tttjax.config import Config
from tttjax.config.limits import INT_MAX
from tttjax.data.tokenizers.base import Tokenizer
from tttjax.errors import UserError
from tttjax.inference.engine import Engine, Session
from tttjax.inference.prefill import make_inference_model
from tttjax.inference.session_file import fingerprint, load_session
from tttjax.inference.update_trace import TracingEngine
from tttjax.parallel.mesh import make_mesh
from tttjax.parallel.precision import x64_if_configured
from tttjax.runs.eval_setup import EvalSetup, LearningOptions, choose_modes, load_eval_setup
from tttjax.runs.run import RunSpec, open_run
from tttjax.runs.tokenizer import load_run_tokenizer

if TYPE_CHECKING:
    from tttjax.data.chat import ChatTemplate


@dataclass(frozen=True)
class LoadedModel:
    """The model of a run, ready for inference.

    setup: its model, weights and inner loop. The two fingerprints are stored in session files and
    compared when one is loaded.
    """

    config: Config
    setup: EvalSetup
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
    """Loads the newest weights of a run, and its tokenizer, onto one device.

    Arguments:
      workdir: work directory of the run, or one of its checkpoints.
      tokenizer: folder of the tokenizer, or of data prepared with it (default: the run's own).
      mode: "on", "off" or "dynamic" (default: "on" if the model has fast weights).
      max_length: KV cache capacity of full attention in tokens (0: eight training sequences).
      learning: changes to the inner loop.
      trace_updates: record every inner update (`inference.update_trace`).

    Raises UserError if something is missing or does not fit.
    """
    if not 0 <= max_length <= INT_MAX:
        raise UserError(f"max_length={max_length} must be from 0 to {INT_MAX}.")
    run = open_run(RunSpec(workdir))
    (modes,) = choose_modes([run], (mode,) if mode else ())
    own_tokenizer = load_run_tokenizer(run, tokenizer)
    mesh = make_mesh(devices=jax.devices()[:1])
    with x64_if_configured(run.config):
        setup = load_eval_setup(run, modes[0], learning or LearningOptions(), mesh)
        model = make_inference_model(setup.model, setup.inner, setup.lr, learn=setup.learn)
        capacity = max_length or 8 * run.config.train.seq_len
        engine = (TracingEngine if trace_updates else Engine)(model, setup.params, capacity)
        model_fingerprint = fingerprint(run.config, setup.params)
    return LoadedModel(
        config=run.config,
        setup=setup,
        engine=engine,
        tokenizer=own_tokenizer,
        model_fingerprint=model_fingerprint,
        tokenizer_fingerprint=own_tokenizer.fingerprint(),
    )


def encode_prompt(loaded: LoadedModel, text: str, *, is_first: bool) -> np.ndarray:
    """int32 [T] tokens of a prompt, with BOS first if it starts a session.

    Raises UserError for an empty prompt that starts a session.
    """
    token_T = loaded.tokenizer.encode(text)
    if is_first and not len(token_T):
        raise UserError(
            "the prompt is empty" if not text else f"the prompt {text[:40]!r} has no tokens"
        )
    return _with_bos(loaded, token_T) if is_first else token_T.astype(np.int32)


def encode_question(loaded: LoadedModel, template: "ChatTemplate", text: str) -> np.ndarray:
    """int32 [T] tokens of a user's first message, up to the answer, with BOS.

    Raises UserError for an empty message.
    """
    if not text.strip():
        raise UserError("the prompt is empty")
    return _with_bos(loaded, template.encode_prompt([{"role": "user", "content": text}]))


def _with_bos(loaded: LoadedModel, token_T: np.ndarray) -> np.ndarray:
    bos = () if loaded.tokenizer.bos_id is None else (loaded.tokenizer.bos_id,)
    return np.concatenate((bos, token_T)).astype(np.int32)


def load_or_start_session(loaded: LoadedModel, path: str | None) -> Session:
    """The session of a file, or an empty one if `path` is None or empty."""
    if not path:
        return loaded.engine.start()
    return load_session(
        path, loaded.engine, model=loaded.model_fingerprint, tokenizer=loaded.tokenizer_fingerprint
    )[0]
