"""Benchmark of decoding: time per token by context length and batch size."""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from tttjax.benchmarks.timing import check_rounds
from tttjax.config import Config
from tttjax.errors import UserError
from tttjax.inference.engine import DecodeBatch, Engine
from tttjax.inference.prefill import make_inference_model
from tttjax.inference.session import Session
from tttjax.models.transformer import build_model
from tttjax.parallel.precision import x64_if_configured
from tttjax.ttt.outer_loss import make_inner_loop

STATIC_ROUND_TOKENS = 128  # of a model without an inner loop


@dataclass(frozen=True)
class DecodeBenchmark:
    """Decoding cost of one system. read: prefilled tokens. batch: batch size.

    step_seconds: median time of a decode step. token_seconds: the same with the time of inner
    updates spread over the tokens of their chunk. tokens_per_second: of the whole batch, updates
    included. ratio: of token_seconds to those at the shortest context.
    """

    name: str
    read: int
    batch: int
    step_seconds: float
    token_seconds: float
    tokens_per_second: float
    ratio: float


@dataclass
class _DecodeEntry:
    name: str
    config: Config
    read: int
    batch: int
    decode_batch: DecodeBatch
    round_tokens: int
    step_seconds: list[float]
    token_seconds: list[float]


def bench_decode(
    configs: Sequence[tuple[str, Config]],
    read: Sequence[int],
    batches: Sequence[int] = (1,),
    rounds: int = 5,
) -> list[DecodeBenchmark]:
    """Measures decoding after `read` prefilled tokens, at each batch size.

    Raises UserError for a size below one.
    """
    check_rounds(rounds)
    for name, values in (("read", read), ("batch", batches)):
        if min(values, default=0) < 1:
            raise UserError(f"{name}={list(values)} must be numbers of at least 1.")
    entries = [
        _DecodeEntry(
            name, config, length, batch, engine.start_batch([session] * batch), tokens, [], []
        )
        for name, config in configs
        for length, engine, session, tokens in _prefill(config, sorted(read), rounds)
        for batch in batches
    ]
    for _ in range(rounds + 1):  # the first one compiles and warms caches
        for entry in entries:
            with x64_if_configured(entry.config):
                _round(entry)
    return [_result(entry, entries) for entry in entries]


def _prefill(
    config: Config, lengths: Sequence[int], rounds: int
) -> Iterator[tuple[int, Engine, Session, int]]:
    """(prefilled tokens, engine, session, tokens of a round) for each length."""
    with x64_if_configured(config):
        model = build_model(config.model, config.inner)
        inference_model = make_inference_model(
            model, make_inner_loop(config.inner), config.inner.lr
        )
        round_tokens = inference_model.chunk_size or STATIC_ROUND_TOKENS
        params = jax.jit(model.init)(jax.random.key(0))

        def start(length: int) -> tuple[Engine, Session]:
            engine = Engine(inference_model, params, length + round_tokens * (rounds + 1))
            return engine, engine.start()

        engine, session = start(lengths[0])
        for length in lengths:
            # The cost of full attention depends on the cache capacity.
            if engine.has_full_attention:
                engine, session = start(length)
            session, _ = engine.read(session, _random(config, length - session.tokens))
            yield length, engine, session, round_tokens


def _random(config: Config, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(config.model.vocab_size, size=length, dtype=np.int32)


def _round(entry: _DecodeEntry) -> None:
    """Decodes one chunk for every request, with one inner update each."""
    seconds = []
    for token in _random(entry.config, entry.round_tokens).tolist():
        start = time.perf_counter()
        entry.decode_batch.step([token] * entry.batch)
        jax.block_until_ready(entry.decode_batch.logit_RV)
        seconds.append(time.perf_counter() - start)
    entry.step_seconds.append(statistics.median(seconds))
    entry.token_seconds.append(sum(seconds) / len(seconds))


def _token_seconds(entry: _DecodeEntry) -> float:
    return statistics.median(entry.token_seconds[1:])


def _result(entry: _DecodeEntry, entries: Sequence[_DecodeEntry]) -> DecodeBenchmark:
    comparable = [e for e in entries if (e.name, e.batch) == (entry.name, entry.batch)]
    shortest = min(comparable, key=lambda e: e.read)
    seconds = _token_seconds(entry)
    return DecodeBenchmark(
        name=entry.name,
        read=entry.read,
        batch=entry.batch,
        step_seconds=statistics.median(entry.step_seconds[1:]),
        token_seconds=seconds,
        tokens_per_second=entry.batch / seconds,
        ratio=seconds / _token_seconds(shortest),
    )


def format_table(results: Sequence[DecodeBenchmark]) -> str:
    width = max(len(result.name) for result in results)
    lines = [f"{'':{width}}  batch     read    step ms   token ms   tokens/s  to the shortest"]
    for r in results:
        lines.append(
            f"{r.name:{width}}  {r.batch:5}  {r.read:7}  {1e3 * r.step_seconds:9.3f}  "
            f"{1e3 * r.token_seconds:9.3f}  {r.tokens_per_second:9,.1f}  {r.ratio:15.2f}"
        )
    return "\n".join(lines)
