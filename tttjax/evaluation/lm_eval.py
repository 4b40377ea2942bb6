"""lm-evaluation-harness on our models: they learn while they read each request, from W0.

    python -m tttjax.lm_eval run --model tttjax --model_args workdir=runs/first --tasks hellaswag

is the harness's own command, `lm-eval`, with the model `tttjax` known to it. In Python:

    from tttjax.lm_eval import TTTJaxLM
    results = lm_eval.simple_evaluate(model=TTTJaxLM("runs/first"), tasks=["hellaswag"])

Needs the extra: `pip install -e '.[lm-eval]'` in the checkout of tttjax. docs/evaluation.md says
what is measured.
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
from tttjax.inference.sampling import Sampling
from tttjax.inference.scoring import Score, Scorer, score_batch
from tttjax.inference.session import Session
from tttjax.parallel.precision import as_configured
from tttjax.runs.load import LEARN, LoadedModel, load_model

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from tqdm import tqdm  # comes with the harness
except ImportError as error:
    raise ImportError(
        "tttjax.lm_eval needs lm-evaluation-harness: " + install_extra("lm-eval")
    ) from error

AUTO_BATCH = 8
MAX_TOKENS = 256  # written where a task does not say how many, as in the harness's other models
TOKEN_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
SHORT = 64  # tokens of a continuation that is scored together with others


@register_model("tttjax")
class TTTJaxLM(TemplateLM):
    """A run's newest weights as a model of the harness.

    Every request is a session of its own, begun with BOS and W0, whatever came before it. Contexts
    that requests share, and the beginning that all contexts of a call share, are read once.
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
        """mode, tokenizer, max_length: of `load_model`. learn: "all", "prompt" (not from what it
        writes or is scored on), "none". seed: of sampling, one more for each repeat of a request.
        batch_size: requests at once; "auto".
        device: what the harness's command always gives; JAX chooses its own (JAX_PLATFORMS).
        Raises UserError for what does not fit.
        """
        super().__init__()
        if learn not in LEARN:
            raise UserError(f"learn={learn} is unknown; choose from {', '.join(LEARN)}")
        if learn == "none" and mode not in ("", "off"):
            raise UserError(f"learn=none and mode={mode} contradict each other")
        self._workdir, self._seed = str(workdir), seed
        self._size = _batch_size(batch_size, max_batch_size)
        self._learn = learn == "all"
        self._opened: LoadedModel = load_model(
            self._workdir,
            tokenizer=tokenizer,
            mode="off" if learn == "none" else mode,
            max_length=max_length,
        )
        self._scorer = Scorer(self._engine)

    @property
    def _engine(self) -> Engine:
        return self._opened.engine

    # --- what the harness asks of every model ---------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """EOS, or BOS where there is none."""
        return self._special("eos_id", "bos_id")

    @property
    def prefix_token_id(self) -> int:
        """What a text without context begins with: BOS, or EOS where there is none."""
        return self._special("bos_id", "eos_id")

    def _special(self, *names: str) -> int:
        found = [getattr(self._opened.tokenizer, name) for name in names]
        known = [token for token in found if token is not None]
        if not known:
            raise UserError(
                "the tokenizer has neither BOS nor EOS, so nothing comes before the first token of "
                "a text and it has no probability"
            )
        return known[0]

    @property
    def tokenizer_name(self) -> str:
        """Tells cached requests of different tokenizers apart."""
        return f"tttjax-{self._opened.tokenizer_fingerprint[:16]}"

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results."""
        reader = self._engine.inference_model
        return {
            "workdir": self._workdir,
            "model_fingerprint": self._opened.model_fingerprint,
            "chunk_size": reader.chunk_size,  # 0: it does not learn
            "inner_lr": float(reader.lr),
            "learns_from_answers": self._learn,
        }

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokens of a text; BOS is put before a context when it is read, unless asked for here.

        Raises UserError for a text with a lone surrogate.
        """
        check_unicode(string, f"the text of a request, {string[:40]!r},")
        tokens = self._opened.tokenizer.encode(string).tolist()
        return [self.prefix_token_id, *tokens] if add_special_tokens else tokens

    # --- likelihood -----------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether greedy decoding would write it) of each."""
        by_context: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, _) in enumerate(requests):
            by_context.setdefault(self._begun(context), []).append(i)
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="loglikelihood")
        with as_configured(self._opened.config):
            for contexts, sessions in self._read(list(by_context)):
                asked = [
                    (i, session)
                    for context, session in zip(contexts, sessions, strict=True)
                    for i in by_context[context]
                ]
                texts = [np.asarray(requests[i][2], np.int32) for i, _ in asked]
                scores = self._scores([session for _, session in asked], texts)
                for (i, _), score in zip(asked, scores, strict=True):
                    answers[i] = (
                        -float(np.sum(score.nll_T, dtype=np.float64)),
                        all(score.is_top_T),
                    )
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
                bar.update(len(asked))
        bar.close()
        return answers

    def _scores(self, sessions: Sequence[Session], texts: Sequence[np.ndarray]) -> list[Score]:
        """Short continuations together, a batch at a time; long ones alone, in pieces."""
        found: dict[int, Score] = {}
        short = sorted(
            (i for i, text_T in enumerate(texts) if len(text_T) <= SHORT),
            key=lambda i: len(texts[i]),
        )
        for part in _parts(short, self._size):
            scores = score_batch(
                self._engine,
                [sessions[i] for i in part],
                [texts[i] for i in part],
                learn=self._learn,
            )
            found.update(zip(part, scores, strict=True))
        for i, text_T in enumerate(texts):
            if i not in found:
                found[i] = self._scorer.score(sessions[i], text_T, learn=self._learn)[1]
        return [found[i] for i in range(len(texts))]

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, read from its beginning to its end in one session.

        However long it is: nothing is cut into windows.
        """
        answers = []
        with as_configured(self._opened.config):
            (_, (begun,)) = next(self._read([(self.prefix_token_id,)]))
            for request in tqdm(requests, disable=disable_tqdm, desc="loglikelihood_rolling"):
                text_T = np.asarray(self.tok_encode(request.args[0]), np.int32)
                # The text is what is read here, so it is learned from unless nothing is.
                _, score = self._scorer.score(begun, text_T)
                answers.append(-float(np.sum(score.nll_T, dtype=np.float64)))
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, answers[-1])
        return answers

    # --- writing --------------------------------------------------------------------------------

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """What is written after each context, without the string that ended it."""
        wishes = [_wishes(request.args[1]) for request in requests]
        contexts = [self._begun(self.tok_encode(request.args[0])) for request in requests]
        seeds = [self._seed + n for n in _earlier(contexts)]  # repeats are drawn anew
        answers = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: len(contexts[i]))
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until")
        with as_configured(self._opened.config):
            at = 0
            for part, sessions in self._read([contexts[i] for i in order]):
                places = order[at : at + len(part)]
                at += len(part)
                asked = [
                    Request(session, prompt=context, seed=seeds[i], **wishes[i])
                    for i, session, context in zip(places, sessions, part, strict=True)
                ]
                writer = Generator(self._engine, self._opened.tokenizer, asked, learn=self._learn)
                for piece in writer:
                    answers[places[piece.request]] += piece.text
                for i in places:
                    self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
                bar.update(len(places))
        bar.close()
        return answers

    # --- reading --------------------------------------------------------------------------------

    def _begun(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """A context as it is read: after BOS, like the texts that the model was trained on."""
        bos = self._opened.tokenizer.bos_id
        if not tokens:
            return (self.prefix_token_id,)
        if bos is None or tokens[0] == bos:
            return tuple(tokens)
        return (bos, *tokens)

    def _read(
        self, contexts: Sequence[tuple[int, ...]]
    ) -> Iterator[tuple[Sequence[tuple[int, ...]], list[Session]]]:
        """Contexts and sessions that have read them, a batch at a time."""
        if not contexts:
            return
        shared = _shared(contexts)
        begun, _ = self._engine.read(self._engine.start(), np.asarray(shared, np.int32))
        for part in _parts(contexts, self._size):
            rests = [np.asarray(context[len(shared) :], np.int32) for context in part]
            read = self._engine.read_batch([begun] * len(part), rests)
            yield part, [session for session, _ in read]


def _batch_size(wanted: int | str, most: int | None) -> int:
    if isinstance(wanted, str) and wanted.startswith("auto"):
        return min(AUTO_BATCH, most or AUTO_BATCH)
    size = read_number(str(wanted))
    if not isinstance(size, int) or size < 1:
        raise UserError(f"batch_size={wanted} must be a number of at least 1, or auto")
    return size


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[at : at + size] for at in range(0, len(items), size))


def _earlier(items: Sequence[Any]) -> list[int]:
    """Of each item, how many before it are equal to it."""
    counts: Counter[Any] = Counter()
    found = []
    for item in items:
        found.append(counts[item])
        counts[item] += 1
    return found


def _shared(contexts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The tokens with which all of them begin."""
    low, high = min(contexts), max(contexts)
    pairs = zip(low, high, strict=False)
    return tuple(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _wishes(wanted: dict[str, Any]) -> dict[str, Any]:
    """Fields of a `Request` from a task's generation_kwargs. UserError for one that is unknown."""
    known = {"until", "do_sample", *TOKEN_LIMITS, *SAMPLING}
    if unknown := sorted(set(wanted) - known):
        raise UserError(
            f"the generation option {unknown[0]} of this task is not known here (known: "
            f"{', '.join(sorted(known))})"
        )
    sampling = {name: wanted[name] for name in SAMPLING if wanted.get(name) is not None}
    if not wanted.get("do_sample", False):
        sampling["temperature"] = 0.0
    until = wanted.get("until") or []
    for stop in [until] if isinstance(until, str) else until:
        check_unicode(stop, "a stop string of this task")
    limits = [wanted[name] for name in TOKEN_LIMITS if wanted.get(name) is not None]
    tokens = read_number(str(next(iter(limits), MAX_TOKENS)))
    if not isinstance(tokens, int) or not 1 <= tokens <= INT_MAX:
        raise UserError(
            f"this task is to write {limits[0]} tokens: not a number from 1 to {INT_MAX}"
        )
    return {
        "sampling": Sampling(**sampling),
        "max_tokens": tokens,
        "stop": tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
    }
