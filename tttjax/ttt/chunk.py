"""One chunk of B sequences in the sequential part of a model: loss, gradient and inner update.

The steps of `inner_loop.read_chunk` for a batch of sequences at one position: `loss_and_gradient`,
then `apply_inner_update`. Attention and logits are computed in blocks. Training (`meta_gradient`)
and inference (`inference.prefill`) loop over it.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tttjax.models.mixer import AttentionForm
from tttjax.models.split_model import SplitModel
from tttjax.models.stacking import combine
from tttjax.ops.cross_entropy.blocked import Blocks, CEResiduals
from tttjax.ops.cross_entropy.nll import (
    blocked_nll,
    blocked_nll_jvp,
    masked_mean,
    token_nll_in_blocks,
)
from tttjax.parallel.batching import over_sequences
from tttjax.parallel.kernel_mesh import auto_axes
from tttjax.ttt import inner_loop
from tttjax.types import Array, PyTree

LOGIT_COLUMNS = 2**14  # block of the vocabulary, if it is not sharded
STATE_AXES = {"position": None, "blocks": 0}  # all sequences of a batch have one position


class LossInputs(NamedTuple):
    """What a custom inner loss is made of: one chunk of one sequence, before its update."""

    nll_C: Array  # of the targets, float32 at least
    mask_C: Array | np.ndarray  # bool: whether a target counts; not all False (`fill_empty`)
    target_C: Array | np.ndarray  # int: the token after each
    h_CD: Array  # hidden states after the final norm, in the compute dtype
    head_DV: Array  # logits are h_CD @ head_DV
    fast: PyTree  # W_{i-1}, laid out as `Params.fast`


InnerLoss = Callable[[LossInputs], Array]  # a scalar


def fill_empty(mask_C: Array) -> Array:
    """The mask, but all True if it is all False.

    The update of a chunk without targets is dropped. But a custom loss of no target may have NaN
    derivatives, which would reach the meta-gradient.
    """
    return mask_C | ~jnp.any(mask_C)


class LossAux(NamedTuple):
    """What `batch_loss` computes beside the inner loss [B]."""

    state: PyTree  # of the model, after the chunk
    mean_nll_B: Array  # over the targets; the inner loss unless that is custom
    nll_BC: Array
    ce_residuals: CEResiduals | None


class ChunkModel(NamedTuple):
    """A split model, the update rule of its fast weights, and its inner loss.

    logit_rows: rows of logits in memory at a time. loss: None: the mean NLL of the targets.
    """

    split: SplitModel
    rule: optax.GradientTransformation
    logit_rows: int
    loss: InnerLoss | None = None


class Chunks(NamedTuple):
    """The inputs of the loop: N chunks of B sequences."""

    x_NBCD: Array
    target_NBC: Array
    mask_NBC: Array


class ChunkRecords(NamedTuple):
    """Records of N chunks, each before its update. loss_NB: the mean NLL of the targets."""

    loss_NB: Array
    nll_NBC: Array
    grad_norm_NB: Array


def batch_loss(
    chunk_model: ChunkModel,
    slow: PyTree,
    fast: PyTree,
    state: PyTree,
    chunk: Chunks,
    form: AttentionForm,
    ce_residuals: CEResiduals | None = None,
) -> tuple[Array, LossAux]:
    """(the inner loss [B], the rest) of B sequences.

    chunk: one chunk, so its arrays are [B, C, ...], without the axis N of their names.
    form: "blocked" for jax.grad, "blocked_jvp" for jax.grad of jax.jvp. ce_residuals: those of
    "blocked" with the same weights and inputs, which "blocked_jvp" needs unless the head is fast.
    """
    model, split = chunk_model.split.model, chunk_model.split

    def run(fast: PyTree, state: PyTree, x_CD: Array) -> tuple[Array, PyTree]:
        weights = combine(slow, fast)
        x_CD, state = split.run_sequential(weights, state, x_CD, form)
        return model.final_norm(weights, x_CD), state

    axes = (0, STATE_AXES, 0)
    run_all = over_sequences(run, in_axes=axes, out_axes=(0, STATE_AXES))
    h_BCD, state = run_all(fast, state, chunk.x_NBCD)
    if "head" in split.model.fast_paths:
        nll = partial(token_nll_in_blocks, block=chunk_model.logit_rows)
        head_BDV = fast["head"].astype(h_BCD.dtype)
        nll_BC, ce_residuals = over_sequences(nll)(h_BCD, head_BDV, chunk.target_NBC), None
    else:
        head_DV = model.head(slow)
        inputs = h_BCD, head_DV, chunk.target_NBC
        blocks = Blocks(chunk_model.logit_rows, _vocab_block(head_DV.shape[1]))
        if form == "blocked_jvp":
            assert ce_residuals is not None
            nll_BC = blocked_nll_jvp(*inputs, ce_residuals, blocks)
        else:
            nll_BC, ce_residuals = blocked_nll(*inputs, blocks)
    mean_nll_B = masked_mean(nll_BC, chunk.mask_NBC)
    aux = LossAux(state, mean_nll_B, nll_BC, ce_residuals)
    loss = chunk_model.loss
    if loss is None:
        return mean_nll_B, aux

    def custom_loss(
        nll_C: Array, mask_C: Array, target_C: Array, h_CD: Array, fast: PyTree
    ) -> Array:
        head_DV = model.head(combine(slow, fast))
        counts_C = fill_empty(mask_C)
        return loss(LossInputs(nll_C, counts_C, target_C, h_CD, head_DV, split.join(fast)))

    return over_sequences(custom_loss)(nll_BC, chunk.mask_NBC, chunk.target_NBC, h_BCD, fast), aux


def _vocab_block(vocab: int) -> int | None:
    """Columns in a block of logits: equal parts of at most LOGIT_COLUMNS; None: all.

    A sharded vocabulary is not split further.
    """
    if any(size > 1 for size in auto_axes().values()):
        return None
    return -(-vocab // -(-vocab // LOGIT_COLUMNS))


def loss_and_gradient(
    chunk_model: ChunkModel, slow: PyTree, fast: PyTree, state: PyTree, chunk: Chunks
) -> tuple[LossAux, PyTree]:
    """(the losses of B sequences, the gradient of each one's inner loss [B, ...])."""

    def total(fast: PyTree) -> tuple[Array, LossAux]:
        loss_B, aux = batch_loss(chunk_model, slow, fast, state, chunk, "blocked")
        return jnp.sum(loss_B), aux

    (_, aux), g = jax.value_and_grad(total, has_aux=True)(fast)
    return aux, g


def apply_inner_update(
    chunk_model: ChunkModel,
    fast: PyTree,
    rule_state: PyTree,
    g: PyTree,
    chunk: Chunks,
    lr: Array | float | PyTree,
    is_constant: bool = False,
) -> tuple[PyTree, PyTree, Array]:
    """`inner_loop.update` for B sequences: (fast, rule_state, norm of g [B]).

    lr: a scalar or a tree like the fast weights of one sequence.
    """

    def one(
        fast: PyTree, rule_state: PyTree, g: PyTree, mask_C: Array
    ) -> tuple[PyTree, PyTree, Array]:
        return inner_loop.update(
            chunk_model.rule, lr, fast, rule_state, g, jnp.any(mask_C), is_constant
        )

    return over_sequences(one)(fast, rule_state, g, chunk.mask_NBC)
