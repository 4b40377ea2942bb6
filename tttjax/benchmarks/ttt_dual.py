"""Benchmark of the dual and primal forms of TTT layers: time and temporary memory."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from tttjax.benchmarks.timing import check_sizes, median_seconds, quotient, temporary_bytes
from tttjax.errors import UserError
from tttjax.ops.ttt import FORMS, InnerNorm, learning_rates, ttt
from tttjax.types import Array

INNER_MODELS = ("linear", "mlp")
TASKS = ("forward", "gradient")


@dataclass(frozen=True)
class DualBenchmark:
    """Cost of one inner model in both forms. task: "forward", or "gradient" (includes forward).

    speedup: primal_seconds / dual_seconds, medians. Times are None if the device runs out of
    memory. Memory: peak temporary memory as the compiler reports it; None if it does not.
    """

    inner: str
    task: str
    seq_len: int
    dual_seconds: float | None
    primal_seconds: float | None
    speedup: float | None
    dual_memory_bytes: int | None
    primal_memory_bytes: int | None


@dataclass(frozen=True)
class DualSizes:
    """Array sizes. chunk: tokens of an inner mini-batch."""

    batch: int = 1
    heads: int = 4
    head_dim: int = 64
    chunk: int = 16


def bench_ttt_dual(
    seq_lens: Sequence[int] = (2048,), sizes: DualSizes | None = None, rounds: int = 5
) -> list[DualBenchmark]:
    """Measures both forms for each length, inner model and task, in float32.

    Raises UserError for a size below one.
    """
    sizes = sizes or DualSizes()
    check_sizes(rounds, **asdict(sizes))
    if not seq_lens or min(seq_lens) < 1:
        raise UserError(f"seq_len={list(seq_lens)} must be lengths of at least 1 token.")
    return [result for length in seq_lens for result in _bench_length(length, sizes, rounds)]


def _bench_length(length: int, sizes: DualSizes, rounds: int) -> list[DualBenchmark]:
    arguments = {inner: _arguments(inner, length, sizes) for inner in INNER_MODELS}
    programs: dict[tuple[str, str, str], Any] = {}
    for inner in INNER_MODELS:
        for task in TASKS:
            for form in FORMS:
                function = _task(task, form, sizes)
                compiled = jax.jit(function).lower(arguments[inner]).compile()
                programs[inner, task, form] = compiled
    runs = {key: partial(program, arguments[key[0]]) for key, program in programs.items()}
    medians = median_seconds(runs, rounds)
    memory = {key: temporary_bytes(program) for key, program in programs.items()}
    return [
        DualBenchmark(
            inner=inner,
            task=task,
            seq_len=length,
            dual_seconds=(dual := medians.get((inner, task, "dual"))),
            primal_seconds=(primal := medians.get((inner, task, "primal"))),
            speedup=quotient(primal, dual),
            dual_memory_bytes=memory[inner, task, "dual"],
            primal_memory_bytes=memory[inner, task, "primal"],
        )
        for inner in INNER_MODELS
        for task in TASKS
    ]


def _arguments(inner: str, length: int, sizes: DualSizes) -> dict[str, Any]:
    """Random tokens [B, T, H, K] and the initial weights of an inner model."""
    tokens = (sizes.batch, length, sizes.heads, sizes.head_dim)
    hidden = sizes.head_dim * (4 if inner == "mlp" else 1)
    w1_shape, w2_shape = (sizes.head_dim, hidden), (hidden, sizes.head_dim)
    keys = jax.random.split(jax.random.key(0), 6)
    normal = jax.random.normal
    weights = {
        "w1": 0.02 * normal(keys[0], (sizes.heads, *w1_shape)),
        "b1": jnp.zeros((sizes.heads, hidden)),
    }
    if inner == "mlp":
        weights["w2"] = 0.02 * normal(keys[1], (sizes.heads, *w2_shape))
        weights["b2"] = jnp.zeros((sizes.heads, sizes.head_dim))
    q, k, v = (normal(key, tokens) for key in keys[2:5])
    lam = jax.nn.sigmoid(normal(keys[5], tokens[:-1]))
    return {"tokens": (q, k, v, lam), "weights": weights}


def _task(task: str, form: str, sizes: DualSizes) -> Callable[[dict[str, Any]], Any]:
    forward = partial(_forward, form=form, sizes=sizes)
    if task == "forward":
        return forward
    return jax.value_and_grad(lambda arguments: jnp.mean(jnp.square(forward(arguments))))


def _forward(arguments: dict[str, Any], form: str, sizes: DualSizes) -> Array:
    base_lr = 0.1 if "w2" in arguments["weights"] else 1.0  # as in the paper
    rate_C = learning_rates(base_lr, sizes.head_dim, jnp.zeros(sizes.chunk))
    per_head = (sizes.heads, sizes.head_dim)
    norm = InnerNorm(jnp.ones(per_head), jnp.zeros(per_head), 1e-6)

    def one_sequence(q_THK, k_THK, v_THK, lam_TH):
        tokens = q_THK, k_THK, v_THK, lam_TH
        return ttt(*tokens, rate_C, arguments["weights"], norm, form=form)[0]

    return jax.vmap(one_sequence)(*arguments["tokens"])
