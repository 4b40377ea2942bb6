"""Benchmark of the attention implementations: time and temporary memory."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from tttjax.benchmarks.timing import check_sizes, median_seconds, quotient, temporary_bytes
from tttjax.ops.attention.attend import AttentionMask, attend, attend_blocked, mask_fn
from tttjax.ops.attention.library import attend_sequence, unsupported_reason_on_backend
from tttjax.ops.attention.library import unsupported_reason as library_unsupported_reason
from tttjax.ops.window_attention import window_attention, window_attention_jvp
from tttjax.ops.window_attention.select import unsupported_reason as kernel_unsupported_reason
from tttjax.parallel.mesh import make_mesh
from tttjax.training.attention_kernels import platform_of
from tttjax.types import Array

QUERY_BLOCK = 1024  # of blocked attention over a whole sequence
BASELINE_FORM = {"chunk gradient": "dense", "chunk pair": "dense"}  # else "xla"


@dataclass(frozen=True)
class AttentionBenchmark:
    """Cost of one form in one task. speedup: over the task's baseline form, by medians.

    Times are None if the device runs out of memory. memory_bytes: peak temporary memory as the
    compiler reports it; None if it does not.
    """

    task: str
    form: str
    seconds: float | None
    speedup: float | None
    memory_bytes: int | None


@dataclass(frozen=True)
class AttentionSizes:
    """Array sizes. The chunk follows a full window of keys."""

    batch: int = 1
    heads: int = 4
    head_dim: int = 64
    chunk: int = 128
    window: int = 512
    seq_len: int = 2048
    dtype: str = "float32"


def bench_attention(
    sizes: AttentionSizes | None = None, rounds: int = 5
) -> list[AttentionBenchmark]:
    """Measures all tasks in all forms that this machine supports.

    Raises UserError for a size below one and for an unknown dtype.
    """
    sizes = sizes or AttentionSizes()
    check_sizes(rounds, **asdict(sizes))
    programs: dict[tuple[str, str], Any] = {}
    runs: dict[tuple[str, str], Callable[[], Any]] = {}
    for task, form, function, arguments in (*_chunk_tasks(sizes), *_sequence_tasks(sizes)):
        programs[task, form] = jax.jit(function).lower(*arguments).compile()
        runs[task, form] = partial(programs[task, form], *arguments)
    medians = median_seconds(runs, rounds)
    return [
        AttentionBenchmark(
            task=task,
            form=form,
            seconds=medians.get((task, form)),
            speedup=quotient(
                medians.get((task, BASELINE_FORM.get(task, "xla"))), medians.get((task, form))
            ),
            memory_bytes=temporary_bytes(programs[task, form]),
        )
        for task, form in programs
    ]


Task = tuple[str, str, Callable, tuple]  # name, form, function, arguments


def _random(sizes: AttentionSizes, lengths: tuple[int, ...]) -> tuple[Array, ...]:
    keys = jax.random.split(jax.random.key(0), len(lengths))
    per_token = (sizes.heads, sizes.head_dim)
    return tuple(
        jax.random.normal(key, (sizes.batch, length, *per_token), sizes.dtype)
        for key, length in zip(keys, lengths, strict=True)
    )


def unsupported_forms(sizes: AttentionSizes) -> dict[str, str]:
    """Forms that are not measured -> reason."""
    platform = platform_of(make_mesh(devices=jax.devices()[:1]))
    heads = sizes.heads, sizes.head_dim
    dtype = jnp.dtype(sizes.dtype)
    chunk, sequence = (sizes.batch, sizes.chunk, *heads), (sizes.seq_len, *heads)
    q_spec = jax.ShapeDtypeStruct(sequence, dtype)
    reasons = {
        "pallas": kernel_unsupported_reason(platform, chunk, sizes.window, dtype),
        "library": library_unsupported_reason(platform, q_spec, AttentionMask())
        or unsupported_reason_on_backend(platform, q_spec),
    }
    return {form: reason for form, reason in reasons.items() if reason}


def _chunk_tasks(sizes: AttentionSizes) -> Iterator[Task]:
    window, attention_mask = sizes.window, AttentionMask(window=sizes.window)
    arguments = _random(sizes, (sizes.chunk, window, window, sizes.chunk, sizes.chunk))
    tangents = tuple(jnp.roll(x, 1, axis=1) for x in arguments)
    position = jnp.asarray(window, jnp.int32)

    def dense(q, k_buffered, v_buffered, k, v):
        position_S = jnp.arange(window + sizes.chunk)
        mask_TS = mask_fn(position_S[window:], position_S, attention_mask)
        k, v = (jnp.concatenate(x, axis=1) for x in ((k_buffered, k), (v_buffered, v)))
        return jax.vmap(partial(attend, mask_TS=mask_TS))(q, k, v)

    def blocked(attention, kernel):
        return lambda *chunk: attention(*chunk, position, attention_mask, kernel=kernel)

    kernels = ["xla"] if "pallas" in unsupported_forms(sizes) else ["xla", "pallas"]
    yield "chunk gradient", "dense", _value_and_grad(dense), arguments
    for kernel in kernels:
        yield (
            "chunk gradient",
            kernel,
            _value_and_grad(blocked(window_attention, kernel)),
            arguments,
        )
    yield "chunk pair", "dense", _grad_of_value_and_tangent(dense), (arguments, tangents)
    for kernel in kernels:
        function = _grad_of_value_and_tangent(blocked(window_attention_jvp, kernel))
        yield "chunk pair", kernel, function, (arguments, tangents)


def _value_and_grad(attention: Callable) -> Callable:
    """Value and gradient; buffered keys and values are constants."""

    def loss(chunk, buffered):
        q, k, v = chunk
        return jnp.sum(jnp.sin(attention(q, *buffered, k, v).astype(jnp.float32)))

    def function(q, k_buffered, v_buffered, k, v):
        return jax.value_and_grad(loss)((q, k, v), (k_buffered, v_buffered))

    return function


def _grad_of_value_and_tangent(attention: Callable) -> Callable:
    """Gradient, for all arguments, of a scalar of the value and its tangent along `dot`."""

    def scalar(chunk, dot):
        q_dot, _, _, k_dot, v_dot = dot

        q, k_buffered, v_buffered, k, v = chunk

        def of_chunk(q, k, v):
            return attention(q, k_buffered, v_buffered, k, v)

        value_and_tangent = jax.jvp(of_chunk, (q, k, v), (q_dot, k_dot, v_dot))
        return sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in value_and_tangent)

    return jax.grad(scalar)


def _sequence_tasks(sizes: AttentionSizes) -> Iterator[Task]:
    arguments = _random(sizes, (sizes.seq_len,) * 3)
    for task, attention_mask in (
        ("sequence, full", AttentionMask()),
        ("sequence, window", AttentionMask(window=sizes.window)),
    ):
        forms: dict[str, Callable] = {"xla": attend_blocked}
        if "library" not in unsupported_forms(sizes):
            forms["library"] = attend_sequence
        for form, attention in forms.items():
            attend_one = partial(attention, attention_mask=attention_mask, query_block=QUERY_BLOCK)

            def loss(q, k, v, attend_one=attend_one):
                return jnp.sum(jnp.sin(jax.vmap(attend_one)(q, k, v).astype(jnp.float32)))

            yield task, form, jax.value_and_grad(loss, (0, 1, 2)), arguments
