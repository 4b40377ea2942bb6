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

from tttjax.models.mixer import AttentionForm
from tttjax.ops.cross_entropy.blocked import CEResiduals
from tttjax.ttt.chunk import (
    ChunkModel,
    ChunkRecords,
    Chunks,
    apply_inner_update,
    batch_loss,
    loss_and_gradient,
)
from tttjax.ttt.kv_buffer import BufferState, KVBuffer
from tttjax.types import Array, PyTree


class LoopConfig(NamedTuple):
    """Settings of the loop.

    exact_chunks: as in `inner_loop.adapt`. trajectory: how the backward pass obtains W_{i-1}.
    "rewind": from W_i minus the update of the stored gradient; "store": it is stored;
    "recompute": segment by segment, from the stored weights at the start of each segment.
    """

    chunk_model: ChunkModel
    exact_chunks: int | None
    trajectory: str


class _Start(NamedTuple):
    """What is needed to run a chunk, beside its inputs and the buffered keys and values."""

    fast: PyTree  # W_{i-1}
    rule_state: PyTree
    recurrent: PyTree


class _Saved(NamedTuple):
    """Residuals of a chunk, beside its inputs and the buffered keys and values."""

    fast: PyTree  # W_{i-1}; None if it is rewound
    rule_state: PyTree
    g: PyTree
    recurrent: PyTree
    ce_residuals: CEResiduals | None  # of the losses; None with a fast head


# --- the loop ---------------------------------------------------------------------------------


def make_loop(
    loop: LoopConfig,
) -> Callable[[PyTree, PyTree, Chunks, Array], tuple[ChunkRecords, PyTree]]:
    """run(slow, fast, chunks, lr) -> (records, fast weights after the last chunk [B, ...]).

    slow, fast: by segment (`SplitModel.sequential_weights`), no batch; fast in its final dtype.
    The derivative is exact with respect to slow, fast, x and lr, for the losses, the NLL and the
    final fast weights. `grad_norm_NB` has no derivative.
    """

    @jax.custom_vjp
    def run(slow, fast, chunks, lr):
        (records, fast_end), _ = _forward(loop, slow, fast, chunks, lr)
        return records, fast_end

    def forward(slow, fast, chunks, lr):
        (records, fast_end), (saved, buffered) = _forward(loop, slow, fast, chunks, lr)
        return (records, fast_end), (slow, fast_end, chunks, lr, saved, buffered)

    run.defvjp(forward, partial(_backward, loop))
    return run


def _make_kv_buffer(loop: LoopConfig, chunks: Chunks) -> KVBuffer:
    number, batch, size = chunks.target_NBC.shape
    return KVBuffer(loop.chunk_model.split, number, size, batch)


def _exact_from(loop: LoopConfig, chunks: int) -> int:
    """The first chunk whose update the derivative goes through."""
    return 0 if loop.exact_chunks is None else max(chunks - loop.exact_chunks, 0)


def _segment(loop: LoopConfig, chunks: int) -> int:
    """Chunks per segment: at most the square root of their number, to limit memory.

    It divides both the number of chunks and the number of chunks whose updates are constants, so no
    segment mixes the two.
    """
    common = math.gcd(chunks, _exact_from(loop, chunks))
    return max(n for n in range(1, math.isqrt(chunks) + 1) if common % n == 0)


def _by_segment(tree: PyTree, size: int) -> PyTree:
    """[N, ...] to [N / size, size, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), tree)


def _join_segments(tree: PyTree) -> PyTree:
    """The inverse of `_by_segment`."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def _run_chunk(loop: LoopConfig, kv_buffer: KVBuffer, slow, lr, start: _Start, buffered, row):
    """One chunk: (records, residuals, new fast weights, new rule state, new model state)."""
    i, chunk = row
    fast, rule_state, recurrent = start
    state = kv_buffer.state(BufferState(buffered, recurrent), i)
    (loss_B, (state, nll_BC, ce_residuals)), g = loss_and_gradient(
        loop.chunk_model, slow, fast, state, chunk
    )
    new_fast, new_rule_state, norm_B = apply_inner_update(
        loop.chunk_model, fast, rule_state, g, chunk, lr
    )
    stored = fast if loop.trajectory == "store" else None
    saved = _Saved(stored, rule_state, g, recurrent, ce_residuals)
    return ChunkRecords(loss_B, nll_BC, norm_B), saved, new_fast, new_rule_state, state


def _forward(loop: LoopConfig, slow, fast, chunks: Chunks, lr):
    """((records, fast_end), (saved, buffered)).

    saved: _Saved [N, ...], or with "recompute" the _Start of every segment.
    """
    kv_buffer = _make_kv_buffer(loop, chunks)

    def step(carry, row):
        fast, rule_state, buffers = carry
        start = _Start(fast, rule_state, buffers.recurrent)
        records, saved, fast, rule_state, state = _run_chunk(
            loop, kv_buffer, slow, lr, start, buffers.buffered, row
        )
        return (fast, rule_state, kv_buffer.append(buffers, state, row[0])), (records, saved)

    def segment(carry, rows):
        fast, rule_state, buffers = carry
        carry, (records, _) = jax.lax.scan(step, carry, rows)
        return carry, (records, _Start(fast, rule_state, buffers.recurrent))

    fast = jax.tree.map(lambda w: jnp.broadcast_to(w, (kv_buffer.batch, *w.shape)), fast)
    start = fast, jax.vmap(loop.chunk_model.rule.init)(fast), kv_buffer.start()
    rows = jnp.arange(kv_buffer.chunks), chunks
    if loop.trajectory == "recompute":
        rows = _by_segment(rows, _segment(loop, kv_buffer.chunks))
        (fast_end, _, buffers), (records, starts) = jax.lax.scan(segment, start, rows)
        return (_join_segments(records), fast_end), (starts, buffers.buffered)
    (fast_end, _, buffers), (records, saved) = jax.lax.scan(step, start, rows)
    return (records, fast_end), (saved, buffers.buffered)


def _recompute_segment(
    loop: LoopConfig, kv_buffer: KVBuffer, slow, lr, start: _Start, buffered, rows
):
    """(fast weights after a segment, the residuals of its chunks [n, ...])."""

    def step(start, row):
        _, saved, fast, rule_state, state = _run_chunk(
            loop, kv_buffer, slow, lr, start, buffered, row
        )
        return _Start(fast, rule_state, kv_buffer.recurrent(state)), saved

    end, saved = jax.lax.scan(step, start, rows)
    return end.fast, saved


class _Cotangents(NamedTuple):
    """Cotangents passed from chunk to chunk, and sums over chunks."""

    fast: PyTree
    rule_state: list[Array]  # of its `_inexact_leaves`
    state: PyTree  # as `KVBuffer.zero_cotangent`
    slow: PyTree
    lr: Array


def _backward(loop: LoopConfig, residuals, cotangents):
    """The cotangents of (slow, fast, chunks, lr). r: state of the rule; s: state of the model.

        W_bar = cotangent of W_N;  r_bar, s_bar, slow_bar = 0
        for i = N ... 1:
            W_{i-1} = W_i - update(g_i)                                        # rewind
            W_bar, r_bar, v = pull W_bar, r_bar back through update(W_{i-1}, r_{i-1}, g_i)
            of_slow, of_W, of_s, x_bar_i = gradient of S(slow, W_{i-1}, s_{i-1}, x_i; v, s_bar)
            W_bar += of_W;  slow_bar += of_slow;  s_bar = (s_bar of older keys) + of_s

    Chunks before `first_exact` have no v: their updates are constants. "store" reads W_{i-1}.
    "recompute" first runs the chunks of a segment forward again, which gives their g_i.
    """
    slow, fast_end, chunks, lr, saved, buffered = residuals
    records_bar, fast_bar = cotangents
    kv_buffer = _make_kv_buffer(loop, chunks)
    first_exact = _exact_from(loop, kv_buffer.chunks)

    def step(carry, row, is_exact):
        fast, bar = carry
        i, chunk, records_bar_i, saved = row
        fast, bar, v = _backward_update(loop, fast, bar, saved, chunk, lr, is_exact)
        state = kv_buffer.state(BufferState(buffered, saved.recurrent), i)

        outer = records_bar_i, bar.state, v
        slow_bar, fast_bar, blocks_bar, x_bar = _chunk_gradient(
            loop, kv_buffer, slow, fast, state, chunk, saved.ce_residuals, outer
        )
        bar = _Cotangents(
            jax.tree.map(jnp.add, bar.fast, fast_bar),
            bar.rule_state,
            kv_buffer.cotangent_before(bar.state, blocks_bar),
            jax.tree.map(lambda total, new: total + new.astype(total.dtype), bar.slow, slow_bar),
            bar.lr,
        )
        return (fast, bar), x_bar

    carry = (
        fast_end,
        _Cotangents(
            fast_bar,
            [jnp.zeros_like(x[0]) for x in _inexact_leaves(saved.rule_state)],
            kv_buffer.zero_cotangent(),
            jax.tree.map(
                lambda w: jnp.zeros(w.shape, jnp.promote_types(w.dtype, jnp.float32)), slow
            ),
            jnp.zeros_like(lr),
        ),
    )

    def segment(carry, row, is_exact):
        (i, chunks, records_bar), start = row
        fast, saved = _recompute_segment(loop, kv_buffer, slow, lr, start, buffered, (i, chunks))
        rows = i, chunks, records_bar, saved
        carry = fast, carry[1]
        return jax.lax.scan(partial(step, is_exact=is_exact), carry, rows, reverse=True)

    rows = jnp.arange(kv_buffer.chunks), chunks, records_bar
    if loop.trajectory == "recompute":
        size = _segment(loop, kv_buffer.chunks)
        segments = _by_segment(rows, size), saved
        (_, bar), x_bar = _scan_back(segment, carry, segments, first_exact // size)
        x_bar = _join_segments(x_bar)
    else:
        (_, bar), x_bar = _scan_back(step, carry, (*rows, saved), first_exact)
    slow_bar = jax.tree.map(lambda total, w: total.astype(w.dtype), bar.slow, slow)
    fast_bar = jax.tree.map(lambda x: x.sum(0), bar.fast)
    no_cotangent: Any = None  # of integers
    return slow_bar, fast_bar, Chunks(x_bar, no_cotangent, no_cotangent), bar.lr


def _scan_back(body: Callable, carry, rows: PyTree, first_exact: int):
    """`lax.scan` of body(carry, row, is_exact=...) in reverse; is_exact from row first_exact on."""
    length = jax.tree.leaves(rows)[0].shape[0]
    parts: list[Array] = []
    for first, last, is_exact in ((first_exact, length, True), (0, first_exact, False)):
        if first < last:
            part = jax.tree.map(lambda x, a=first, b=last: x[a:b], rows)
            carry, out = jax.lax.scan(partial(body, is_exact=is_exact), carry, part, reverse=True)
            parts.insert(0, out)
    return carry, jnp.concatenate(parts)


def _chunk_gradient(
    loop: LoopConfig, kv_buffer: KVBuffer, slow, fast, state, chunk: Chunks, ce_residuals, outer
):
    """The gradient of S (module docstring) in slow, fast, the state's blocks and x.

    outer: the cotangents of its records and of the state after it, and v (None: the update is a
    constant).
    """
    records_bar, state_bar, v = outer

    def outputs(slow, fast, blocks, x_BCD):
        before = {**state, "blocks": blocks}
        form: AttentionForm = "blocked" if v is None else "blocked_jvp"
        inputs = chunk._replace(x_NBCD=x_BCD)
        loss_B, (after, nll_BC, _) = batch_loss(
            loop.chunk_model, slow, fast, before, inputs, form, ce_residuals
        )
        return loss_B, (after, nll_BC)

    def total(slow, fast, blocks, x_BCD):
        if v is None:
            loss_B, (after, nll_BC) = outputs(slow, fast, blocks, x_BCD)
            change_B = jnp.zeros_like(loss_B)
        else:
            loss_B, change_B, (after, nll_BC) = jax.jvp(
                lambda fast: outputs(slow, fast, blocks, x_BCD), (fast,), (v,), has_aux=True
            )
        paired = jnp.vdot(records_bar.loss_NB, loss_B) + jnp.vdot(records_bar.nll_NBC, nll_BC)
        return paired + kv_buffer.pairing(after, state_bar) + jnp.sum(change_B)

    return jax.grad(total, argnums=(0, 1, 2, 3))(slow, fast, state["blocks"], chunk.x_NBCD)


def _backward_update(loop: LoopConfig, fast, bar: _Cotangents, saved: _Saved, chunk, lr, is_exact):
    """(W_{i-1}, the cotangents before the update, v: the cotangent of g_i, or None)."""
    leaves, tree = jax.tree.flatten(saved.rule_state)

    def update(fast, inexact, g, lr):
        remaining = iter(inexact)
        merged = [next(remaining) if _is_inexact(leaf) else leaf for leaf in leaves]
        rule_state = jax.tree.unflatten(tree, merged)
        fast, rule_state, norm_B = apply_inner_update(
            loop.chunk_model, fast, rule_state, g, chunk, lr, is_constant=not is_exact
        )
        return fast, _inexact_leaves(rule_state), norm_B

    def rewind():
        zero = jax.tree.map(jnp.zeros_like, fast)
        change, _, _ = update(zero, _inexact_leaves(saved.rule_state), saved.g, lr)
        return jax.tree.map(jnp.subtract, fast, change)

    before = rewind() if saved.fast is None else saved.fast
    (_, _, norm_B), pull = jax.vjp(update, before, _inexact_leaves(saved.rule_state), saved.g, lr)
    fast_bar, rule_bar, v, lr_bar = pull((bar.fast, bar.rule_state, jnp.zeros_like(norm_B)))
    bar = bar._replace(fast=fast_bar, rule_state=rule_bar, lr=bar.lr + lr_bar)
    return before, bar, v if is_exact else None


def _is_inexact(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _inexact_leaves(rule_state: PyTree) -> list[Array]:
    """The leaves of a rule's state that have derivatives: all but integer counts."""
    return [leaf for leaf in jax.tree.leaves(rule_state) if _is_inexact(leaf)]
