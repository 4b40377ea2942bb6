"""The inner loop: a model that learns from every chunk of tokens as it reads.

For chunks i = 1..n of one sequence (arXiv 2512.23675, eq. 5 and section 3 of the method):

    loss_i = loss(W_{i-1}, chunk_i)                  scored before the update: no token ever
    g_i    = d loss_i / d W_{i-1}                    profits from its own gradient
    W_i    = W_{i-1} + lr * rule(g_i)                rule: clipped SGD in the paper

The very same function reads at training and at test time. For training, `meta` differentiates
through it: gradients of gradients.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tttjax.ttt.update_rules import global_norm
from tttjax.types import Array, PyTree


class ReadState(NamedTuple):
    """How far one sequence has been read: everything that changes on the way."""

    fast: PyTree  # W_i
    rule_state: PyTree  # momentum and the like; empty for SGD
    state: PyTree  # what the model carries from chunk to chunk: windows of keys and values


class ChunkRecord(NamedTuple):
    """What one chunk showed; stacked over chunks by `adapt`."""

    loss: Array  # mean NLL over the chunk's counted tokens, before the update
    aux: Any  # whatever chunk_loss returned beside its loss
    grad_norm: Array  # ||g_i|| over all fast weights, before the rule


# chunk_loss(fast, state, chunk) -> (loss, (new model state, has_targets, aux))
ChunkLoss = Callable[[PyTree, PyTree, PyTree], tuple[Array, tuple[PyTree, Array, Any]]]


def start(rule: optax.GradientTransformation, fast: PyTree, state: PyTree) -> ReadState:
    """Nothing has been read: W = W0."""
    return ReadState(fast=fast, rule_state=rule.init(fast), state=state)


def read_chunk(
    chunk_loss: ChunkLoss,
    rule: optax.GradientTransformation,
    lr: Array | float,
    progress: ReadState,
    chunk: PyTree,
    update_is_constant: bool = False,
) -> tuple[ReadState, ChunkRecord]:
    """Scores one chunk with the weights as they are, then learns from it.

    update_is_constant: the outer gradient treats the change of W as a constant (first order).
    A chunk without a single counted target teaches nothing: W and the rule's state stay.
    """
    value_and_grad = jax.value_and_grad(chunk_loss, has_aux=True)
    (loss, (state, has_targets, aux)), g = value_and_grad(progress.fast, progress.state, chunk)
    fast, rule_state, grad_norm = update(
        rule, lr, progress.fast, progress.rule_state, g, has_targets, update_is_constant
    )
    return ReadState(fast, rule_state, state), ChunkRecord(loss, aux, grad_norm)


def update(
    rule: optax.GradientTransformation,
    lr: Array | float,
    fast: PyTree,
    rule_state: PyTree,
    g: PyTree,
    has_targets: Array,
    update_is_constant: bool = False,
) -> tuple[PyTree, PyTree, Array]:
    """W_i = W_{i-1} + lr * rule(g_i): the new weights, the rule's new state, and ||g_i||."""
    grad_norm = global_norm(g)
    # The rule sees ones instead of an empty gradient, whatever it does with them is dropped: so no
    # rule's derivative at zero can turn the whole meta-gradient into NaN.
    g = jax.tree.map(lambda leaf: jnp.where(has_targets, leaf, jnp.ones_like(leaf)), g)
    change, new_rule_state = rule.update(g, rule_state, fast)
    if update_is_constant:
        change, new_rule_state = jax.lax.stop_gradient((change, new_rule_state))

    def learn(w, u):
        return w + jnp.where(has_targets, jnp.asarray(lr, w.dtype) * u.astype(w.dtype), 0)

    def keep_if_empty(new, old):
        return jnp.where(has_targets, new, old)

    fast = jax.tree.map(learn, fast, change)
    return fast, jax.tree.map(keep_if_empty, new_rule_state, rule_state), grad_norm


def adapt(
    chunk_loss: ChunkLoss,
    rule: optax.GradientTransformation,
    lr: Array | float,
    progress: ReadState,
    chunks: PyTree,
    *,
    exact_chunks: int | None = None,
    remat: bool = True,
) -> tuple[ReadState, ChunkRecord]:
    """Reads the chunks [N, C, ...] of one sequence in order; records are stacked [N, ...].

    exact_chunks: the outer gradient goes through the updates of the last so many chunks only
        (None: through all of them; 0: first order).
    remat: compute each chunk again in the outer backward pass instead of keeping its activations.
    """
    length = jax.tree.leaves(chunks)[0].shape[0]
    first_exact = 0 if exact_chunks is None else max(length - exact_chunks, 0)

    def scan(progress: ReadState, chunks: PyTree, update_is_constant: bool):
        def step(progress, chunk):
            return read_chunk(chunk_loss, rule, lr, progress, chunk, update_is_constant)

        if remat:
            step = jax.checkpoint(step, prevent_cse=False)
        return jax.lax.scan(step, progress, chunks)

    if first_exact == 0:
        return scan(progress, chunks, update_is_constant=False)
    early = jax.tree.map(lambda x: x[:first_exact], chunks)
    progress, records = scan(progress, early, update_is_constant=True)
    if first_exact == length:
        return progress, records
    late = jax.tree.map(lambda x: x[first_exact:], chunks)
    progress, late_records = scan(progress, late, update_is_constant=False)
    return progress, jax.tree.map(lambda a, b: jnp.concatenate((a, b)), records, late_records)
