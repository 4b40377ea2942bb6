"""Reading for its own sake: the inner loop without an outer gradient.

A context is what was read, at constant size. Whole chunks are read and learned from
(`read_chunks`), each once its last token's successor is known, since that is its last target; what
comes after the last whole chunk is only read (`extend`) until its chunk is full. So any split of a
text into calls gives the same context.

All functions are pure, for B sequences that stand at the same place. Losses come for free where a
chunk is learned from; otherwise logits are computed of the last token alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tttjax.models import SplitModel, Transformer, combine
from tttjax.parallel.batching import over_sequences
from tttjax.ttt.chunk import STATE_AXES, ChunkModel, ChunkRecords, Chunks, learn, loss_and_gradient
from tttjax.ttt.outer_loss import LOGIT_ROWS, InnerLoop, split_chunks
from tttjax.types import Array, Params, PyTree


class InferenceModel(NamedTuple):
    """How a model reads. chunk_size: tokens of an update, at rate `lr`; 0: it does not learn.

    clip: the norm to which the rule clips gradients (0: it does not).
    """

    learner: ChunkModel
    chunk_size: int
    lr: float
    fast_dtype: jnp.dtype
    clip: float


class Weights(NamedTuple):
    """The slow weights by the half of the model that reads them; W0 lies in the context."""

    lower: PyTree
    upper: PyTree


class Context(NamedTuple):
    """What B sequences have left behind; arrays are [B, ...] but for the positions.

    below, above: states of the two halves of the model (`SplitModel`). fast: the weights, as
    `SplitModel.above` lays them out.
    """

    below: PyTree
    above: PyTree
    fast: PyTree
    rule_state: PyTree


def make_inference_model(
    model: Transformer, inner: InnerLoop, lr: float, *, learn: bool = True
) -> InferenceModel:
    """A reader with a configuration's inner loop; a model without fast weights does not learn."""
    learns = learn and bool(model.fast_paths)
    return InferenceModel(
        ChunkModel(SplitModel(model), inner.rule, LOGIT_ROWS),
        inner.chunk_size if learns else 0,
        lr,
        inner.fast_dtype,
        inner.clip,
    )


def divide(reader: InferenceModel, params: Params) -> Weights:
    """The slow weights of `params` for this reader."""
    cut = reader.learner.cut
    return Weights(cut.lower(params.slow), cut.above(params.slow))


def start(reader: InferenceModel, params: Params, batch: int, max_length: int) -> Context:
    """Nothing has been read. max_length: tokens that full attention must have room for."""
    learner = reader.learner
    cut = learner.cut

    def spread(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape)), tree)

    def state(one: PyTree) -> PyTree:
        return {**one, "blocks": spread(one["blocks"])}

    fast = jax.tree.map(lambda w: w.astype(reader.fast_dtype), cut.above(params.fast))
    return Context(
        below=state(cut.init_parallel(max_length)),
        above=state(cut.init_state(max_length)),
        fast=spread(fast),
        rule_state=spread(learner.rule.init(fast)),
    )


def read_chunks(
    reader: InferenceModel,
    weights: Weights,
    context: Context,
    token_BT: Array,
    next_B: Array,
    counted_BT: Array | None = None,
    *,
    at_start: bool = False,
) -> tuple[Context, ChunkRecords]:
    """Reads N = T / C whole chunks and learns from each, at rate `reader.lr`.

    context: with a multiple of C tokens read. next_B: the tokens that follow. counted_BT: whether
    the token after each is one to learn from (None: all are). at_start: nothing has been read yet;
    then attention below is that of a whole sequence.
    """
    chunks, below = whole_chunks(reader, weights, context, token_BT, next_B, counted_BT, at_start)

    def step(carry, chunk):
        carry, records, _ = learn_from(reader, weights, carry, chunk)
        return carry, records

    carry = context.above, context.fast, context.rule_state
    (above, fast, rule_state), seen = jax.lax.scan(step, carry, chunks)
    return Context(below, above, fast, rule_state), seen


def whole_chunks(
    reader: InferenceModel,
    weights: Weights,
    context: Context,
    token_BT: Array,
    next_B: Array,
    counted_BT: Array | None,
    at_start: bool,
) -> tuple[Chunks, PyTree]:
    """What the upper half of the model reads of N whole chunks, and the lower half's new state."""
    x_BTD, below = _extend_parallel(reader, weights, context, token_BT, at_start)
    target_BT = jnp.concatenate((token_BT[:, 1:], next_B[:, None]), axis=1)

    def by_chunk(x_BT: Array) -> Array:
        rows = jax.vmap(split_chunks, in_axes=(0, None))(x_BT, reader.chunk_size)
        return jnp.swapaxes(rows, 0, 1)

    if counted_BT is None:
        counted_BT = jnp.ones(token_BT.shape, bool)
    return Chunks(by_chunk(x_BTD), by_chunk(target_BT), by_chunk(counted_BT)), below


def learn_from(
    reader: InferenceModel, weights: Weights, carry: tuple[PyTree, PyTree, PyTree], chunk: Chunks
) -> tuple[tuple[PyTree, PyTree, PyTree], ChunkRecords, PyTree]:
    """One chunk, learned from: (the new carry, its records, the gradient of each sequence).

    carry: the upper half's state, the fast weights and the rule's state. chunk: without its N.
    """
    above, fast, rule_state = carry
    (loss_B, (above, nll_BC, _)), g = loss_and_gradient(
        reader.learner, weights.upper, fast, above, chunk
    )
    fast, rule_state, norm_B = learn(reader.learner, fast, rule_state, g, chunk, reader.lr)
    return (above, fast, rule_state), ChunkRecords(loss_B, nll_BC, norm_B), g


def extend(
    reader: InferenceModel,
    weights: Weights,
    context: Context,
    token_BT: Array,
    *,
    at_start: bool = False,
) -> tuple[Context, Array]:
    """Reads T tokens without learning; the hidden states after the last norm, [B, T, D]."""
    cut = reader.learner.cut
    x_BTD, below = _extend_parallel(reader, weights, context, token_BT, at_start)
    form = _form(token_BT.shape[1], at_start)

    def run(fast: PyTree, state: PyTree, x_TD: Array) -> tuple[Array, PyTree]:
        whole = combine(weights.upper, fast)
        x_TD, state = cut.run(whole, state, x_TD, form)
        return cut.model.final_norm(whole, x_TD), state

    axes = (0, STATE_AXES, 0)
    run_all = over_sequences(run, in_axes=axes, out_axes=(0, STATE_AXES))
    h_BTD, above = run_all(context.fast, context.above, x_BTD)
    return context._replace(below=below, above=above), h_BTD


def logits(reader: InferenceModel, weights: Weights, context: Context, h_BTD: Array) -> Array:
    """Logits [B, T, V] of hidden states from `extend`, in float32 at least."""
    model = reader.learner.cut.model

    def one(fast: PyTree, h_TD: Array) -> Array:
        return model.logits(combine(weights.upper, fast), h_TD)

    return over_sequences(one)(context.fast, h_BTD)


def prefill(
    reader: InferenceModel, weights: Weights, context: Context, token_BT: Array
) -> tuple[Context, Context, Array]:
    """Reads a prompt, the first T tokens of its sequences.

    Returns the context after the last chunk that was learned from; that after all tokens, for what
    follows; and the logits of the last token, [B, V]. Without learning both contexts are one.
    """
    length = token_BT.shape[1]
    whole = (length - 1) // reader.chunk_size * reader.chunk_size if reader.chunk_size else 0
    if whole:
        context, _ = read_chunks(
            reader, weights, context, token_BT[:, :whole], token_BT[:, whole], at_start=True
        )
    now, h_BTD = extend(reader, weights, context, token_BT[:, whole:], at_start=whole == 0)
    logit_BV = logits(reader, weights, now, h_BTD[:, -1:])[:, 0]
    return context if reader.chunk_size else now, now, logit_BV


def _form(length: int, at_start: bool) -> str:
    """Of attention. A single query's scores are few; longer stretches go in blocks."""
    if at_start:
        return "start"
    return "dense" if length == 1 else "once"


def _extend_parallel(
    reader: InferenceModel, weights: Weights, context: Context, token_BT: Array, at_start: bool
) -> tuple[Array, PyTree]:
    cut, form = reader.learner.cut, _form(token_BT.shape[1], at_start)

    def run(state: PyTree, token_T: Array) -> tuple[Array, PyTree]:
        return cut.extend_parallel(weights.lower, state, token_T, form)

    run_all = over_sequences(run, in_axes=(STATE_AXES, 0), out_axes=(0, STATE_AXES))
    return run_all(context.below, token_BT)
