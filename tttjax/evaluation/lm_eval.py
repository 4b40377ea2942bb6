"""lm-evaluation-harness with TTT models: each request starts from W0 and updates fast weights.

    python -m tttjax.lm_eval run --model tttjax --model_args workdir=runs/first --tasks hellaswag

runs the harness command `lm-eval` with the model `tttjax` registered. In Python:

    from tttjax.lm_eval import TTTJaxLM
    results = lm_eval.simple_evaluate(model=TTTJaxLM("runs/first"), tasks=["hellaswag"])

Requires the extra: `pip install -e '.[lm-eval]'` in the checkout of tttjax. docs/evaluation.md
describes what is measured.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

import numpy as np

from tttjax.config.limits import INT_MAX, read_number
from tttjax.data.streams import check_unicode
from tttjax.errors import UserError, install_extra
from tttjax.inference.engine import Engine
from tttjax.inference.generator import Generator, Request
from tttjax.inference.options import Sampling
from tttjax.inference.scoring import Score, Scorer, score_batch
from tttjax.inference.session import Session
from tttjax.parallel.precision import x64_if_configured
from tttjax.runs.load import LoadedModel, load_model
from tttjax.runs.modes import LEARN

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from tqdm import tqdm  # a dependency of the harness
except ImportError as error:
    raise ImportError(
        "tttjax.lm_eval needs lm-evaluation-harness: " + install_extra("lm-eval")
    ) from error

AUTO_BATCH = 8
MAX_TOKENS = 256  # default where a task gives no limit, as in other models of the harness
TOKEN_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
MAX_BATCHED_TOKENS = 64  # longer continuations are scored one by one


@register_model("tttjax")
class TTTJaxLM(TemplateLM):
    """A harness model with a run's newest weights.

    Every request is an independent session that starts from BOS and W0. Equal contexts, and the
    common prefix of all contexts in a call, are prefilled once.
    """

    def __init__(
        self,
        workdir: str,
        tokenizer: str | None = None,
        mode: str = "",
        learn: str = "all",
        max_length: int = 0,
        seed: int = 0,
        batch_size: int | str = AUTO_BATCH,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        """mode, tokenizer, max_length: as in `load_model`.

        learn: "all", "prompt" (not from generated or scored tokens), or "none".
        seed: of sampling; increases by one for each repeat of a request.
        batch_size: requests per batch, or "auto".
        device: ignored; JAX chooses the device (JAX_PLATFORMS).
        Raises UserError for invalid or contradictory arguments.
        """
        super().__init__()
        if learn not in LEARN:
            raise UserError(f"learn={learn} is unknown; choose from {', '.join(LEARN)}")
        if learn == "none" and mode not in ("", "off"):
            raise UserError(f"learn=none and mode={mode} contradict each other")
        self._workdir, self._seed = str(workdir), seed
        self._max_batch = _batch_size(batch_size, max_batch_size)
        self._learn = learn == "all"
        self._loaded: LoadedModel = load_model(
            self._workdir,
            tokenizer=tokenizer,
            mode="off" if learn == "none" else mode,
            max_length=max_length,
        )
        self._scorer = Scorer(self._engine)

    @property
    def _engine(self) -> Engine:
        return self._loaded.engine

    # --- the harness's model interface -----------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """EOS, else BOS."""
        return self._special("eos_id", "bos_id")

    @property
    def prefix_token_id(self) -> int:
        """First token of a text without context: BOS, else EOS."""
        return self._special("bos_id", "eos_id")

    def _special(self, *names: str) -> int:
        token_ids = [getattr(self._loaded.tokenizer, name) for name in names]
        known = [token for token in token_ids if token is not None]
        if not known:
            raise UserError(
                "the tokenizer has neither BOS nor EOS, so the first token of a text has no "
                "probability; use another tokenizer"
            )
        return known[0]

    @property
    def tokenizer_name(self) -> str:
        """Key for the harness's request cache; differs between tokenizers."""
        return f"tttjax-{self._loaded.tokenizer_fingerprint[:16]}"

    def get_model_info(self) -> dict[str, Any]:
        """Model information that the harness stores with its results."""
        inference_model = self._engine.inference_model
        return {
            "workdir": self._workdir,
            "model_fingerprint": self._loaded.model_fingerprint,
            "chunk_size": inference_model.chunk_size,  # 0: no inner updates
            "inner_lr": float(inference_model.lr),
            "learns_from_answers": self._learn,
        }

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Encodes a text. BOS is added at prefill, or here if `add_special_tokens`.

        Raises UserError for a text with a lone surrogate.
        """
        check_unicode(string, f"the text of a request, {string[:40]!r},")
        tokens = self._loaded.tokenizer.encode(string).tolist()
        return [self.prefix_token_id, *tokens] if add_special_tokens else tokens

    # --- likelihood -----------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether greedy decoding gives it) per request."""
        by_context: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, _) in enumerate(requests):
            by_context.setdefault(self._with_bos(context), []).append(i)
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="loglikelihood")
        with x64_if_configured(self._loaded.config):
            for contexts, sessions in self._prefill(list(by_context)):
                batch = [
                    (i, session)
                    for context, session in zip(contexts, sessions, strict=True)
                    for i in by_context[context]
                ]
                texts = [np.asarray(requests[i][2], np.int32) for i, _ in batch]
                scores = self._score([session for _, session in batch], texts)
                for (i, _), score in zip(batch, scores, strict=True):
                    answers[i] = (
                        -float(np.sum(score.nll_T, dtype=np.float64)),
                        all(score.is_top_T),
                    )
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
                bar.update(len(batch))
        bar.close()
        return answers

    def _score(self, sessions: Sequence[Session], texts: Sequence[np.ndarray]) -> list[Score]:
        """Scores short continuations in batches, long ones one by one."""
        scores: dict[int, Score] = {}
        short = sorted(
            (i for i, text_T in enumerate(texts) if len(text_T) <= MAX_BATCHED_TOKENS),
            key=lambda i: len(texts[i]),
        )
        for part in _batches(short, self._max_batch):
            batch = score_batch(
                self._engine,
                [sessions[i] for i in part],
                [texts[i] for i in part],
                learn=self._learn,
            )
            scores.update(zip(part, batch, strict=True))
        for i, text_T in enumerate(texts):
            if i not in scores:
                scores[i] = self._scorer.score(sessions[i], text_T, learn=self._learn)[1]
        return [scores[i] for i in range(len(texts))]

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each full text, scored in one session without truncation."""
        answers = []
        with x64_if_configured(self._loaded.config):
            (_, (prefix_session,)) = next(self._prefill([(self.prefix_token_id,)]))
            for request in tqdm(requests, disable=disable_tqdm, desc="loglikelihood_rolling"):
                text_T = np.asarray(self.tok_encode(request.args[0]), np.int32)
                # The text is the prompt here, so learn="prompt" updates on it too.
                _, score = self._scorer.score(prefix_session, text_T)
                answers.append(-float(np.sum(score.nll_T, dtype=np.float64)))
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, answers[-1])
        return answers

    # --- generation -----------------------------------------------------------------------------

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """The text generated after each context, without the stop string."""
        options = [_request_options(request.args[1]) for request in requests]
        contexts = [self._with_bos(self.tok_encode(request.args[0])) for request in requests]
        seeds = [self._seed + n for n in _repeat_numbers(contexts)]  # a new sample for each repeat
        answers = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: len(contexts[i]))
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until")
        with x64_if_configured(self._loaded.config):
            start = 0
            for part, sessions in self._prefill([contexts[i] for i in order]):
                indices = order[start : start + len(part)]
                start += len(part)
                batch = [
                    Request(session, prompt=context, seed=seeds[i], **options[i])
                    for i, session, context in zip(indices, sessions, part, strict=True)
                ]
                generator = Generator(
                    self._engine, self._loaded.tokenizer, batch, learn=self._learn
                )
                for piece in generator:
                    answers[indices[piece.request]] += piece.text
                for i in indices:
                    self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
                bar.update(len(indices))
        bar.close()
        return answers

    # --- prefill --------------------------------------------------------------------------------

    def _with_bos(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """The context after BOS, as in training."""
        bos = self._loaded.tokenizer.bos_id
        if not tokens:
            return (self.prefix_token_id,)
        if bos is None or tokens[0] == bos:
            return tuple(tokens)
        return (bos, *tokens)

    def _prefill(
        self, contexts: Sequence[tuple[int, ...]]
    ) -> Iterator[tuple[Sequence[tuple[int, ...]], list[Session]]]:
        """Batches of contexts with their prefilled sessions."""
        if not contexts:
            return
        prefix = _common_prefix(contexts)
        prefix_session, _ = self._engine.read(self._engine.start(), np.asarray(prefix, np.int32))
        for part in _batches(contexts, self._max_batch):
            suffixes = [np.asarray(context[len(prefix) :], np.int32) for context in part]
            results = self._engine.read_batch([prefix_session] * len(part), suffixes)
            yield part, [session for session, _ in results]


def _batch_size(requested: int | str, limit: int | None) -> int:
    if isinstance(requested, str) and requested.startswith("auto"):
        return min(AUTO_BATCH, limit or AUTO_BATCH)
    size = read_number(str(requested))
    if not isinstance(size, int) or size < 1:
        raise UserError(f"batch_size={requested} must be a number of at least 1, or auto")
    return size


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _repeat_numbers(items: Sequence[Any]) -> list[int]:
    """How many equal items precede each item."""
    counts: Counter[Any] = Counter()
    numbers = []
    for item in items:
        numbers.append(counts[item])
        counts[item] += 1
    return numbers


def _common_prefix(contexts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The longest common prefix of all contexts."""
    low, high = min(contexts), max(contexts)
    pairs = zip(low, high, strict=False)
    return tuple(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _request_options(requested: dict[str, Any]) -> dict[str, Any]:
    """Fields of a `Request` from a task's generation_kwargs. Raises UserError for unknown ones."""
    known = {"until", "do_sample", *TOKEN_LIMITS, *SAMPLING}
    if unknown := sorted(set(requested) - known):
        raise UserError(
            f"the generation option {unknown[0]} of this task is not supported; choose from "
            f"{', '.join(sorted(known))}"
        )
    sampling = {name: requested[name] for name in SAMPLING if requested.get(name) is not None}
    if not requested.get("do_sample", False):
        sampling["temperature"] = 0.0
    until = requested.get("until") or []
    for stop in [until] if isinstance(until, str) else until:
        check_unicode(stop, "a stop string of this task")
    limits = [requested[name] for name in TOKEN_LIMITS if requested.get(name) is not None]
    tokens = read_number(str(next(iter(limits), MAX_TOKENS)))
    if not isinstance(tokens, int) or not 1 <= tokens <= INT_MAX:
        raise UserError(f"this task's token limit {limits[0]} must be a number from 1 to {INT_MAX}")
    return {
        "sampling": Sampling(**sampling),
        "max_tokens": tokens,
        "stop": tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
    }
