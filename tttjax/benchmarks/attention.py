"""Attention in every implementation: time and temporary memory."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from tttjax.benchmarks.timing import check_rounds, median_seconds, quotient, temporary_bytes
from tttjax.errors import UserError
from tttjax.ops.attention.attend import AttentionMask, attend, attend_sequence, mask_fn
from tttjax.ops.attention.library import attend_whole, unsupported_reason_here
from tttjax.ops.attention.library import unsupported_reason as library_unsupported_reason
from tttjax.ops.window_attention import window_attention, window_attention_jvp
from tttjax.ops.window_attention.select import unsupported_reason as kernel_unsupported_reason
from tttjax.parallel.mesh import make_mesh
from tttjax.training.attention_kernels import platform_of
from tttjax.types import Array

DTYPES = ("float32", "bfloat16")
QUERY_BLOCK = 1024  # of attention over a whole sequence in blocks
FIRST_FORM = {"chunk gradient": "dense", "chunk pair": "dense"}  # else "xla"


@dataclass(frozen=True)
class AttentionBenchmark:
    """What one form costs in one task. speedup: over the task's first form, by medians.

    None where the device's memory is too small. memory_bytes: what the compiled program holds at
    its peak besides arguments and results, by the compiler's own account; None where it gives none.
    """

    task: str
    form: str
    seconds: float | None
    speedup: float | None
    memory_bytes: int | None


@dataclass(frozen=True)
class AttentionSizes:
    """Of what is measured; the chunk is the last of a window that is full."""

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
    """Measures all forms of all tasks that apply here.

    Raises UserError for a size below one and for an unknown dtype.
    """
    sizes = sizes or AttentionSizes()
    check_rounds(rounds)
    for name, value in asdict(sizes).items():
        if name != "dtype" and value < 1:
            raise UserError(f"{name}={value} must be at least 1.")
    if sizes.dtype not in DTYPES:
        raise UserError(f"dtype={sizes.dtype!r} must be one of {', '.join(DTYPES)}.")
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
                medians.get((task, FIRST_FORM.get(task, "xla"))), medians.get((task, form))
            ),
            memory_bytes=temporary_bytes(programs[task, form]),
        )
        for task, form in programs
    ]


Task = tuple[str, str, Callable, tuple]  # name, form, function, its arguments


def _random(sizes: AttentionSizes, lengths: tuple[int, ...]) -> tuple[Array, ...]:
    keys = jax.random.split(jax.random.key(0), len(lengths))
    per_token = (sizes.heads, sizes.head_dim)
    return tuple(
        jax.random.normal(key, (sizes.batch, length, *per_token), sizes.dtype)
        for key, length in zip(keys, lengths, strict=True)
    )


def absent(sizes: AttentionSizes) -> dict[str, str]:
    """The forms that are not measured, and why."""
    platform = platform_of(make_mesh(devices=jax.devices()[:1]))
    heads = sizes.heads, sizes.head_dim
    dtype = jnp.dtype(sizes.dtype)
    chunk, sequence = (sizes.batch, sizes.chunk, *heads), (sizes.seq_len, *heads)
    whole = jax.ShapeDtypeStruct(sequence, dtype)
    reasons = {
        "pallas": kernel_unsupported_reason(platform, chunk, sizes.window, dtype),
        "library": library_unsupported_reason(platform, whole, AttentionMask())
        or unsupported_reason_here(platform, whole),
    }
    return {form: reason for form, reason in reasons.items() if reason}


def _chunk_tasks(sizes: AttentionSizes) -> Iterator[Task]:
    window, attention_mask = sizes.window, AttentionMask(window=sizes.window)
    arguments = _random(sizes, (sizes.chunk, window, window, sizes.chunk, sizes.chunk))
    tangents = tuple(jnp.roll(x, 1, axis=1) for x in arguments)
    position = jnp.asarray(window, jnp.int32)

    def dense(q, k_past, v_past, k_own, v_own):
        place_S = jnp.arange(window + sizes.chunk)
        seen_TS = mask_fn(place_S[window:], place_S, attention_mask)
        k, v = (jnp.concatenate(x, axis=1) for x in ((k_past, k_own), (v_past, v_own)))
        return jax.vmap(partial(attend, seen_TS=seen_TS))(q, k, v)

    def blocked(attention, kernel):
        return lambda *chunk: attention(*chunk, position, attention_mask, kernel=kernel)

    kernels = ["xla"] if "pallas" in absent(sizes) else ["xla", "pallas"]
    yield "chunk gradient", "dense", _gradient_of_own(dense), arguments
    for kernel in kernels:
        yield (
            "chunk gradient",
            kernel,
            _gradient_of_own(blocked(window_attention, kernel)),
            arguments,
        )
    yield "chunk pair", "dense", _gradient_of_pair(dense), (arguments, tangents)
    for kernel in kernels:
        function = _gradient_of_pair(blocked(window_attention_jvp, kernel))
        yield "chunk pair", kernel, function, (arguments, tangents)


def _gradient_of_own(attention: Callable) -> Callable:
    """Value and gradient with past keys and values as constants."""

    def loss(own, past):
        q, k_own, v_own = own
        return jnp.sum(jnp.sin(attention(q, *past, k_own, v_own).astype(jnp.float32)))

    def function(q, k_past, v_past, k_own, v_own):
        return jax.value_and_grad(loss)((q, k_own, v_own), (k_past, v_past))

    return function


def _gradient_of_pair(attention: Callable) -> Callable:
    """The gradient, in all arguments, of a scalar of the value and its tangent along `dot`."""

    def scalar(chunk, dot):
        q_dot, _, _, k_dot, v_dot = dot

        def of_own(q, k_own, v_own):
            return attention(q, chunk[1], chunk[2], k_own, v_own)

        own = chunk[0], chunk[3], chunk[4]
        pair = jax.jvp(of_own, own, (q_dot, k_dot, v_dot))
        return sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in pair)

    return jax.grad(scalar)


def _sequence_tasks(sizes: AttentionSizes) -> Iterator[Task]:
    arguments = _random(sizes, (sizes.seq_len,) * 3)
    for task, attention_mask in (
        ("sequence, full", AttentionMask()),
        ("sequence, window", AttentionMask(window=sizes.window)),
    ):
        forms: dict[str, Callable] = {"xla": attend_sequence}
        if "library" not in absent(sizes):
            forms["library"] = attend_whole
        for form, attention in forms.items():
            one = partial(attention, attention_mask=attention_mask, query_block=QUERY_BLOCK)

            def loss(q, k, v, one=one):
                return jnp.sum(jnp.sin(jax.vmap(one)(q, k, v).astype(jnp.float32)))

            yield task, form, jax.value_and_grad(loss, (0, 1, 2)), arguments
