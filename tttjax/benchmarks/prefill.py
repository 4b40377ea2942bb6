"""Benchmark of prefill: time by prompt length and batch size."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from tttjax.benchmarks.timing import (
    cell,
    check_rounds,
    mebibytes,
    median_seconds,
    none_if_out_of_memory,
    quotient,
    temporary_bytes,
)
from tttjax.config import Config
from tttjax.errors import UserError
from tttjax.inference.prefill import init_context, make_inference_model, prefill, split_weights
from tttjax.models.transformer import build_model
from tttjax.parallel.precision import x64_if_configured
from tttjax.ttt.outer_loss import make_inner_loop


@dataclass(frozen=True)
class PrefillBenchmark:
    """Prefill cost of one system. seconds: median, of the whole batch.

    ratio: of seconds to the last configuration. Times are None if the device runs out of memory.
    state_bytes: inference state of one sequence, fast weights included. memory_bytes: peak
    temporary memory as the compiler reports it; None if it does not.
    """

    name: str
    length: int
    batch: int
    seconds: float | None
    tokens_per_second: float | None
    ratio: float | None
    state_bytes: int
    memory_bytes: int | None


def bench_prefill(
    configs: Sequence[tuple[str, Config]], length: int, batch: int = 1, rounds: int = 5
) -> list[PrefillBenchmark]:
    """Measures the configurations on prompts of `length` tokens.

    Raises UserError for a size below one.
    """
    check_rounds(rounds)
    for name, value in (("length", length), ("batch", batch)):
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1.")
    programs, runs, state_bytes = {}, {}, {}
    for i, (_, config) in enumerate(configs):
        with x64_if_configured(config):
            state_bytes[i] = _state_bytes(config, length)
            if compiled := none_if_out_of_memory(partial(_compile, config, length, batch)):
                programs[i], arguments = compiled
                runs[i] = partial(programs[i], *arguments)
    medians = median_seconds(runs, rounds)
    return [
        PrefillBenchmark(
            name=name,
            length=length,
            batch=batch,
            seconds=medians.get(i),
            tokens_per_second=quotient(batch * length, medians.get(i)),
            ratio=quotient(medians.get(i), medians.get(len(configs) - 1)),
            state_bytes=state_bytes[i],
            memory_bytes=temporary_bytes(programs[i]) if i in programs else None,
        )
        for i, (name, _) in enumerate(configs)
    ]


def _make_models(config: Config):
    model = build_model(config.model, config.inner)
    return model, make_inference_model(model, make_inner_loop(config.inner), config.inner.lr)


def _compile(config: Config, length: int, batch: int) -> tuple[Any, tuple]:
    """The compiled program and its arguments: weights, initial state, tokens."""
    model, inference_model = _make_models(config)
    params = jax.jit(model.init)(jax.random.key(0))
    weights = jax.jit(partial(split_weights, inference_model))(params)
    context = jax.jit(partial(init_context, inference_model, batch=batch, max_length=length))(
        params
    )
    tokens = np.random.default_rng(0).integers(
        config.model.vocab_size, size=(batch, length), dtype=np.int32
    )
    arguments = weights, context, tokens
    return jax.jit(partial(prefill, inference_model)).lower(*arguments).compile(), arguments


def _state_bytes(config: Config, length: int) -> int:
    model, inference_model = _make_models(config)
    make = partial(init_context, inference_model, batch=1, max_length=length)
    leaves = jax.tree.leaves(jax.eval_shape(make, model.abstract_params()))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def format_table(results: Sequence[PrefillBenchmark]) -> str:
    width = max(len(result.name) for result in results)
    lines = [f"{'':{width}}   tokens    seconds    tokens/s  ratio  state MiB  memory MiB"]
    for r in results:
        lines.append(
            f"{r.name:{width}}  {r.length:7}  {cell(r.seconds, '9.3f')}  "
            f"{cell(r.tokens_per_second, '10,.0f')}  {cell(r.ratio, '5.2f')}  "
            f"{mebibytes(r.state_bytes, 1):>9}  {mebibytes(r.memory_bytes):>10}"
        )
    return "\n".join(lines)
