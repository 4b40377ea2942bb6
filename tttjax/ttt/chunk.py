"""One chunk of B sequences read by the upper half of a model: its loss, its gradient, its update.

`inner_loop.read_chunk` for a whole batch of sequences that stand at the same place, with blocked
attention and no logits in memory: training (`fast_gradient`) and reading (`inference`) loop over
it.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tttjax.models import SplitModel, combine
from tttjax.ops.cross_entropy.nll import (
    blocked_nll_jvp,
    blocked_nll_with_residuals,
    masked_mean,
    token_nll_in_blocks,
)
from tttjax.parallel.batching import over_sequences
from tttjax.parallel.kernel_mesh import free_axes
from tttjax.ttt import inner_loop
from tttjax.types import Array

LOGIT_COLUMNS = 2**14  # of the vocabulary at a time, where it is not divided among devices
STATE_AXES = {"position": None, "blocks": 0}  # sequences that are read together stand together


class ChunkModel(NamedTuple):
    """Who reads: a model in two halves, and the rule by which its fast weights change.

    logit_rows: rows of logits in memory at a time.
    """

    cut: SplitModel
    rule: optax.GradientTransformation
    logit_rows: int


class Chunks(NamedTuple):
    """What the loop reads, for N chunks of B sequences."""

    x_NBCD: Array
    target_NBC: Array
    mask_NBC: Array


class ChunkRecords(NamedTuple):
    """What N chunks showed, each before it was learned from."""

    loss_NB: Array
    nll_NBC: Array
    grad_norm_NB: Array


def batch_loss(learner: ChunkModel, slow, fast, state, chunk: Chunks, form: str, slope=None):
    """Of B sequences: (loss [B], (new state, nll [B, C], slope)); `chunk` without its N.

    form: "once" for jax.grad alone, "twice" for jax.grad of jax.jvp. slope: what an earlier call
    with the same weights and inputs has returned (`ops.cross_entropy.CEResiduals`).
    """
    model, cut = learner.cut.model, learner.cut

    def run(fast, state, x_CD):
        weights = combine(slow, fast)
        x_CD, state = cut.run(weights, state, x_CD, form)
        return model.final_norm(weights, x_CD), state

    axes = (0, STATE_AXES, 0)
    run_all = over_sequences(run, in_axes=axes, out_axes=(0, STATE_AXES))
    h_BCD, state = run_all(fast, state, chunk.x_NBCD)
    if "head" in cut.model.fast_paths:
        nll = partial(token_nll_in_blocks, block=learner.logit_rows)
        head_BDV = fast["head"].astype(h_BCD.dtype)
        nll_BC, slope = over_sequences(nll)(h_BCD, head_BDV, chunk.target_NBC), None
    else:
        head_DV = model.head(slow)
        read = h_BCD, head_DV, chunk.target_NBC
        sizes: dict[str, Any] = {"rows_block": learner.logit_rows}
        sizes["vocab_block"] = _columns(head_DV.shape[1])
        if form == "twice":
            nll_BC = blocked_nll_jvp(*read, slope, **sizes)
        else:
            nll_BC, slope = blocked_nll_with_residuals(*read, **sizes)
    return masked_mean(nll_BC, chunk.mask_NBC), (state, nll_BC, slope)


def _columns(vocab: int) -> int | None:
    """Columns of a block of logits: even parts of at most LOGIT_COLUMNS; None: all.

    A vocabulary that the mesh divides is left whole: each device has a part of it anyway.
    """
    if any(size > 1 for size in free_axes().values()):
        return None
    return -(-vocab // -(-vocab // LOGIT_COLUMNS))


def loss_and_gradient(learner: ChunkModel, slow, fast, state, chunk: Chunks):
    """(what `batch_loss` gives, the gradient of each sequence's own loss [B, ...])."""

    def total(fast):
        loss_B, aux = batch_loss(learner, slow, fast, state, chunk, "once")
        return jnp.sum(loss_B), (loss_B, aux)

    (_, out), g = jax.value_and_grad(total, has_aux=True)(fast)
    return out, g


def learn(learner: ChunkModel, fast, rule_state, g, chunk: Chunks, lr, is_constant: bool = False):
    """`inner_loop.update` of B sequences: (fast, rule_state, norm of g [B])."""

    def one(fast, rule_state, g, mask_C):
        return inner_loop.update(
            learner.rule, lr, fast, rule_state, g, jnp.any(mask_C), is_constant
        )

    return over_sequences(one)(fast, rule_state, g, chunk.mask_NBC)
