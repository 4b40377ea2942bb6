"""A trained model from Python, and the texts that it reads: parts of the public API."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tttjax.config import Config
from tttjax.data.tokenizers.base import Tokenizer
from tttjax.errors import UserError
from tttjax.inference.engine import Session
from tttjax.inference.forward import TextForward, forward_text
from tttjax.inference.generator import Generator, Request
from tttjax.inference.options import Sampling
from tttjax.inference.prefill import make_inference_model
from tttjax.inference.session_file import check_writable, save_session
from tttjax.io.locks import hold
from tttjax.models.transformer import Transformer
from tttjax.parallel.precision import x64_if_configured
from tttjax.runs.load import LoadedModel, encode_prompt, load_or_start_session
from tttjax.runs.long_text import find_text, run_prefill, start_prefill
from tttjax.types import Params

StrPath = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A trained model. Inference is that of `tttjax.inference`, as in all commands."""

    _loaded: LoadedModel

    @property
    def config(self) -> Config:
        """The configuration that it was trained with."""
        return self._loaded.config

    @property
    def model(self) -> Transformer:
        """The model's pure functions."""
        return self._loaded.setup.model

    @property
    def params(self) -> Params:
        """The weights."""
        return self._loaded.setup.params

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of its training data."""
        return self._loaded.tokenizer

    def forward(self, text: str, *, learn: bool = True) -> TextForward:
        """The NLL of every token of a text, chunk losses, gradient norms, and fast weights.

        learn: whether to update the fast weights after every full chunk. Raises UserError for a
        text of less than two tokens.
        """
        token_T = encode_prompt(self._loaded, text, is_first=True)
        if len(token_T) < 2:
            raise UserError(f"the text {text[:40]!r} has one token, and the loss needs two")
        self._loaded.engine.check(token_T, 0)
        setup = self._loaded.setup
        learn = learn and setup.learn
        model = make_inference_model(setup.model, setup.inner, setup.lr, learn=learn)
        with x64_if_configured(self.config):
            return forward_text(model, setup.params, token_T)

    def start(self, text: str = "") -> "TextSession":
        """A session that has read `text`, or nothing yet."""
        with x64_if_configured(self.config):
            session = TextSession(self, load_or_start_session(self._loaded, None))
            if text:
                session.append(text)
        return session

    def read(self, path: StrPath) -> "TextSession":
        """A session that has read a text file of any length. UserError if it is not one text."""
        with x64_if_configured(self.config):
            prefill = start_prefill(self._loaded, find_text(os.fspath(path)), None)
            self._loaded.engine.check((), prefill.session.tokens + prefill.total)
            for _ in run_prefill(self._loaded, prefill):
                pass
        return TextSession(self, prefill.session)

    def compare(self, path: StrPath) -> "TextComparison":
        """The loss of every full chunk of a text file, with learning and without.

        Raises UserError as `read` does, and for a run that does not learn: one without fast
        weights, or loaded with mode="off".
        """
        if not self._loaded.engine.inference_model.chunk_size:
            raise UserError("there is nothing to compare: this run has no inner updates")
        with x64_if_configured(self.config):
            prefill = start_prefill(self._loaded, find_text(os.fspath(path)), None)
            self._loaded.engine.check((), prefill.session.tokens + prefill.total)
            prefill.static = prefill.session
            rows = [row for rows in run_prefill(self._loaded, prefill) for row in rows]
        columns = [(row.tokens, row.loss, row.loss_without) for row in rows]
        return TextComparison(*np.array(columns, float).reshape(-1, 3).T)

    def open_session(self, path: StrPath) -> "TextSession":
        """The session of a file. UserError if it belongs to another model or tokenizer."""
        if not os.fspath(path):
            raise UserError("the path of the session is empty; give that of a session file")
        with x64_if_configured(self.config):
            return TextSession(self, load_or_start_session(self._loaded, os.fspath(path)))

    def generate(self, prompt: str, **options: Any) -> str:
        """The continuation of a prompt, without it. options: those of `TextSession.generate`."""
        return self.start().generate(prompt, **options)


class TextComparison(NamedTuple):
    """The N full chunks of a text: tokens up to their ends; losses in nats per token."""

    tokens_N: np.ndarray
    loss_N: np.ndarray  # each before its update
    loss_without_N: np.ndarray


@dataclasses.dataclass
class TextSession:
    """The state of one text in a run, `session`; prefill and generation continue it."""

    run: LoadedRun
    session: Session

    @property
    def tokens(self) -> int:
        """Tokens read so far."""
        return self.session.tokens

    def fork(self) -> "TextSession":
        """A session of its own in the same state, which costs nothing."""
        return TextSession(self.run, self.session)

    def append(self, text: str) -> None:
        """Reads more text."""
        self._read(text, 0)

    def _read(self, text: str, more: int) -> np.ndarray:
        """Reads a text if there is room for `more` tokens after it, and returns its tokens."""
        loaded = self.run._loaded
        token_T = encode_prompt(loaded, text, is_first=not self.tokens)
        loaded.engine.check(token_T, self.tokens + more)
        with x64_if_configured(loaded.config):
            self.session, _ = loaded.engine.read(self.session, token_T)
        return token_T

    def generate(
        self,
        prompt: str = "",
        *,
        max_tokens: int = 128,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        learn: bool = True,
        **sampling: Any,
    ) -> str:
        """Reads `prompt`, and generates what follows; the session goes on from its end.

        stop: strings before which the text ends. learn: whether generated tokens are learned too.
        sampling: fields of `Sampling`: temperature=0 is greedy decoding; the repetition penalty
        knows the tokens of this prompt. Raises UserError for a session without tokens and options
        out of range.
        """
        loaded = self.run._loaded
        parameters = Sampling(**sampling)
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        has_prompt = prompt or not self.tokens
        prompt_T = self._read(prompt, max_tokens) if has_prompt else np.zeros(0, np.int32)
        request = Request(self.session, parameters, max_tokens, stops, seed, prompt_T)
        with x64_if_configured(loaded.config):
            generator = Generator(loaded.engine, loaded.tokenizer, [request], learn=learn)
            text = "".join(token.text for token in generator)
        (self.session,) = generator.sessions
        return text

    def save(self, path: StrPath, *, precision: str = "float32") -> None:
        """Writes the session to a file, which `LoadedRun.open_session` and all commands read."""
        loaded, name = self.run._loaded, os.fspath(path)
        with hold(name, beside=True), x64_if_configured(loaded.config):
            check_writable(name)
            save_session(
                name,
                loaded.engine,
                self.session,
                model=loaded.model_fingerprint,
                tokenizer=loaded.tokenizer_fingerprint,
                precision=precision,
            )
