"""The public API, what `import tttjax` offers: the library behind the command line.

docs/api.md has an example of everything, and says what is stable.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tttjax import recipes
from tttjax.config import Config
from tttjax.config.build import replace_values
from tttjax.data.preparation import prepare as prepare_data
from tttjax.data.shards import PreparedData
from tttjax.data.tokenizers.base import Tokenizer
from tttjax.errors import UserError
from tttjax.evaluation.compare import compare
from tttjax.evaluation.report.entries import ReportEntry
from tttjax.evaluation.report.make import make_report
from tttjax.evaluation.report.results import Report
from tttjax.evaluation.results import Comparison
from tttjax.inference.engine import Session
from tttjax.inference.forward import TextForward, forward_text
from tttjax.inference.generator import Generator, Request
from tttjax.inference.options import Sampling
from tttjax.inference.prefill import make_inference_model
from tttjax.inference.session_file import check_writable, save_session
from tttjax.io.locks import hold
from tttjax.models.transformer import Transformer
from tttjax.models.transformer import build_model as build_transformer
from tttjax.parallel.precision import x64_if_configured
from tttjax.planning.make import Plan, make_plan
from tttjax.planning.topologies import parse_topology
from tttjax.runs.load import LoadedModel, encode_prompt, load_model, load_or_start_session
from tttjax.runs.long_text import find_text, run_prefill, start_prefill
from tttjax.runs.run import RunSpec
from tttjax.training.loop import train as train_config
from tttjax.ttt.outer_loss import learns, make_inner_loop, make_outer_loss
from tttjax.types import Array, Batch, Params

StrPath = str | os.PathLike[str]
MetaGrad = Callable[..., tuple[Array, Params]]


def prepare(
    inputs: StrPath | Sequence[StrPath],
    out: StrPath,
    *,
    tokenizer: StrPath = "bytes",
    **settings: Any,
) -> PreparedData:
    """Tokenizes text files or folders into the data set `out`, and opens it.

    tokenizer: "bytes", "sentencepiece" (trained on the text), a tokenizer file, or the folder of
    another data set. settings: the other options of `tttjax prepare`, such as vocab_size=4096.
    Called again, it resumes. Raises UserError for bad input.
    """
    paths = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    return prepare_data(paths, out, tokenizer=str(tokenizer), **settings)


def train(
    config: Config | str,
    workdir: StrPath,
    *,
    data: StrPath | Sequence[StrPath] | None = None,
    stop_after: int | None = None,
) -> "LoadedRun":
    """Trains in `workdir`, from its newest checkpoint if there is one, and loads the result.

    config: a configuration, or a recipe as `recipes.get` takes it. data: prepared data sets, in
    place of `config.data.sources`. stop_after: save and return after this step; the same call
    goes on. Raises UserError as `tttjax train` does, and KeyboardInterrupt after Ctrl-C or SIGTERM,
    once the last step is saved.
    """
    config = _resolved(config)
    if data is not None:
        folders = [data] if isinstance(data, str | os.PathLike) else data
        config = replace_values(config, {"data.sources": tuple(map(os.fspath, folders))})
    result = train_config(config, workdir, stop_after=stop_after)
    if result.interrupted and result.step != stop_after:
        raise KeyboardInterrupt(f"saved at step {result.step}; the same call goes on from there")
    return load(workdir)


def load(
    workdir: StrPath, *, mode: str = "", tokenizer: StrPath | None = None, max_length: int = 0
) -> "LoadedRun":
    """The newest weights of a run, on one device, ready for inference.

    mode: "on" (default for a model with fast weights), "off", or "dynamic". tokenizer: its folder
    (default: the run's own). max_length: capacity of full attention, in tokens (0: eight training
    sequences). Raises UserError if something is missing or does not fit.
    """
    folder = None if tokenizer is None else Path(tokenizer)
    return LoadedRun(load_model(Path(workdir), tokenizer=folder, mode=mode, max_length=max_length))


def build_model(config: Config | str) -> Transformer:
    """The model of a configuration: pure functions. Its weights are `model.init(seed)`."""
    config = _resolved(config)
    return build_transformer(config.model, config.inner)


def value_and_meta_grad(model: Transformer, config: Config) -> MetaGrad:
    """The outer loss (eq. 6 of the paper) and its gradient.

    The gradient goes through the inner updates that `config.inner.meta_gradient` selects. Returns
    f(params, batch, inner_lr=config.inner.lr) -> (loss, gradient), compiled: the mean over
    sequences and chunks of each chunk's masked mean, in nats; and `Params(slow, fast)`. batch:
    `Batch(inputs, targets, mask)`, each [B, T] with T a multiple of config.inner.chunk_size.
    """
    inner = make_inner_loop(config.inner)
    loss = make_outer_loss(model, inner, learn=learns(model, config.inner.meta_gradient))
    with x64_if_configured(config):
        expected = model.abstract_params()
    derive = jax.jit(jax.value_and_grad(lambda params, batch, lr: loss(params, batch, lr)[0]))

    def value_and_grad(
        params: Params, batch: Batch, inner_lr: float = config.inner.lr
    ) -> tuple[Array, Params]:
        _check_batch(batch, config)
        with x64_if_configured(config):
            _check_params(params, expected)
            return derive(params, batch, inner_lr)

    return value_and_grad


def _check_batch(batch: Batch, config: Config) -> None:
    """UserError for a batch that the model cannot read, or would read wrongly."""
    inputs, targets = np.asarray(batch.inputs), np.asarray(batch.targets)
    chunk, vocab = config.inner.chunk_size, config.model.vocab_size
    if inputs.ndim != 2 or not inputs.shape == targets.shape == np.shape(batch.mask):
        raise UserError(
            f"inputs {inputs.shape}, targets {targets.shape} and mask {np.shape(batch.mask)} must "
            "have one shape, [B, T]"
        )
    if not inputs.size or inputs.shape[1] % chunk:
        raise UserError(
            f"sequences of {inputs.shape[1]} tokens are no multiple of inner.chunk_size = {chunk}"
        )
    for name, tokens in (("inputs", inputs), ("targets", targets)):
        if tokens.dtype.kind not in "iu" or tokens.min() < 0 or tokens.max() >= vocab:
            raise UserError(f"{name} must be integers from 0 to {vocab - 1}, the vocabulary")


def _check_params(params: Params, expected: Params) -> None:
    """UserError for weights of another model, or in another dtype."""
    structure: Any = jax.tree.structure(expected)
    if structure != jax.tree.structure(params):
        raise UserError("the weights have other names than the model's; make them by model.init")
    for actual, leaf in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        if (np.shape(actual), actual.dtype) != (leaf.shape, leaf.dtype):
            raise UserError(
                f"a weight is {actual.dtype}{list(np.shape(actual))}, and the model has "
                f"{leaf.dtype}{list(leaf.shape)}; make the weights by model.init"
            )


def evaluate(
    *workdirs: StrPath,
    data: StrPath | None = None,
    modes: str | Sequence[str] = (),
    names: Sequence[str] = (),
) -> Comparison:
    """Loss by position and context length of runs on the same held-out tokens, TTT on and off.

    data: a prepared data set (default: the first run's). modes: "on", "off", "dynamic". names: of
    the runs in tables (default: their folders'). `.table` is the result as text, `.series` the
    sums. Raises UserError for runs that do not compare.
    """
    folder = None if data is None else Path(data)
    if names and len(names) != len(workdirs):
        raise UserError(f"there are {len(names)} names for {len(workdirs)} runs; give one for each")
    labels = names or [""] * len(workdirs)
    runs = [RunSpec(Path(path), name) for path, name in zip(workdirs, labels, strict=True)]
    return compare(runs, data=folder, modes=_several(modes))


def _resolved(config: Config | str) -> Config:
    return config if isinstance(config, Config) else recipes.get(config)


def _several(words: str | Sequence[str]) -> tuple[str, ...]:
    return (words,) if isinstance(words, str) else tuple(words)


def report(systems: Mapping[str, StrPath], out: StrPath, *, data: StrPath | None = None) -> Report:
    """Compares runs by name, {"ttt_e2e": "runs/first"}, and writes a page with tables to `out`."""
    entries = [ReportEntry(name, Path(workdir)) for name, workdir in systems.items()]
    return make_report(entries, Path(out), data=None if data is None else Path(data))


def plan(config: Config | str, topology: str) -> Plan:
    """Memory, FLOPs and time of a train step on a pod such as "v5p:2x2x1", compiled for it.

    Needs the extra `plan`. Raises UserError if the mesh does not fit the topology.
    """
    return make_plan(_resolved(config), parse_topology(topology))


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

    def open_session(self, path: StrPath) -> "TextSession":
        """The session of a file. UserError if it belongs to another model or tokenizer."""
        if not os.fspath(path):
            raise UserError("the path of the session is empty; give that of a session file")
        with x64_if_configured(self.config):
            return TextSession(self, load_or_start_session(self._loaded, os.fspath(path)))

    def generate(self, prompt: str, **options: Any) -> str:
        """The continuation of a prompt, without it. options: those of `TextSession.generate`."""
        return self.start().generate(prompt, **options)


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
        parameters, stops = Sampling(**sampling), _several(stop)
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
