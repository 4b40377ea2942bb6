"""The fast form of reading with learning: the numbers of `meta.forward_ttt`, its own derivative.

What is below the lowest fast weight runs once over the sequence, with ordinary reverse mode. The
loop above it carries a derivative of its own, for a whole batch of sequences. Forwards, per chunk,

    l_i, g_i = value and gradient of the chunk's loss in W_{i-1};  W_i = update(W_{i-1}, g_i).

Backwards the chunks come in reverse. The cotangent of W_i is pulled back through the update; what
of it meets g_i is v. The rest of a chunk's share is one ordinary gradient, in W_{i-1}, the slow
weights, the inputs and the keys and values of the past, of the scalar

    S = sum (cotangents x outputs) + d/de l_i(W_{i-1} + e v) at e = 0,

since <grad l, v> is a directional derivative: reverse over forward mode (arXiv 2505.00793) instead
of reverse over reverse. Derivatives of slow weights are summed over the batch as they arise, never
kept per sequence.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tttjax.ops.cross_entropy.nll import CEResiduals
from tttjax.ttt.chunk import ChunkModel, ChunkRecords, Chunks, batch_loss, learn, loss_and_gradient
from tttjax.ttt.kv_buffer import BufferState, KVBuffer
from tttjax.types import Array, PyTree


class LoopConfig(NamedTuple):
    """The choices of the loop, as values.

    exact_chunks: as of `inner_loop.adapt`. trajectory: how the backward pass comes by W_{i-1}.
    "rewind": from W_i, minus the change that the kept gradient made; "store": kept as well;
    "recompute": the gradients are made again, segment by segment, from the weights at its start.
    """

    learner: ChunkModel
    exact_chunks: int | None
    trajectory: str


class _Start(NamedTuple):
    """What a chunk is read with, beside its inputs and what `KVBuffer` keeps."""

    fast: PyTree  # W_{i-1}
    rule_state: PyTree
    carried: tuple[Array | None, ...]


class _Saved(NamedTuple):
    """What the backward pass needs of a chunk, beside its inputs and what `KVBuffer` keeps."""

    fast: PyTree  # W_{i-1}; None if it is rewound
    rule_state: PyTree
    g: PyTree
    carried: tuple[Array | None, ...]
    slope: CEResiduals | None  # of the losses, in the last hidden states; None with a fast head


# --- the loop ---------------------------------------------------------------------------------


def make_loop(
    loop: LoopConfig,
) -> Callable[[PyTree, PyTree, Chunks, Array], tuple[ChunkRecords, PyTree]]:
    """read(slow, fast, chunks, lr) -> (records, fast weights after the last chunk [B, ...]).

    slow, fast: by segment (`SplitModel.above`), without a batch; fast in the dtype that it keeps.
    The derivative is exact in slow, fast, x and lr, by the losses, the NLL and the last fast
    weights. `grad_norm_NB` has none.
    """

    @jax.custom_vjp
    def read(slow, fast, chunks, lr):
        (records, fast_end), _ = _forward(loop, slow, fast, chunks, lr)
        return records, fast_end

    def forward(slow, fast, chunks, lr):
        (records, fast_end), (saved, kept) = _forward(loop, slow, fast, chunks, lr)
        return (records, fast_end), (slow, fast_end, chunks, lr, saved, kept)

    read.defvjp(forward, partial(_backward, loop))
    return read


def _history(loop: LoopConfig, chunks: Chunks) -> KVBuffer:
    number, batch, size = chunks.target_NBC.shape
    return KVBuffer(loop.learner.cut, number, size, batch)


def _exact_from(loop: LoopConfig, chunks: int) -> int:
    """The first chunk whose update the derivative goes through."""
    return 0 if loop.exact_chunks is None else max(chunks - loop.exact_chunks, 0)


def _segment(loop: LoopConfig, chunks: int) -> int:
    """Chunks from one kept start to the next, so that starts and segments together are few.

    A divisor, also of the part of the sequence whose updates are constants.
    """
    whole = math.gcd(chunks, _exact_from(loop, chunks))
    return max(n for n in range(1, math.isqrt(chunks) + 1) if whole % n == 0)


def _by_segment(tree: PyTree, size: int) -> PyTree:
    """[N, ...] to [N / size, size, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), tree)


def _joined(tree: PyTree) -> PyTree:
    """The inverse of `_by_segment`."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def _read(loop: LoopConfig, history: KVBuffer, slow, lr, start: _Start, kept, row):
    """One chunk: (its records, what to save of it, fast, rule state, the model's state after)."""
    i, chunk = row
    fast, rule_state, carried = start
    state = history.state(BufferState(kept, carried), i)
    (loss_B, (state, nll_BC, slope)), g = loss_and_gradient(loop.learner, slow, fast, state, chunk)
    new_fast, new_rule_state, norm_B = learn(loop.learner, fast, rule_state, g, chunk, lr)
    stored = fast if loop.trajectory == "store" else None
    saved = _Saved(stored, rule_state, g, carried, slope)
    return ChunkRecords(loss_B, nll_BC, norm_B), saved, new_fast, new_rule_state, state


def _forward(loop: LoopConfig, slow, fast, chunks: Chunks, lr):
    """((records, fast_end), what the backward pass needs: (saved, kept past)).

    saved: _Saved [N, ...], or with "recompute" the _Start of every segment.
    """
    history = _history(loop, chunks)

    def step(carry, row):
        fast, rule_state, past = carry
        start = _Start(fast, rule_state, past.carried)
        records, saved, fast, rule_state, state = _read(
            loop, history, slow, lr, start, past.kept, row
        )
        return (fast, rule_state, history.write(past, state, row[0])), (records, saved)

    def segment(carry, rows):
        fast, rule_state, past = carry
        carry, (records, _) = jax.lax.scan(step, carry, rows)
        return carry, (records, _Start(fast, rule_state, past.carried))

    fast = jax.tree.map(lambda w: jnp.broadcast_to(w, (history.batch, *w.shape)), fast)
    start = fast, jax.vmap(loop.learner.rule.init)(fast), history.start()
    rows = jnp.arange(history.chunks), chunks
    if loop.trajectory == "recompute":
        rows = _by_segment(rows, _segment(loop, history.chunks))
        (fast_end, _, past), (records, starts) = jax.lax.scan(segment, start, rows)
        return (_joined(records), fast_end), (starts, past.kept)
    (fast_end, _, past), (records, saved) = jax.lax.scan(step, start, rows)
    return (records, fast_end), (saved, past.kept)


def _read_again(loop: LoopConfig, history: KVBuffer, slow, lr, start: _Start, kept, rows):
    """(fast weights after a segment, what the backward pass needs of its chunks [n, ...])."""

    def step(start, row):
        _, saved, fast, rule_state, state = _read(loop, history, slow, lr, start, kept, row)
        return _Start(fast, rule_state, history.carried(state)), saved

    end, saved = jax.lax.scan(step, start, rows)
    return end.fast, saved


class _Cotangents(NamedTuple):
    """Of everything that goes from chunk to chunk, and the sums over chunks."""

    fast: PyTree
    rule_state: list[Array]  # of its `_numbers`
    past: list[Array]  # as `KVBuffer.zero_cotangent`
    slow: PyTree
    lr: Array


def _backward(loop: LoopConfig, residuals, cotangents):
    slow, fast_end, chunks, lr, saved, kept = residuals
    records_bar, fast_bar = cotangents
    history = _history(loop, chunks)
    first_exact = _exact_from(loop, history.chunks)

    def step(carry, row, is_exact):
        fast, bar = carry
        i, chunk, records_bar_i, saved = row
        fast, bar, v = _through_update(loop, fast, bar, saved, chunk, lr, is_exact)
        state = history.state(BufferState(kept, saved.carried), i)

        outer = records_bar_i, bar.past, v
        slow_bar, fast_bar, blocks_bar, x_bar = _share(
            loop, history, slow, fast, state, chunk, saved.slope, outer
        )
        bar = _Cotangents(
            jax.tree.map(jnp.add, bar.fast, fast_bar),
            bar.rule_state,
            history.before(bar.past, blocks_bar),
            jax.tree.map(lambda total, new: total + new.astype(total.dtype), bar.slow, slow_bar),
            bar.lr,
        )
        return (fast, bar), x_bar

    carry = (
        fast_end,
        _Cotangents(
            fast_bar,
            [jnp.zeros_like(x[0]) for x in _numbers(saved.rule_state)],
            history.zero_cotangent(),
            jax.tree.map(
                lambda w: jnp.zeros(w.shape, jnp.promote_types(w.dtype, jnp.float32)), slow
            ),
            jnp.zeros_like(lr),
        ),
    )

    def segment(carry, row, is_exact):
        (i, chunks, records_bar), start = row
        fast, saved = _read_again(loop, history, slow, lr, start, kept, (i, chunks))
        rows = i, chunks, records_bar, saved
        carry = fast, carry[1]
        return jax.lax.scan(partial(step, is_exact=is_exact), carry, rows, reverse=True)

    rows = jnp.arange(history.chunks), chunks, records_bar
    if loop.trajectory == "recompute":
        size = _segment(loop, history.chunks)
        segments = _by_segment(rows, size), saved
        (_, bar), x_bar = _scan_back(segment, carry, segments, first_exact // size)
        x_bar = _joined(x_bar)
    else:
        (_, bar), x_bar = _scan_back(step, carry, (*rows, saved), first_exact)
    slow_bar = jax.tree.map(lambda total, w: total.astype(w.dtype), bar.slow, slow)
    fast_bar = jax.tree.map(lambda x: x.sum(0), bar.fast)
    nothing: Any = None  # the cotangent of integers
    return slow_bar, fast_bar, Chunks(x_bar, nothing, nothing), bar.lr


def _scan_back(body: Callable, carry, rows: PyTree, first_exact: int):
    """`lax.scan` of body(carry, row, is_exact=...) in reverse, in two parts if there are two."""
    length = jax.tree.leaves(rows)[0].shape[0]
    parts: list[Array] = []
    for first, last, is_exact in ((first_exact, length, True), (0, first_exact, False)):
        if first < last:
            part = jax.tree.map(lambda x, a=first, b=last: x[a:b], rows)
            carry, out = jax.lax.scan(partial(body, is_exact=is_exact), carry, part, reverse=True)
            parts.insert(0, out)
    return carry, jnp.concatenate(parts)


def _share(loop: LoopConfig, history: KVBuffer, slow, fast, state, chunk: Chunks, slope, outer):
    """The gradient of S, a chunk's share, in (slow, fast, the state's blocks, x).

    outer: the cotangents of its records and of the past after it, and v (None: the update is a
    constant).
    """
    records_bar, past_bar, v = outer

    def outputs(slow, fast, blocks, x_BCD):
        before = {**state, "blocks": blocks}
        form = "once" if v is None else "twice"
        read = chunk._replace(x_NBCD=x_BCD)
        loss_B, (after, nll_BC, _) = batch_loss(loop.learner, slow, fast, before, read, form, slope)
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
        return paired + history.pairing(after, past_bar) + jnp.sum(change_B)

    return jax.grad(total, argnums=(0, 1, 2, 3))(slow, fast, state["blocks"], chunk.x_NBCD)


def _through_update(loop: LoopConfig, fast, bar: _Cotangents, saved: _Saved, chunk, lr, is_exact):
    """(W_{i-1}, the cotangents before the update, the part of them that meets g_i: v or None)."""
    leaves, tree = jax.tree.flatten(saved.rule_state)

    def update(fast, numbers, g, lr):
        remaining = iter(numbers)
        mixed = [next(remaining) if _is_number(leaf) else leaf for leaf in leaves]
        rule_state = jax.tree.unflatten(tree, mixed)
        fast, rule_state, norm_B = learn(
            loop.learner, fast, rule_state, g, chunk, lr, is_constant=not is_exact
        )
        return fast, _numbers(rule_state), norm_B

    def rewind():
        zero = jax.tree.map(jnp.zeros_like, fast)
        change, _, _ = update(zero, _numbers(saved.rule_state), saved.g, lr)
        return jax.tree.map(jnp.subtract, fast, change)

    before = rewind() if saved.fast is None else saved.fast
    (_, _, norm_B), pull = jax.vjp(update, before, _numbers(saved.rule_state), saved.g, lr)
    fast_bar, rule_bar, v, lr_bar = pull((bar.fast, bar.rule_state, jnp.zeros_like(norm_B)))
    bar = bar._replace(fast=fast_bar, rule_state=rule_bar, lr=bar.lr + lr_bar)
    return before, bar, v if is_exact else None


def _is_number(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _numbers(rule_state: PyTree) -> list[Array]:
    """The leaves of a rule's state that have derivatives: not its counts."""
    return [leaf for leaf in jax.tree.leaves(rule_state) if _is_number(leaf)]
