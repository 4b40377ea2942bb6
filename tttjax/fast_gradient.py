"""The fast form of reading with learning: the numbers of `meta.read_learning`, its own derivative.

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

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tttjax import inner_loop
from tttjax.history import History, Past
from tttjax.models import Cut, combine
from tttjax.ops.cross_entropy import (
    Slope,
    blocked_nll_twice,
    blocked_nll_with_slope,
    masked_mean,
    token_nll_in_blocks,
)
from tttjax.types import Array, PyTree


class Chunks(NamedTuple):
    """What the loop reads, for N chunks of B sequences."""

    x_NBCD: Array
    target_NBC: Array
    mask_NBC: Array


class Records(NamedTuple):
    """What the chunks showed."""

    loss_NB: Array
    nll_NBC: Array
    grad_norm_NB: Array


class Loop(NamedTuple):
    """The choices of the loop, as values.

    exact_chunks: as of `inner_loop.adapt`. trajectory: how the backward pass comes by W_{i-1}.
    "rewind": from W_i, minus the change that the kept gradient made; "store": kept as well;
    logit_rows: rows of logits in memory at a time.
    """

    cut: Cut
    rule: optax.GradientTransformation
    exact_chunks: int | None
    trajectory: str
    logit_rows: int


class _Saved(NamedTuple):
    """What the backward pass needs of a chunk, beside its inputs and what `History` keeps."""

    fast: PyTree  # W_{i-1}; None if it is rewound
    rule_state: PyTree
    g: PyTree
    carried: tuple[Array | None, ...]
    slope: Slope | None  # of the losses, in the last hidden states; None with a fast head


# --- one chunk --------------------------------------------------------------------------------


STATE_AXES = {"position": None, "blocks": 0}


def _batch_loss(loop: Loop, slow, fast, state, chunk: Chunks, form: str, slope=None):
    """Of B sequences: (loss [B], (new state, nll [B, C], slope)); `chunk` without its N.

    form: "once" for jax.grad alone, "twice" for jax.grad of jax.jvp. slope: what an earlier call
    with the same weights and inputs has returned (`ops.cross_entropy.Slope`).
    """
    model, cut = loop.cut.model, loop.cut

    def run(fast, state, x_CD):
        weights = combine(slow, fast)
        x_CD, state = cut.run(weights, state, x_CD, form)
        return model.final_norm(weights, x_CD), state

    axes = (0, STATE_AXES, 0)
    h_BCD, state = jax.vmap(run, in_axes=axes, out_axes=(0, STATE_AXES))(fast, state, chunk.x_NBCD)
    if "head" in cut.model.fast_paths:
        nll = partial(token_nll_in_blocks, block=loop.logit_rows)
        head_BDV = fast["head"].astype(h_BCD.dtype)
        nll_BC, slope = jax.vmap(nll)(h_BCD, head_BDV, chunk.target_NBC), None
    else:
        read = h_BCD, model.head(slow), chunk.target_NBC
        if form == "twice":
            nll_BC = blocked_nll_twice(*read, slope, rows_block=loop.logit_rows)
        else:
            nll_BC, slope = blocked_nll_with_slope(*read, rows_block=loop.logit_rows)
    return masked_mean(nll_BC, chunk.mask_NBC), (state, nll_BC, slope)


def _loss_and_gradient(loop: Loop, slow, fast, state, chunk: Chunks):
    """(what `_batch_loss` gives, the gradient of each sequence's own loss [B, ...])."""

    def total(fast):
        loss_B, aux = _batch_loss(loop, slow, fast, state, chunk, "once")
        return jnp.sum(loss_B), (loss_B, aux)

    (_, out), g = jax.value_and_grad(total, has_aux=True)(fast)
    return out, g


def _update(loop: Loop, fast, rule_state, g, chunk: Chunks, lr, is_constant: bool = False):
    """`inner_loop.update` of B sequences: (fast, rule_state, norm of g [B])."""

    def one(fast, rule_state, g, mask_C):
        return inner_loop.update(loop.rule, lr, fast, rule_state, g, jnp.any(mask_C), is_constant)

    return jax.vmap(one)(fast, rule_state, g, chunk.mask_NBC)


# --- the loop ---------------------------------------------------------------------------------


def make_loop(loop: Loop) -> Callable[[PyTree, PyTree, Chunks, Array], tuple[Records, PyTree]]:
    """read(slow, fast, chunks, lr) -> (records, fast weights after the last chunk [B, ...]).

    slow, fast: by segment (`Cut.above`), without a batch; fast in the dtype that it keeps. The
    derivative is exact in slow, fast, x and lr, by the losses, the NLL and the last fast weights.
    `grad_norm_NB` has none.
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


def _history(loop: Loop, chunks: Chunks) -> History:
    number, batch, size = chunks.target_NBC.shape
    return History(loop.cut, number, size, batch)


def _forward(loop: Loop, slow, fast, chunks: Chunks, lr):
    """((records, fast_end), what the backward pass needs: (_Saved [N, ...], kept past))."""
    history = _history(loop, chunks)

    def step(carry, row):
        fast, rule_state, past = carry
        i, chunk = row
        state = history.state(past, i)
        (loss_B, (state, nll_BC, slope)), g = _loss_and_gradient(loop, slow, fast, state, chunk)
        new_fast, new_rule_state, norm_B = _update(loop, fast, rule_state, g, chunk, lr)
        kept_fast = fast if loop.trajectory == "store" else None
        saved = _Saved(kept_fast, rule_state, g, past.carried, slope)
        carry = new_fast, new_rule_state, history.write(past, state, i)
        return carry, (Records(loss_B, nll_BC, norm_B), saved)

    fast = jax.tree.map(lambda w: jnp.broadcast_to(w, (history.batch, *w.shape)), fast)
    start = fast, jax.vmap(loop.rule.init)(fast), history.start()
    rows = jnp.arange(history.chunks), chunks
    (fast_end, _, past), (records, saved) = jax.lax.scan(step, start, rows)
    return (records, fast_end), (saved, past.kept)


class _Cotangents(NamedTuple):
    """Of everything that goes from chunk to chunk, and the sums over chunks."""

    fast: PyTree
    rule_state: list[Array]  # of its `_numbers`
    past: Past
    slow: PyTree
    lr: Array


def _backward(loop: Loop, residuals, cotangents):
    slow, fast_end, chunks, lr, saved, kept = residuals
    records_bar, fast_bar = cotangents
    history = _history(loop, chunks)
    exact = history.chunks if loop.exact_chunks is None else loop.exact_chunks
    first_exact = max(history.chunks - exact, 0)

    def step(carry, row, is_exact):
        fast, bar = carry
        i, chunk, saved, records_bar_i = row
        fast, bar, v = _through_update(loop, fast, bar, saved, chunk, lr, is_exact)
        state = history.state(Past(kept, saved.carried), i)

        outer = records_bar_i, bar.past, v
        slow_bar, fast_bar, blocks_bar, x_bar = _share(
            loop, history, i, slow, fast, state, chunk, saved.slope, outer
        )
        bar = _Cotangents(
            jax.tree.map(jnp.add, bar.fast, fast_bar),
            bar.rule_state,
            history.before(bar.past, blocks_bar, i),
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
    rows = jnp.arange(history.chunks), chunks, saved, records_bar
    x_bars: list[Array] = []
    for first, last, is_exact in (
        (first_exact, history.chunks, True),
        (0, first_exact, False),
    ):
        if first == last:
            continue
        part = jax.tree.map(lambda x, a=first, b=last: x[a:b], rows)
        carry, x_bar = jax.lax.scan(partial(step, is_exact=is_exact), carry, part, reverse=True)
        x_bars.insert(0, x_bar)
    bar = carry[1]
    slow_bar = jax.tree.map(lambda total, w: total.astype(w.dtype), bar.slow, slow)
    fast_bar = jax.tree.map(lambda x: x.sum(0), bar.fast)
    nothing: Any = None  # the cotangent of integers
    return slow_bar, fast_bar, Chunks(jnp.concatenate(x_bars), nothing, nothing), bar.lr


def _share(loop: Loop, history: History, i, slow, fast, state, chunk: Chunks, slope, outer):
    """The gradient of S, a chunk's share, in (slow, fast, the state's blocks, x).

    outer: the cotangents of its records and of the past after it, and v (None: the update is a
    constant).
    """
    records_bar, past_bar, v = outer

    def outputs(slow, fast, blocks, x_BCD):
        before = {**state, "blocks": blocks}
        form = "once" if v is None else "twice"
        read = chunk._replace(x_NBCD=x_BCD)
        loss_B, (after, nll_BC, _) = _batch_loss(loop, slow, fast, before, read, form, slope)
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
        return paired + history.pairing(after, past_bar, i) + jnp.sum(change_B)

    return jax.grad(total, argnums=(0, 1, 2, 3))(slow, fast, state["blocks"], chunk.x_NBCD)


def _through_update(loop: Loop, fast, bar: _Cotangents, saved: _Saved, chunk, lr, is_exact):
    """(W_{i-1}, the cotangents before the update, the part of them that meets g_i: v or None)."""
    leaves, tree = jax.tree.flatten(saved.rule_state)

    def update(fast, numbers, g, lr):
        remaining = iter(numbers)
        mixed = [next(remaining) if _is_number(leaf) else leaf for leaf in leaves]
        rule_state = jax.tree.unflatten(tree, mixed)
        fast, rule_state, norm_B = _update(
            loop, fast, rule_state, g, chunk, lr, is_constant=not is_exact
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
