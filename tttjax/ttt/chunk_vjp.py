"""One chunk of the loop with a custom VJP: forward with its residuals, and backward.

`meta_gradient` loops over both.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tttjax.models.mixer import AttentionForm
from tttjax.ops.cross_entropy.blocked import CEResiduals
from tttjax.ttt.chunk import (
    ChunkModel,
    ChunkRecords,
    Chunks,
    LossAux,
    apply_inner_update,
    batch_loss,
    loss_and_gradient,
)
from tttjax.ttt.kv_buffer import BufferState, KVBuffer
from tttjax.types import Array, PyTree


class Shared(NamedTuple):
    """What all chunks of a loop share."""

    chunk_model: ChunkModel
    kv_buffer: KVBuffer
    slow: PyTree
    lr: PyTree  # a scalar, or a tree like the fast weights


class Row(NamedTuple):
    """One chunk, or all [N, ...]."""

    i: Array
    chunk: Chunks


class Start(NamedTuple):
    """What a chunk starts from, beside its inputs and the buffered keys and values."""

    fast: PyTree  # W_{i-1}
    rule_state: PyTree
    recurrent: PyTree


class SavedChunk(NamedTuple):
    """Residuals of a chunk, beside its inputs and the buffered keys and values."""

    rule_state: PyTree
    g: PyTree
    recurrent: PyTree
    ce_residuals: CEResiduals | None  # of the losses; None with a fast head


class ChunkResult(NamedTuple):
    """What a chunk computes. state: of the model after it."""

    records: ChunkRecords
    saved: SavedChunk
    fast: PyTree
    rule_state: PyTree
    state: PyTree


def run_chunk(shared: Shared, start: Start, buffered: PyTree, row: Row) -> ChunkResult:
    """One chunk forward: its records, residuals, and what follows it."""
    state = shared.kv_buffer.state(BufferState(buffered, start.recurrent), row.i)
    losses, g = loss_and_gradient(shared.chunk_model, shared.slow, start.fast, state, row.chunk)
    fast, rule_state, norm_B = apply_inner_update(
        shared.chunk_model, start.fast, start.rule_state, g, row.chunk, shared.lr
    )
    saved = SavedChunk(start.rule_state, g, start.recurrent, losses.ce_residuals)
    records = ChunkRecords(losses.mean_nll_B, losses.nll_BC, norm_B)
    return ChunkResult(records, saved, fast, rule_state, losses.state)


# --- backward ---------------------------------------------------------------------------------


class Cotangents(NamedTuple):
    """Cotangents passed from chunk to chunk, and sums over chunks."""

    fast: PyTree
    rule_state: list[Array]  # of its `inexact_leaves`
    state: PyTree  # as `KVBuffer.zero_cotangent`
    slow: PyTree
    lr: PyTree


BackwardCarry = tuple[PyTree, Cotangents]  # W_i, the cotangents after chunk i


class BackwardRow(NamedTuple):
    """A chunk of the backward scan, its residuals, and the cotangent of its records."""

    row: Row
    records_bar: ChunkRecords
    saved: SavedChunk


class _Pairing(NamedTuple):
    """What the outputs of a chunk are paired with in S (docstring of `meta_gradient`).

    v None: the update is a constant.
    """

    records_bar: ChunkRecords
    state_bar: PyTree
    v: PyTree | None


def backward_chunk(
    shared: Shared, buffered: PyTree, carry: BackwardCarry, row: BackwardRow, is_exact: bool
) -> tuple[BackwardCarry, Array]:
    """One chunk of the backward scan: ((W_{i-1}, the cotangents before it), x_bar)."""
    fast, bar = carry
    (i, chunk), records_bar, saved = row
    fast, bar, v = _backward_update(shared, fast, bar, saved, chunk, is_exact)
    state = shared.kv_buffer.state(BufferState(buffered, saved.recurrent), i)
    pairing = _Pairing(records_bar, bar.state, v)
    slow_bar, fast_bar, blocks_bar, x_bar = _chunk_gradient(
        shared, fast, state, chunk, saved.ce_residuals, pairing
    )
    bar = Cotangents(
        jax.tree.map(jnp.add, bar.fast, fast_bar),
        bar.rule_state,
        shared.kv_buffer.cotangent_before(bar.state, blocks_bar),
        jax.tree.map(lambda total, new: total + new.astype(total.dtype), bar.slow, slow_bar),
        bar.lr,
    )
    return (fast, bar), x_bar


def _chunk_gradient(
    shared: Shared,
    fast: PyTree,
    state: PyTree,
    chunk: Chunks,
    ce_residuals: CEResiduals | None,
    pairing: _Pairing,
) -> tuple[PyTree, PyTree, PyTree, Array]:
    """The gradient of S (docstring of `meta_gradient`) in slow, fast, the state's blocks and x."""
    form: AttentionForm = "blocked" if pairing.v is None else "blocked_jvp"

    def outputs(slow: PyTree, fast: PyTree, blocks: PyTree, x_BCD: Array) -> tuple[Array, LossAux]:
        before = {**state, "blocks": blocks}
        inputs = chunk._replace(x_NBCD=x_BCD)
        return batch_loss(shared.chunk_model, slow, fast, before, inputs, form, ce_residuals)

    def total(slow: PyTree, fast: PyTree, blocks: PyTree, x_BCD: Array) -> Array:
        if pairing.v is None:
            loss_B, aux = outputs(slow, fast, blocks, x_BCD)
            change_B = jnp.zeros_like(loss_B)
        else:
            _, change_B, aux = jax.jvp(
                lambda fast: outputs(slow, fast, blocks, x_BCD), (fast,), (pairing.v,), has_aux=True
            )
        bar = pairing.records_bar
        paired = jnp.vdot(bar.loss_NB, aux.mean_nll_B) + jnp.vdot(bar.nll_NBC, aux.nll_BC)
        paired += shared.kv_buffer.pairing(aux.state, pairing.state_bar)
        return paired + jnp.sum(change_B)

    gradient = jax.grad(total, argnums=(0, 1, 2, 3))
    return gradient(shared.slow, fast, state["blocks"], chunk.x_NBCD)


def _backward_update(
    shared: Shared, fast: PyTree, bar: Cotangents, saved: SavedChunk, chunk: Chunks, is_exact: bool
) -> tuple[PyTree, Cotangents, PyTree | None]:
    """(W_{i-1}, the cotangents before the update, v: the cotangent of g_i, or None)."""
    leaves, tree = jax.tree.flatten(saved.rule_state)

    def update(
        fast: PyTree, inexact: list[Array], g: PyTree, lr: PyTree
    ) -> tuple[PyTree, list[Array], Array]:
        remaining = iter(inexact)
        merged = [next(remaining) if _is_inexact(leaf) else leaf for leaf in leaves]
        rule_state = jax.tree.unflatten(tree, merged)
        fast, rule_state, norm_B = apply_inner_update(
            shared.chunk_model, fast, rule_state, g, chunk, lr, is_constant=not is_exact
        )
        return fast, inexact_leaves(rule_state), norm_B

    inexact = inexact_leaves(saved.rule_state)
    change, _, _ = update(jax.tree.map(jnp.zeros_like, fast), inexact, saved.g, shared.lr)
    before = jax.tree.map(jnp.subtract, fast, change)
    (_, _, norm_B), pull = jax.vjp(update, before, inexact, saved.g, shared.lr)
    fast_bar, rule_bar, v, lr_bar = pull((bar.fast, bar.rule_state, jnp.zeros_like(norm_B)))
    lr_bar = jax.tree.map(jnp.add, bar.lr, lr_bar)
    bar = bar._replace(fast=fast_bar, rule_state=rule_bar, lr=lr_bar)
    return before, bar, v if is_exact else None


def _is_inexact(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def inexact_leaves(rule_state: PyTree) -> list[Array]:
    """The leaves of a rule's state that have derivatives: all but integer counts."""
    return [leaf for leaf in jax.tree.leaves(rule_state) if _is_inexact(leaf)]
