"""Prefill: the inner loop without an outer gradient.

A context is the state of B sequences, of constant size. `read_chunks` processes full chunks with
their inner updates, once the token after them, their last target, is known. `extend` processes the
tokens of an incomplete chunk without update. So any split of a text into calls gives the same
context. `read_sequences` scores whole sequences with them.

All functions are pure, for B sequences at the same position. Updates compute the losses anyway;
elsewhere logits are computed for the hidden states that `logits` is given.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tttjax.models.mixer import AttentionForm
from tttjax.models.split_model import SplitModel
from tttjax.models.stacking import combine
from tttjax.models.transformer import Transformer
from tttjax.ops.cross_entropy.nll import token_nll_in_blocks
from tttjax.parallel.batching import over_sequences
from tttjax.ttt.chunk import (
    STATE_AXES,
    ChunkModel,
    ChunkRecords,
    Chunks,
    apply_inner_update,
    loss_and_gradient,
)
from tttjax.ttt.outer_loss import LOGIT_ROWS, InnerLoop, split_chunks
from tttjax.types import Array, Batch, Params, PyTree


class InferenceModel(NamedTuple):
    """A model and its inner loop at test time.

    chunk_size: tokens per inner update, at rate `lr`; 0: no updates.
    clip: the norm to which the rule clips gradients (0: no clipping).
    """

    chunk_model: ChunkModel
    chunk_size: int
    lr: float | Array
    fast_dtype: jnp.dtype
    clip: float


class Weights(NamedTuple):
    """The slow weights by part of the model (`SplitModel`); the context has the fast weights.

    lr: the inner learning rate: a scalar, or a tree like the fast weights of one sequence.
    """

    parallel: PyTree
    sequential: PyTree
    lr: PyTree


UpdateCarry = tuple[PyTree, PyTree, PyTree]  # the sequential part's state, fast, rule_state


class Context(NamedTuple):
    """The state of B sequences; arrays are [B, ...] but for the positions.

    parallel, sequential: states of the two parts of the model (`SplitModel`). fast: the fast
    weights, laid out by `SplitModel.sequential_weights`.
    """

    parallel: PyTree
    sequential: PyTree
    fast: PyTree
    rule_state: PyTree


def make_inference_model(
    model: Transformer, inner: InnerLoop, lr: float, *, learn: bool = True
) -> InferenceModel:
    """The model with a configuration's inner loop; without fast weights there are no updates."""
    learns = learn and bool(model.fast_paths)
    return InferenceModel(
        ChunkModel(SplitModel(model), inner.rule, LOGIT_ROWS, inner.loss),
        inner.chunk_size if learns else 0,
        lr,
        inner.fast_dtype,
        inner.clip,
    )


def split_weights(inference_model: InferenceModel, params: Params) -> Weights:
    """The slow weights of `params` by part of the model."""
    split = inference_model.chunk_model.split
    lr = split.inner_rates(params.slow, inference_model.lr)
    return Weights(split.parallel_weights(params.slow), split.sequential_weights(params.slow), lr)


def init_context(
    inference_model: InferenceModel, params: Params, batch: int, max_length: int
) -> Context:
    """The context before the first token. max_length: capacity of full attention, in tokens."""
    chunk_model = inference_model.chunk_model
    split = chunk_model.split

    def broadcast(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape)), tree)

    def state(one: PyTree) -> PyTree:
        return {**one, "blocks": broadcast(one["blocks"])}

    fast = jax.tree.map(
        lambda w: w.astype(inference_model.fast_dtype), split.sequential_weights(params.fast)
    )
    return Context(
        parallel=state(split.init_parallel(max_length)),
        sequential=state(split.init_sequential(max_length)),
        fast=broadcast(fast),
        rule_state=broadcast(chunk_model.rule.init(fast)),
    )


def read_chunks(
    inference_model: InferenceModel,
    weights: Weights,
    context: Context,
    token_BT: Array,
    next_B: Array,
    mask_BT: Array | None = None,
    *,
    at_start: bool = False,
) -> tuple[Context, ChunkRecords]:
    """Processes N = T / C full chunks, with an inner update after each.

    context: after a multiple of C tokens. next_B: the tokens that follow. mask_BT: whether the
    token after each is a target (None: all are). at_start: these are the first tokens, so that the
    parallel part uses attention without a cache.
    """
    chunks, parallel = prepare_chunks(
        inference_model, weights, context, token_BT, next_B, mask_BT, at_start
    )

    def step(carry: UpdateCarry, chunk: Chunks) -> tuple[UpdateCarry, ChunkRecords]:
        carry, records, _ = update_from_chunk(inference_model, weights, carry, chunk)
        return carry, records

    carry = context.sequential, context.fast, context.rule_state
    (sequential, fast, rule_state), records = jax.lax.scan(step, carry, chunks)
    return Context(parallel, sequential, fast, rule_state), records


def prepare_chunks(
    inference_model: InferenceModel,
    weights: Weights,
    context: Context,
    token_BT: Array,
    next_B: Array,
    mask_BT: Array | None,
    at_start: bool,
) -> tuple[Chunks, PyTree]:
    """The sequential part's inputs for N full chunks, and the parallel part's new state."""
    x_BTD, parallel = _extend_parallel(inference_model, weights, context, token_BT, at_start)
    target_BT = jnp.concatenate((token_BT[:, 1:], next_B[:, None]), axis=1)

    def by_chunk(x_BT: Array) -> Array:
        rows = jax.vmap(split_chunks, in_axes=(0, None))(x_BT, inference_model.chunk_size)
        return jnp.swapaxes(rows, 0, 1)

    if mask_BT is None:
        mask_BT = jnp.ones(token_BT.shape, bool)
    return Chunks(by_chunk(x_BTD), by_chunk(target_BT), by_chunk(mask_BT)), parallel


def update_from_chunk(
    inference_model: InferenceModel,
    weights: Weights,
    carry: UpdateCarry,
    chunk: Chunks,
) -> tuple[UpdateCarry, ChunkRecords, PyTree]:
    """One chunk and its update: (the new carry, its records, the gradient of each sequence).

    carry: the sequential part's state, fast weights, rule state. chunk: without axis N.
    """
    sequential, fast, rule_state = carry
    losses, g = loss_and_gradient(
        inference_model.chunk_model, weights.sequential, fast, sequential, chunk
    )
    fast, rule_state, norm_B = apply_inner_update(
        inference_model.chunk_model, fast, rule_state, g, chunk, weights.lr
    )
    records = ChunkRecords(losses.mean_nll_B, losses.nll_BC, norm_B)
    return (losses.state, fast, rule_state), records, g


def extend(
    inference_model: InferenceModel,
    weights: Weights,
    context: Context,
    token_BT: Array,
    *,
    at_start: bool = False,
) -> tuple[Context, Array]:
    """Processes T tokens without update; returns the final normed hidden states [B, T, D]."""
    split = inference_model.chunk_model.split
    x_BTD, parallel = _extend_parallel(inference_model, weights, context, token_BT, at_start)
    form = _attention_form(token_BT.shape[1], at_start)

    def run(fast: PyTree, state: PyTree, x_TD: Array) -> tuple[Array, PyTree]:
        combined = combine(weights.sequential, fast)
        x_TD, state = split.run_sequential(combined, state, x_TD, form)
        return split.model.final_norm(combined, x_TD), state

    axes = (0, STATE_AXES, 0)
    run_all = over_sequences(run, in_axes=axes, out_axes=(0, STATE_AXES))
    h_BTD, sequential = run_all(context.fast, context.sequential, x_BTD)
    return context._replace(parallel=parallel, sequential=sequential), h_BTD


def logits(
    inference_model: InferenceModel, weights: Weights, context: Context, h_BTD: Array
) -> Array:
    """Logits [B, T, V] of hidden states from `extend`, in float32 at least."""
    model = inference_model.chunk_model.split.model

    def one(fast: PyTree, h_TD: Array) -> Array:
        return model.logits(combine(weights.sequential, fast), h_TD)

    return over_sequences(one)(context.fast, h_BTD)


def prefill(
    inference_model: InferenceModel, weights: Weights, context: Context, token_BT: Array
) -> tuple[Context, Context, Array]:
    """Processes a prompt, the first T tokens of B sequences.

    Returns the context after the last update, the context after all tokens, and the logits of the
    last token, [B, V]. Without inner updates both contexts are the same.
    """
    size = inference_model.chunk_size
    end = (token_BT.shape[1] - 1) // size * size if size else 0  # of the full chunks
    if end:
        context, _ = read_chunks(
            inference_model, weights, context, token_BT[:, :end], token_BT[:, end], at_start=True
        )
    now, h_BTD = extend(inference_model, weights, context, token_BT[:, end:], at_start=end == 0)
    logit_BV = logits(inference_model, weights, now, h_BTD[:, -1:])[:, 0]
    return context if size else now, now, logit_BV


def read_sequences(
    inference_model: InferenceModel, params: Params, batch: Batch
) -> tuple[Array, ChunkRecords | None, Context]:
    """(NLL [B, T] of the targets, the records of the full chunks, the context at the end).

    Every target is scored before the update it belongs to. batch: whole sequences, their targets
    the inputs shifted by one token. mask: of the inner losses; the NLL is not masked. The tokens
    after the last full chunk are read without update.
    """
    model, (size, length) = inference_model.chunk_model.split.model, batch.inputs.shape
    chunk = inference_model.chunk_size
    if not chunk:  # every weight is slow, so all sequences share it, and no block needs a split
        params = Params(slow=combine(params.slow, params.fast), fast={})
        chunk_model = inference_model.chunk_model
        chunk_model = chunk_model._replace(split=SplitModel(model, split_block=False))
        inference_model = inference_model._replace(chunk_model=chunk_model)
    weights = split_weights(inference_model, params)
    context = init_context(inference_model, params, size, length)
    full = length // chunk * chunk if chunk else 0
    records, nll = None, []
    if full:
        inputs_BT, mask_BT = batch.inputs[:, :full], batch.mask[:, :full]
        context, records = read_chunks(
            *(inference_model, weights, context, inputs_BT, batch.targets[:, full - 1], mask_BT),
            at_start=True,
        )
        nll.append(jnp.swapaxes(records.nll_NBC, 0, 1).reshape(size, full))
    if full < length:
        context, h_BTD = extend(
            inference_model, weights, context, batch.inputs[:, full:], at_start=not full
        )

        def rest_nll(fast: PyTree, h_TD: Array, target_T: Array) -> Array:
            head_DV = model.head(combine(weights.sequential, fast))
            rows = inference_model.chunk_model.logit_rows
            return token_nll_in_blocks(h_TD, head_DV, target_T, rows)

        nll.append(over_sequences(rest_nll)(context.fast, h_BTD, batch.targets[:, full:]))
    return jnp.concatenate(nll, axis=1), records, context


def _attention_form(length: int, at_start: bool) -> AttentionForm:
    """The form of attention: a single query has few scores; more queries go in blocks."""
    if at_start:
        return "prefill"
    return "dense" if length == 1 else "blocked"


def _extend_parallel(
    inference_model: InferenceModel,
    weights: Weights,
    context: Context,
    token_BT: Array,
    at_start: bool,
) -> tuple[Array, PyTree]:
    split, form = inference_model.chunk_model.split, _attention_form(token_BT.shape[1], at_start)

    def run(state: PyTree, token_T: Array) -> tuple[Array, PyTree]:
        return split.extend_parallel(weights.parallel, state, token_T, form)

    run_all = over_sequences(run, in_axes=(STATE_AXES, 0), out_axes=(0, STATE_AXES))
    return run_all(context.parallel, token_BT)
