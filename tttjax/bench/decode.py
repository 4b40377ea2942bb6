"""Writing token by token: time of a token by what was read before, for any systems and batches.

  tttjax bench decode --read=1024,4096,16384,65536 --batch=1,8,32 \\
      --config=experiments/mid_size.py:ttt_e2e --config=experiments/mid_size.py:full

Random weights read so many random tokens; then R requests go on from there together, a token each,
for as long as a chunk of the inner loop, which ends with its update (128 tokens where nothing is
learned). Full attention has room for just what is read and written. All are run in turn, round
after round, each from its own place; times are medians over steps and rounds.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import jax
import numpy as np

from tttjax.bench.options import add_configs, add_measuring, load_configs
from tttjax.bench.timing import check_rounds
from tttjax.config import Config
from tttjax.errors import UserError
from tttjax.flag_types import int32, list_of
from tttjax.inference.engine import Engine, Group
from tttjax.inference.reading import make_reader
from tttjax.inference.session import Session
from tttjax.meta import make_inner_loop
from tttjax.models import build_model
from tttjax.precision import as_configured

STATIC_STRETCH = 128  # tokens of a round where there are no chunks


@dataclass(frozen=True)
class DecodeBenchmark:
    """What writing costs one system. read: tokens before. batch: requests that go on together.

    step_seconds: median, of a token for every request. token_seconds: the same with the updates'
    time spread over the tokens of their chunk. tokens_per_second: of all requests, updates
    included. ratio: token_seconds to those with the fewest tokens read.
    """

    name: str
    read: int
    batch: int
    step_seconds: float
    token_seconds: float
    tokens_per_second: float
    ratio: float


@dataclass
class _Entry:
    name: str
    config: Config
    read: int
    batch: int
    group: Group
    chunk: int
    steps: list[float]
    rounds: list[float]


def bench_decode(
    configs: Sequence[tuple[str, Config]],
    read: Sequence[int],
    batches: Sequence[int] = (1,),
    rounds: int = 5,
) -> list[DecodeBenchmark]:
    """Measures the named configurations after so many tokens read, in batches of so many requests.

    Raises UserError for a size below one.
    """
    check_rounds(rounds)
    for name, values in (("read", read), ("batch", batches)):
        if min(values, default=0) < 1:
            raise UserError(f"{name}={list(values)} must be numbers of at least 1.")
    entries = [
        _Entry(name, config, length, batch, engine.together([session] * batch), chunk, [], [])
        for name, config in configs
        for length, engine, session, chunk in _read(config, sorted(read), rounds)
        for batch in batches
    ]
    for _ in range(rounds + 1):  # the first one compiles, and warms caches
        for entry in entries:
            with as_configured(entry.config):
                _round(entry)
    return [_result(entry, entries) for entry in entries]


def _read(
    config: Config, lengths: Sequence[int], rounds: int
) -> Iterator[tuple[int, Engine, Session, int]]:
    """(tokens read, the engine, the session that has read them, tokens of a round)."""
    with as_configured(config):
        model = build_model(config.model, config.inner)
        reader = make_reader(model, make_inner_loop(config.inner), config.inner.lr)
        chunk = reader.chunk_size or STATIC_STRETCH
        params = jax.jit(model.init)(jax.random.key(0))

        def start(length: int) -> tuple[Engine, Session]:
            engine = Engine(reader, params, max_length=length + chunk * (rounds + 1))
            return engine, engine.start()

        engine, session = start(lengths[0])
        for length in lengths:
            # What a token costs full attention is decided by the room that there is.
            if engine.has_whole:
                engine, session = start(length)
            session, _ = engine.read(session, _random(config, length - session.tokens))
            yield length, engine, session, chunk


def _random(config: Config, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(config.model.vocab_size, size=length, dtype=np.int32)


def _round(entry: _Entry) -> None:
    """A chunk's tokens for every request, and so one update of each."""
    seconds = []
    for token in _random(entry.config, entry.chunk).tolist():
        start = time.perf_counter()
        entry.group.step([token] * entry.batch)
        jax.block_until_ready(entry.group.logit_RV)
        seconds.append(time.perf_counter() - start)
    entry.steps.append(statistics.median(seconds))
    entry.rounds.append(sum(seconds) / len(seconds))


def _token_seconds(entry: _Entry) -> float:
    return statistics.median(entry.rounds[1:])


def _result(entry: _Entry, entries: Sequence[_Entry]) -> DecodeBenchmark:
    alike = [e for e in entries if (e.name, e.batch) == (entry.name, entry.batch)]
    shortest = min(alike, key=lambda e: e.read)
    seconds = _token_seconds(entry)
    return DecodeBenchmark(
        name=entry.name,
        read=entry.read,
        batch=entry.batch,
        step_seconds=statistics.median(entry.steps[1:]),
        token_seconds=seconds,
        tokens_per_second=entry.batch / seconds,
        ratio=seconds / _token_seconds(shortest),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax bench decode`."""
    add = parser.add_argument
    add_configs(parser)
    add(
        "--read",
        type=list_of(int32),
        default="1024,4096",
        metavar="T,T,...",
        help="before (default %(default)s)",
    )
    add(
        "--batch",
        type=list_of(int32),
        default="1",
        metavar="R,R,...",
        help="requests together (default %(default)s)",
    )
    add_measuring(parser, "measured rounds of each")


def run(args: argparse.Namespace) -> int:
    """`tttjax bench decode` from parsed arguments; the exit code."""
    configs = load_configs(args.config, args.overrides)
    results = bench_decode(configs, args.read, args.batch, args.rounds)
    print(json.dumps([asdict(result) for result in results]) if args.json else _table(results))
    return 0


def _table(results: Sequence[DecodeBenchmark]) -> str:
    width = max(len(result.name) for result in results)
    lines = [f"{'':{width}}  batch     read    step ms   token ms   tokens/s  to the shortest"]
    for r in results:
        lines.append(
            f"{r.name:{width}}  {r.batch:5}  {r.read:7}  {1e3 * r.step_seconds:9.3f}  "
            f"{1e3 * r.token_seconds:9.3f}  {r.tokens_per_second:9,.1f}  {r.ratio:15.2f}"
        )
    return "\n".join(lines)
