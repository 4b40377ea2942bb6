"""The outer loss: the mean over chunks of the inner loop's losses. This file defines the method.

    loss(theta, W0) = mean over sequences of mean over chunks of loss_i(W_{i-1})     (eq. 6)

with W_i from `inner_loop.adapt`. A batch with weights (`Batch.weight`) has the weighted mean of the
targets' NLL instead; the inner loss and the updates stay those of all targets, since the model
learns from a prompt as it reads it. The outer gradient is plain `jax.grad` of this function,
through every update, the clip's norm, the cached keys and values, and the prefix. By default
(`InnerLoop.form`) training computes the same values with `meta_gradient.make_loop`, whose VJP is
custom. `make_forward` chooses: `forward_static` without updates, `forward_ttt` the definition,
`forward_ttt_fast` the default.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from tttjax.config.custom_code import custom_code
from tttjax.config.schema import InnerConfig
from tttjax.models.split_model import SplitModel
from tttjax.models.stacking import combine
from tttjax.models.transformer import Transformer, advance
from tttjax.ops.cross_entropy.nll import masked_mean
from tttjax.parallel.batching import over_sequences
from tttjax.ttt import inner_loop
from tttjax.ttt.chunk import ChunkModel, Chunks, InnerLoss, LossInputs, fill_empty
from tttjax.ttt.custom_code import (
    check_fast_loss,
    check_fast_rule,
    custom_loss,
    custom_rule,
)
from tttjax.ttt.layer_norms import norms, squares
from tttjax.ttt.meta_gradient import LoopConfig, make_loop
from tttjax.ttt.update_rules import global_norm, make_rule
from tttjax.types import Array, Batch, Params, PyTree

LOGIT_ROWS = 1024  # rows of logits in memory at a time


class ForwardOutput(NamedTuple):
    """The result of a forward pass over one sequence. N chunks, T tokens; [B, ...] for a batch."""

    loss: Array  # mean of chunk_loss_N, or the weighted sum of token_nll_T if there are weights
    chunk_loss_N: Array
    token_nll_T: Array  # not masked
    grad_norm_N: Array  # inner gradient norms before the rule; zeros without updates
    fast: PyTree  # the fast weights after the last update
    drift: Array  # ||W_n - W0||
    layer_drift_L: Array  # the same by layer (`fast_layers`)


class InnerLoop(NamedTuple):
    """Settings of the inner loop (from `InnerConfig` by `make_inner_loop`)."""

    chunk_size: int
    rule: optax.GradientTransformation
    clip: float  # the norm to which the rule clips (0: it does not)
    fast_dtype: jnp.dtype
    exact_chunks: int | None  # the outer gradient goes through the last so many updates
    remat: bool
    form: str = "fast"  # of the outer gradient; "reference": plain jax.grad
    trajectory: str = "rewind"  # of the fast weights, in the fast form
    loss: InnerLoss | None = None  # None: the mean NLL of a chunk's targets


def exact_chunks(meta_gradient: str, truncate_chunks: int) -> int | None:
    """The number of last updates that the outer gradient goes through; None: all."""
    return {"exact": None, "truncated": truncate_chunks, "first_order": 0, "none": 0}[meta_gradient]


def make_inner_loop(inner: InnerConfig) -> InnerLoop:
    """The inner loop of an `InnerConfig`.

    Raises UserError for a custom rule or loss of a file that this process has not run.
    """
    custom = custom_code(inner.code) if "custom" in (inner.rule, inner.loss) else None
    if custom and inner.rule == "custom":
        rule = custom_rule(custom, inner)
    else:
        rule = make_rule(
            inner.rule,
            clip=inner.clip,
            momentum=inner.momentum,
            b1=inner.b1,
            b2=inner.b2,
            eps=inner.eps,
        )
    return InnerLoop(
        chunk_size=inner.chunk_size,
        rule=rule,
        clip=0.0 if inner.rule == "custom" else inner.clip,
        fast_dtype=jnp.dtype(inner.fast_dtype),
        exact_chunks=exact_chunks(inner.meta_gradient, inner.truncate_chunks),
        remat=inner.remat,
        form=inner.form,
        trajectory=inner.trajectory,
        loss=custom_loss(custom) if custom and inner.loss == "custom" else None,
    )


def inner_lr(step: Array | int, *, lr: float, lr_init: float, warmup_steps: int) -> Array | float:
    """Learning rate of the inner loop at outer step 0, 1, ...: linear from lr_init to lr.

    Step 0 is already one increment above lr_init; without warm-up it is lr.
    """
    if warmup_steps == 0:
        return lr
    return lr_init + (lr - lr_init) * jnp.minimum(1.0, (step + 1) / warmup_steps)


def split_chunks(x_T: Array, chunk_size: int) -> Array:
    """[T, ...] -> [N, C, ...]."""
    return x_T.reshape((-1, chunk_size, *x_T.shape[1:]))


def normalise_weights(batch: Batch) -> Batch:
    """The batch with weights of sum B, so that the outer loss of B sequences is a weighted mean.

    The sum is over the whole batch: normalise before it is split among devices and micro-batches.
    Without any target the weights stay 0, and so are loss and gradient. Does nothing without
    weights.
    """
    if batch.weight is None:
        return batch
    weight_BT = batch.weight.astype(jnp.result_type(float))
    total = jnp.sum(weight_BT)
    scale = len(weight_BT) / jnp.where(total > 0, total, 1)
    return dataclasses.replace(batch, weight=weight_BT * scale)


def _make_output(
    model: Transformer,
    chunk_loss_N: Array,
    nll_T: Array,
    grad_norm_N: Array,
    weight_T: Array | None,
    fast: PyTree,
    fast_start: PyTree,
) -> ForwardOutput:
    change = jax.tree.map(jnp.subtract, fast, fast_start)
    drift, by_layer = global_norm(change), norms(model, squares(change))
    if weight_T is None:
        loss = jnp.mean(chunk_loss_N)
    else:
        loss = jnp.sum(jnp.where(weight_T > 0, weight_T * nll_T, 0))
    return ForwardOutput(loss, chunk_loss_N, nll_T, grad_norm_N, fast, drift, by_layer)


def forward_static(
    model: Transformer,
    params: Params,
    inputs_T: Array,
    targets_T: Array,
    mask_T: Array,
    chunk: int,
    weight_T: Array | None = None,
) -> ForwardOutput:
    """One sequence without inner updates: a single pass over all tokens.

    The loss is the mean over chunks of `chunk` tokens of their means, as in `forward_ttt`.
    """
    weights = combine(params.slow, params.fast)
    x_TD = model.embed(params.slow, inputs_T)
    for part in ("prefix", "suffix"):
        x_TD, _ = model.run_part(part, weights, None, x_TD)
    nll_T = model.nll(weights, x_TD, targets_T, block=LOGIT_ROWS)
    chunk_loss_N = masked_mean(split_chunks(nll_T, chunk), split_chunks(mask_T, chunk))
    zero_N = jnp.zeros_like(chunk_loss_N)
    return _make_output(model, chunk_loss_N, nll_T, zero_N, weight_T, params.fast, params.fast)


def make_chunk_loss(
    model: Transformer, slow: PyTree, custom_loss: InnerLoss | None = None
) -> inner_loop.ChunkLoss:
    """The inner loss of one chunk as a function of the fast weights; its aux is the NLL [C].

    A chunk is (x_CD, targets_C, mask_C): prefix outputs, targets, whether they count.
    """

    def chunk_loss(
        fast: PyTree, state: PyTree, chunk: tuple[Array, Array, Array]
    ) -> tuple[Array, tuple[PyTree, Array, Array]]:
        x_CD, target_C, mask_C = chunk
        weights = combine(slow, fast)
        x_CD, state = model.run_part("suffix", weights, state, x_CD, remat=False)
        nll_C = model.nll(weights, x_CD, target_C, block=LOGIT_ROWS)
        state = advance(state, x_CD.shape[0])
        if custom_loss is None:
            loss = masked_mean(nll_C, mask_C)
        else:
            h_CD, head_DV = model.final_norm(weights, x_CD), model.head(weights)
            counts_C = fill_empty(mask_C)
            loss = custom_loss(LossInputs(nll_C, counts_C, target_C, h_CD, head_DV, fast))
        return loss, (state, jnp.any(mask_C), nll_C)

    return chunk_loss


def forward_ttt(
    model: Transformer,
    inner: InnerLoop,
    params: Params,
    inputs_T: Array,
    targets_T: Array,
    mask_T: Array,
    lr: Array | float,
    weight_T: Array | None = None,
) -> ForwardOutput:
    """One sequence with inner updates: the prefix over all tokens, then the suffix by chunks."""
    length = inputs_T.shape[0]
    weights = combine(params.slow, params.fast)
    x_TD, _ = model.run_part("prefix", weights, None, model.embed(params.slow, inputs_T))
    fast = jax.tree.map(lambda w: w.astype(inner.fast_dtype), params.fast)
    end, records = inner_loop.adapt(
        make_chunk_loss(model, params.slow, inner.loss),
        inner.rule,
        model.inner_rates(params.slow, lr),
        inner_loop.start(inner.rule, fast, model.init_state(length, parts=["suffix"])),
        tuple(split_chunks(x, inner.chunk_size) for x in (x_TD, targets_T, mask_T)),
        exact_chunks=inner.exact_chunks,
        remat=inner.remat,
    )
    loss_N = records.loss
    if inner.loss is not None:  # the outer loss stays that of the next token
        loss_N = masked_mean(records.aux, split_chunks(mask_T, inner.chunk_size))
    nll_T = records.aux.reshape(-1)
    return _make_output(model, loss_N, nll_T, records.grad_norm, weight_T, end.fast, fast)


def forward_ttt_fast(
    model: Transformer, inner: InnerLoop, params: Params, batch: Batch, lr: Array | float
) -> ForwardOutput:
    """`forward_ttt` for B sequences, [B, ...], with the fast form of the meta-gradient."""
    split = SplitModel(model)
    chunk_model = ChunkModel(split, inner.rule, LOGIT_ROWS, inner.loss)
    loop = LoopConfig(chunk_model, inner.exact_chunks, inner.trajectory)
    start = jax.tree.map(lambda w: w.astype(inner.fast_dtype), params.fast)
    check_fast_rule(inner.rule, start)
    if inner.loss is not None:
        check_fast_loss(inner.loss, model, inner.chunk_size, start)
    x_BTD = over_sequences(partial(split.run_parallel, params.slow))(batch.inputs)

    def by_chunk(x_BT: Array) -> Array:
        x_BNC = jax.vmap(partial(split_chunks, chunk_size=inner.chunk_size))(x_BT)
        return jnp.swapaxes(x_BNC, 0, 1)

    records, fast = make_loop(loop)(
        split.sequential_weights(params.slow),
        split.sequential_weights(start),
        Chunks(by_chunk(x_BTD), by_chunk(batch.targets), by_chunk(batch.mask)),
        split.inner_rates(params.slow, lr),
    )
    loss_BN, nll_BNC, norm_BN = (jnp.swapaxes(x, 0, 1) for x in records)
    nll_BT = nll_BNC.reshape(batch.inputs.shape)
    make_outputs = jax.vmap(partial(_make_output, model), in_axes=(0, 0, 0, 0, 0, None))
    end = jax.vmap(split.join)(fast)
    return make_outputs(loss_BN, nll_BT, norm_BN, batch.weight, end, start)


def make_forward(
    model: Transformer, inner: InnerLoop, *, learn: bool
) -> Callable[[Params, Batch, Array | float], ForwardOutput]:
    """forward(params, batch, inner_lr) -> `ForwardOutput` of every sequence, stacked [B, ...].

    learn: False for no inner updates (TTT off, and every model without fast weights).
    """
    if learn and inner.form == "fast":
        return partial(forward_ttt_fast, model, inner)

    def forward_one(params: Params, one: Batch, lr: Array | float) -> ForwardOutput:
        arrays, weight_T = (one.inputs, one.targets, one.mask), one.weight
        if not learn:
            return forward_static(model, params, *arrays, inner.chunk_size, weight_T)
        return forward_ttt(model, inner, params, *arrays, lr, weight_T)

    return over_sequences(forward_one, in_axes=(None, 0, None))


def learns(model: Transformer, meta_gradient: str) -> bool:
    """Whether training runs the inner loop: there are fast weights, and a meta-gradient."""
    return bool(model.fast_paths) and meta_gradient != "none"


def make_outer_loss(
    model: Transformer, inner: InnerLoop, *, learn: bool
) -> Callable[[Params, Batch, Array | float], tuple[Array, ForwardOutput]]:
    """outer_loss(params, batch, inner_lr) -> (mean loss over sequences, ForwardOutput [B, ...]).

    Weights of the batch must be normalised (`normalise_weights`).
    """
    forward = make_forward(model, inner, learn=learn)

    def outer_loss(params: Params, batch: Batch, lr: Array | float) -> tuple[Array, ForwardOutput]:
        chex.assert_rank(
            batch.inputs, 2
        )  # [B, T]; a sequence without batch axis would be taken for a batch
        chex.assert_equal_shape([batch.inputs, batch.targets, batch.mask])
        output = forward(params, batch, lr)
        return jnp.mean(output.loss), output

    return outer_loss
