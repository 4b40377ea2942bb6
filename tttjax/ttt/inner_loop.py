"""The inner loop: one update of the fast weights after every chunk of tokens.

For chunks i = 1..n of one sequence (arXiv 2512.23675, eq. 5 and section 3 of the method):

    loss_i = loss(W_{i-1}, chunk_i)                  scored before the update: no token ever
    g_i    = d loss_i / d W_{i-1}                    profits from its own gradient
    W_i    = W_{i-1} + lr * rule(g_i)                rule: clipped SGD in the paper

`read_chunk` and `adapt` define the method; `outer_loss` differentiates through them. By default
training (`meta_gradient`) and inference (`inference.prefill`) compute the same numbers for a batch
of sequences with `ttt.chunk`. All of them call `update`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from tttjax.ttt.update_rules import global_norm
from tttjax.types import Array, PyTree


class ReadState(NamedTuple):
    """Everything that changes from chunk to chunk of one sequence."""

    fast: PyTree  # W_i
    rule_state: PyTree  # momentum and the like; empty for SGD
    state: PyTree  # of the model: windows of keys and values, recurrent states


class ChunkRecord(NamedTuple):
    """The record of one chunk; `adapt` stacks them."""

    loss: Array  # inner loss, before the update; by default the mean NLL of the chunk's targets
    aux: PyTree  # the auxiliary output of chunk_loss
    grad_norm: Array  # ||g_i|| over all fast weights, before the rule


# chunk_loss(fast, state, chunk) -> (loss, (new model state, has_targets, aux))
ChunkLoss = Callable[[PyTree, PyTree, PyTree], tuple[Array, tuple[PyTree, Array, PyTree]]]


def start(rule: optax.GradientTransformation, fast: PyTree, state: PyTree) -> ReadState:
    """The state before the first chunk: W = W0."""
    return ReadState(fast=fast, rule_state=rule.init(fast), state=state)


def read_chunk(
    chunk_loss: ChunkLoss,
    rule: optax.GradientTransformation,
    lr: Array | float | PyTree,
    read_state: ReadState,
    chunk: PyTree,
    update_is_constant: bool = False,
) -> tuple[ReadState, ChunkRecord]:
    """Computes the loss of one chunk with the current weights, then updates them.

    update_is_constant: the outer gradient treats the change of W as a constant (first order).
    A chunk without targets changes neither W nor the rule's state.
    """
    value_and_grad = jax.value_and_grad(chunk_loss, has_aux=True)
    (loss, (state, has_targets, aux)), g = value_and_grad(read_state.fast, read_state.state, chunk)
    fast, rule_state, grad_norm = update(
        rule, lr, read_state.fast, read_state.rule_state, g, has_targets, update_is_constant
    )
    return ReadState(fast, rule_state, state), ChunkRecord(loss, aux, grad_norm)


def update(
    rule: optax.GradientTransformation,
    lr: Array | float | PyTree,
    fast: PyTree,
    rule_state: PyTree,
    g: PyTree,
    has_targets: Array,
    update_is_constant: bool = False,
) -> tuple[PyTree, PyTree, Array]:
    """W_i = W_{i-1} + lr * rule(g_i): the new weights, the rule's new state, and ||g_i||.

    lr: a scalar, or a tree like `fast` of arrays that broadcast with its own.
    """
    grad_norm = global_norm(g)
    # A rule's derivative at a zero gradient may be NaN, which would reach the meta-gradient even if
    # its result is dropped. So without targets the rule gets ones, and its result is dropped.
    g = jax.tree.map(lambda leaf: jnp.where(has_targets, leaf, jnp.ones_like(leaf)), g)
    change, new_rule_state = rule.update(g, rule_state, fast)
    if update_is_constant:
        change, new_rule_state = jax.lax.stop_gradient((change, new_rule_state))

    def add_update(w: Array, u: Array, lr: Array | float) -> Array:
        return w + jnp.where(has_targets, jnp.asarray(lr, w.dtype) * u.astype(w.dtype), 0)

    def keep_if_empty(new: Array, old: Array) -> Array:
        return jnp.where(has_targets, new, old)

    fast = jax.tree.map(add_update, fast, change, jax.tree.broadcast(lr, fast))
    return fast, jax.tree.map(keep_if_empty, new_rule_state, rule_state), grad_norm


def adapt(
    chunk_loss: ChunkLoss,
    rule: optax.GradientTransformation,
    lr: Array | float | PyTree,
    read_state: ReadState,
    chunks: PyTree,
    *,
    exact_chunks: int | None = None,
    remat: bool = True,
) -> tuple[ReadState, ChunkRecord]:
    """Runs the inner loop over the chunks [N, C, ...] of one sequence; records are [N, ...].

    lr: as in `update`.
    exact_chunks: the outer gradient goes through the updates of only the last so many chunks
        (None: all; 0: first order).
    remat: recompute each chunk in the outer backward pass instead of storing its activations.
    """
    length = jax.tree.leaves(chunks)[0].shape[0]
    first_exact = 0 if exact_chunks is None else max(length - exact_chunks, 0)

    def scan(
        read_state: ReadState, chunks: PyTree, update_is_constant: bool
    ) -> tuple[ReadState, ChunkRecord]:
        def step(read_state: ReadState, chunk: PyTree) -> tuple[ReadState, ChunkRecord]:
            return read_chunk(chunk_loss, rule, lr, read_state, chunk, update_is_constant)

        if remat:
            step = jax.checkpoint(step, prevent_cse=False)
        return jax.lax.scan(step, read_state, chunks)

    if first_exact == 0:
        return scan(read_state, chunks, update_is_constant=False)
    constant = jax.tree.map(lambda x: x[:first_exact], chunks)
    read_state, records = scan(read_state, constant, update_is_constant=True)
    if first_exact == length:
        return read_state, records
    exact = jax.tree.map(lambda x: x[first_exact:], chunks)
    read_state, exact_records = scan(read_state, exact, update_is_constant=False)
    return read_state, jax.tree.map(lambda a, b: jnp.concatenate((a, b)), records, exact_records)
