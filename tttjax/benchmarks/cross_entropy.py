"""Benchmark of the cross-entropy implementations: time and temporary memory."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from tttjax.benchmarks.timing import check_sizes, median_seconds, quotient, temporary_bytes
from tttjax.ops.cross_entropy.blocked import Blocks
from tttjax.ops.cross_entropy.nll import blocked_nll, blocked_nll_jvp, token_nll
from tttjax.types import Array


@dataclass(frozen=True)
class CrossEntropyBenchmark:
    """Cost of one form in one task.

    task: "gradient" or "second". form: "dense" or "blocked"; in "second", the blocked form is given
    the residuals of the forward pass.

    speedup: over the dense form, by medians. Times are None if the device runs out of memory.
    memory_bytes: peak temporary memory as the compiler reports it; None if it does not.
    """

    task: str
    form: str
    seconds: float | None
    speedup: float | None
    memory_bytes: int | None


@dataclass(frozen=True)
class CrossEntropySizes:
    """Array sizes. rows: tokens. embed_dim: width of h.

    rows_block, vocab_block: the largest block of logits; vocab_block 0 is the whole vocabulary.
    """

    rows: int = 1024
    embed_dim: int = 256
    vocab: int = 32768
    rows_block: int = 256
    vocab_block: int = 0
    dtype: str = "float32"


def bench_cross_entropy(
    sizes: CrossEntropySizes | None = None, rounds: int = 5
) -> list[CrossEntropyBenchmark]:
    """Measures all forms of all tasks.

    Raises UserError for a size below one and for an unknown dtype.
    """
    sizes = sizes or CrossEntropySizes()
    counts = asdict(sizes)
    check_sizes(rounds, least=0, vocab_block=counts.pop("vocab_block"))
    check_sizes(rounds, **counts)
    arguments = _arguments(sizes)
    programs: dict[tuple[str, str], Any] = {}
    for key, function in _functions(sizes).items():
        programs[key] = jax.jit(function).lower(arguments).compile()
    runs = {key: partial(program, arguments) for key, program in programs.items()}
    medians = median_seconds(runs, rounds)
    return [
        CrossEntropyBenchmark(
            task=task,
            form=form,
            seconds=medians.get((task, form)),
            speedup=quotient(medians.get((task, "dense")), medians.get((task, form))),
            memory_bytes=temporary_bytes(programs[task, form]),
        )
        for task, form in programs
    ]


def _arguments(sizes: CrossEntropySizes) -> dict[str, Any]:
    """Random tokens, a head with logits of about unit variance, residuals of each loss."""
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (sizes.rows, sizes.embed_dim)
    h_TD, h_dot_TD = (jax.random.normal(key, shape, sizes.dtype) for key in keys[:2])
    head_DV = jax.random.normal(keys[2], (sizes.embed_dim, sizes.vocab), sizes.dtype)
    head_DV = head_DV * sizes.embed_dim**-0.5
    target_T = jax.random.randint(keys[3], (sizes.rows,), 0, sizes.vocab)
    residuals = blocked_nll(h_TD, head_DV, target_T, _blocks(sizes))[1]
    tokens = {"h": h_TD, "h_dot": h_dot_TD, "head": head_DV}
    return {**tokens, "target": target_T, "residuals": residuals}


def _blocks(sizes: CrossEntropySizes) -> Blocks:
    return Blocks(sizes.rows_block, sizes.vocab_block or None)


def _functions(sizes: CrossEntropySizes) -> dict[tuple[str, str], Callable[[dict[str, Any]], Any]]:
    blocks = _blocks(sizes)

    def dense(x, h_TD, head_DV):
        return token_nll(h_TD, head_DV, x["target"])

    def blocked(x, h_TD, head_DV):
        return blocked_nll(h_TD, head_DV, x["target"], blocks)[0]

    def blocked_jvp(x, h_TD, head_DV):
        return blocked_nll_jvp(h_TD, head_DV, x["target"], x["residuals"], blocks)

    return {
        ("gradient", "dense"): _gradient(dense),
        ("gradient", "blocked"): _gradient(blocked),
        ("second", "dense"): _second(dense),
        ("second", "blocked"): _second(blocked_jvp),
    }


def _gradient(nll: Callable[..., Array]) -> Callable[[dict[str, Any]], Any]:
    loss = lambda h_TD, head_DV, x: jnp.mean(nll(x, h_TD, head_DV))  # noqa: E731
    return lambda x: jax.value_and_grad(loss, (0, 1))(x["h"], x["head"], x)


def _second(nll: Callable[..., Array]) -> Callable[[dict[str, Any]], Any]:
    def both(h_TD, h_dot_TD, head_DV, x):
        loss = lambda h_TD: jnp.mean(nll(x, h_TD, head_DV))  # noqa: E731
        return sum(jax.jvp(loss, (h_TD,), (h_dot_TD,)))

    return lambda x: jax.grad(both, (0, 1, 2))(x["h"], x["h_dot"], x["head"], x)
