"""The fast form of the inner loop: the values of `outer_loss.forward_ttt`, with a custom VJP.

The parallel part of the model, below the lowest fast weight, runs once over the sequence, with
ordinary reverse mode. The loop over the sequential part has a custom VJP, for a batch of sequences.
Forward, per chunk,

    l_i, g_i = value and gradient of the chunk's loss in W_{i-1};  W_i = update(W_{i-1}, g_i).

Backward, the chunks come in reverse. Pulling the cotangent of W_i back through the update gives
cotangents of W_{i-1} and of g_i; call the latter v. The remaining contribution of a chunk is one
ordinary gradient, in W_{i-1}, the slow weights, the inputs and the cached keys and values, of the
scalar

    S = sum (cotangents x outputs) + d/de l_i(W_{i-1} + e v) at e = 0,

since <grad l, v> is a directional derivative: reverse over forward mode (arXiv 2505.00793) instead
of reverse over reverse. Gradients of slow weights are summed over the batch at once, never stored
per sequence.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tttjax.ttt.chunk import ChunkModel, ChunkRecords, Chunks
from tttjax.ttt.chunk_vjp import (
    BackwardCarry,
    BackwardRow,
    Cotangents,
    Row,
    SavedChunk,
    Shared,
    Start,
    backward_chunk,
    inexact_leaves,
    run_chunk,
)
from tttjax.ttt.kv_buffer import BufferState, KVBuffer
from tttjax.types import Array, PyTree


class LoopConfig(NamedTuple):
    """Settings of the loop.

    exact_chunks: as in `inner_loop.adapt`. trajectory: what is saved for the backward pass, one of
    `TRAJECTORIES`.
    """

    chunk_model: ChunkModel
    exact_chunks: int | None
    trajectory: str


class _Residuals(NamedTuple):
    """Residuals of the loop. saved: `SavedChunk` of every chunk, or `Start` of every segment."""

    slow: PyTree
    fast_end: PyTree
    chunks: Chunks
    lr: PyTree
    saved: PyTree
    buffered: PyTree


Result = tuple[ChunkRecords, PyTree]  # records, fast weights after the last chunk [B, ...]
InputCotangents = tuple[PyTree, PyTree, Chunks, PyTree]  # of slow, fast, chunks, lr
_Carry = tuple[Start, BufferState]


def make_loop(loop: LoopConfig) -> Callable[[PyTree, PyTree, Chunks, PyTree], Result]:
    """run(slow, fast, chunks, lr) -> (records, fast weights after the last chunk [B, ...]).

    slow, fast: by segment (`SplitModel.sequential_weights`), no batch; fast in its final dtype.
    lr: a scalar, or a tree like `fast` (`SplitModel.inner_rates`).
    The derivative is exact with respect to slow, fast, x and lr, for the losses, the NLL and the
    final fast weights. `grad_norm_NB` has no derivative.
    """
    forward, backward = TRAJECTORIES[loop.trajectory]

    @jax.custom_vjp
    def run(slow: PyTree, fast: PyTree, chunks: Chunks, lr: PyTree) -> Result:
        return forward(loop, slow, fast, chunks, lr)[0]

    run.defvjp(partial(forward, loop), partial(backward, loop))
    return run


# --- forward ----------------------------------------------------------------------------------


def _forward_rewind(
    loop: LoopConfig, slow: PyTree, fast: PyTree, chunks: Chunks, lr: PyTree
) -> tuple[Result, _Residuals]:
    """Saves the gradient of every chunk."""
    shared, rows = _share(loop, chunks, slow, lr)
    (end, buffers), (records, saved) = jax.lax.scan(
        partial(_step, shared), _first_carry(shared, fast), rows
    )
    result = records, end.fast
    return result, _Residuals(slow, end.fast, chunks, lr, saved, buffers.buffered)


def _forward_recompute(
    loop: LoopConfig, slow: PyTree, fast: PyTree, chunks: Chunks, lr: PyTree
) -> tuple[Result, _Residuals]:
    """Saves the fast weights before every segment of chunks."""
    shared, rows = _share(loop, chunks, slow, lr)

    def segment(carry: _Carry, rows: Row) -> tuple[_Carry, tuple[ChunkRecords, Start]]:
        start, _ = carry
        carry, (records, _) = jax.lax.scan(partial(_step, shared), carry, rows)
        return carry, (records, start)

    segments = _by_segment(rows, _segment_size(loop, rows))
    (end, buffers), (records, starts) = jax.lax.scan(segment, _first_carry(shared, fast), segments)
    result = _join_segments(records), end.fast
    return result, _Residuals(slow, end.fast, chunks, lr, starts, buffers.buffered)


def _share(loop: LoopConfig, chunks: Chunks, slow: PyTree, lr: PyTree) -> tuple[Shared, Row]:
    number, batch, size = chunks.target_NBC.shape
    kv_buffer = KVBuffer(loop.chunk_model.split, number, size, batch)
    return Shared(loop.chunk_model, kv_buffer, slow, lr), Row(jnp.arange(number), chunks)


def _first_carry(shared: Shared, fast: PyTree) -> _Carry:
    """Fast weights [B, ...], the state of their rule, and that of the model."""
    batch = shared.kv_buffer.batch
    fast = jax.tree.map(lambda w: jnp.broadcast_to(w, (batch, *w.shape)), fast)
    buffers = shared.kv_buffer.start()
    rule_state = jax.vmap(shared.chunk_model.rule.init)(fast)
    return Start(fast, rule_state, buffers.recurrent), buffers


def _step(
    shared: Shared, carry: _Carry, row: Row
) -> tuple[_Carry, tuple[ChunkRecords, SavedChunk]]:
    """One chunk of the forward scan: (carry, (records, residuals))."""
    start, buffers = carry
    result = run_chunk(shared, start, buffers.buffered, row)
    buffers = shared.kv_buffer.append(buffers, result.state, row.i)
    end = Start(result.fast, result.rule_state, buffers.recurrent)
    return (end, buffers), (result.records, result.saved)


# --- backward ---------------------------------------------------------------------------------
#
# The cotangents of (slow, fast, chunks, lr). r: state of the rule; s: state of the model.
#
#     W_bar = cotangent of W_N;  r_bar, s_bar, slow_bar = 0
#     for i = N ... 1:
#         W_{i-1} = W_i - update(g_i)
#         W_bar, r_bar, v = pull W_bar, r_bar back through update(W_{i-1}, r_{i-1}, g_i)
#         of_slow, of_W, of_s, x_bar_i = gradient of S(slow, W_{i-1}, s_{i-1}, x_i; v, s_bar)
#         W_bar += of_W;  slow_bar += of_slow;  s_bar = (s_bar of older keys) + of_s
#
# Chunks before the first exact one have no v: their updates are constants.


def _backward_rewind(
    loop: LoopConfig, residuals: _Residuals, cotangents: Result
) -> InputCotangents:
    """The chunks in reverse."""
    shared, rows = _share(loop, residuals.chunks, residuals.slow, residuals.lr)
    records_bar, _ = cotangents
    step = partial(backward_chunk, shared, residuals.buffered)
    (_, bar), x_bar = _scan_back(
        step,
        _last_carry(shared, residuals, cotangents),
        BackwardRow(rows, records_bar, residuals.saved),
        _first_exact(loop, rows),
    )
    return _input_cotangents(residuals, bar, x_bar)


def _backward_recompute(
    loop: LoopConfig, residuals: _Residuals, cotangents: Result
) -> InputCotangents:
    """The segments in reverse. Each is run forward again, which gives its chunks' residuals."""
    shared, rows = _share(loop, residuals.chunks, residuals.slow, residuals.lr)
    records_bar, _ = cotangents
    size = _segment_size(loop, rows)

    def segment(
        carry: BackwardCarry, row: tuple[tuple[Row, ChunkRecords], Start], is_exact: bool
    ) -> tuple[BackwardCarry, Array]:
        (rows, records_bar), start = row
        end, saved = _recompute(shared, start, residuals.buffered, rows)
        _, bar = carry
        step = partial(backward_chunk, shared, residuals.buffered, is_exact=is_exact)
        backward_rows = BackwardRow(rows, records_bar, saved)
        return jax.lax.scan(step, (end.fast, bar), backward_rows, reverse=True)

    (_, bar), x_bar = _scan_back(
        segment,
        _last_carry(shared, residuals, cotangents),
        (_by_segment((rows, records_bar), size), residuals.saved),
        _first_exact(loop, rows) // size,
    )
    return _input_cotangents(residuals, bar, _join_segments(x_bar))


TRAJECTORIES = {
    "rewind": (_forward_rewind, _backward_rewind),
    "recompute": (_forward_recompute, _backward_recompute),
}


def _recompute(
    shared: Shared, start: Start, buffered: PyTree, rows: Row
) -> tuple[Start, SavedChunk]:
    """(what follows a segment, the residuals of its chunks [n, ...])."""

    def step(start: Start, row: Row) -> tuple[Start, SavedChunk]:
        result = run_chunk(shared, start, buffered, row)
        recurrent = shared.kv_buffer.recurrent(result.state)
        return Start(result.fast, result.rule_state, recurrent), result.saved

    return jax.lax.scan(step, start, rows)


def _last_carry(shared: Shared, residuals: _Residuals, cotangents: Result) -> BackwardCarry:
    """W_N, and the cotangents after the last chunk."""

    def zeros(w: Array) -> Array:
        return jnp.zeros(w.shape, jnp.promote_types(w.dtype, jnp.float32))

    _, fast_bar = cotangents
    rule_bar = [jnp.zeros_like(x[0]) for x in inexact_leaves(residuals.saved.rule_state)]
    state_bar, slow_bar = shared.kv_buffer.zero_cotangent(), jax.tree.map(zeros, shared.slow)
    zeros_like_lr = jax.tree.map(jnp.zeros_like, shared.lr)
    bar = Cotangents(fast_bar, rule_bar, state_bar, slow_bar, zeros_like_lr)
    return residuals.fast_end, bar


def _input_cotangents(residuals: _Residuals, bar: Cotangents, x_bar: Array) -> InputCotangents:
    """The cotangents of (slow, fast, chunks, lr) from those before the first chunk."""
    slow_bar = jax.tree.map(lambda total, w: total.astype(w.dtype), bar.slow, residuals.slow)
    fast_bar = jax.tree.map(lambda x: x.sum(0), bar.fast)
    no_cotangent: Any = None  # of integers
    return slow_bar, fast_bar, Chunks(x_bar, no_cotangent, no_cotangent), bar.lr


def _scan_back(
    body: Callable[..., tuple[BackwardCarry, Array]],
    carry: BackwardCarry,
    rows: PyTree,
    first_exact: int,
) -> tuple[BackwardCarry, Array]:
    """`lax.scan` of body(carry, row, is_exact=...) in reverse; is_exact from row first_exact on."""
    length = jax.tree.leaves(rows)[0].shape[0]
    parts: list[Array] = []
    for first, last, is_exact in ((first_exact, length, True), (0, first_exact, False)):
        if first < last:
            part = jax.tree.map(lambda x, a=first, b=last: x[a:b], rows)
            carry, out = jax.lax.scan(partial(body, is_exact=is_exact), carry, part, reverse=True)
            parts.insert(0, out)
    return carry, jnp.concatenate(parts)


# --- chunks and segments ----------------------------------------------------------------------


def _first_exact(loop: LoopConfig, rows: Row) -> int:
    """The first chunk whose update the derivative goes through."""
    return 0 if loop.exact_chunks is None else max(rows.i.size - loop.exact_chunks, 0)


def _segment_size(loop: LoopConfig, rows: Row) -> int:
    """Chunks per segment: at most the square root of their number, to limit memory.

    It divides both the number of chunks and the number of chunks whose updates are constants, so no
    segment mixes the two.
    """
    common = math.gcd(rows.i.size, _first_exact(loop, rows))
    return max(n for n in range(1, math.isqrt(rows.i.size) + 1) if common % n == 0)


def _by_segment(tree: PyTree, size: int) -> PyTree:
    """[N, ...] to [N / size, size, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), tree)


def _join_segments(tree: PyTree) -> PyTree:
    """The inverse of `_by_segment`."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)
