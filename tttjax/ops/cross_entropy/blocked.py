"""Loops of the blocked cross-entropy over rows and vocabulary, without derivative rules.

For a row t with logits z = W^T h, target y, softmax p and e the one-hot vector of y:

    nll = log Σ_v exp z_v - z_y         grad = ∂nll/∂h = W q,   q = p - e
    nll_dot = ⟨q, ż⟩,  ż = W^T ḣ        = ⟨grad, ḣ⟩: no product with W
    ∂nll_dot/∂z = p (ż - m) =: r,  m = ⟨p, ż⟩ = nll_dot + ż_y

Products with W use the common dtype of h and W and accumulate in float32 or wider, as does
everything between them. `nll.py` defines the differentiable functions.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tttjax.types import Array, PyTree


class Blocks(NamedTuple):
    """Largest block of logits: rows x columns of the vocabulary (None: all of it)."""

    rows: int
    vocab: int | None


class CEResiduals(NamedTuple):
    """Residuals of one pass over the logits, from which tangents and gradients are computed.

    nll_T: the losses. top_T, log_sum_T: largest logit, and log Σ exp(z - top); separate, because
    their sum rounds at large logits. grad_TD: gradient of each loss with respect to its row of h.
    All in float32 at least.
    """

    nll_T: Array
    top_T: Array
    log_sum_T: Array
    grad_TD: Array


def _wide_dtype(*arrays: Array) -> jnp.dtype:
    """The accumulation dtype."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def _multiply(subscripts: str, x: Array, y: Array, cast_dtype: jnp.dtype) -> Array:
    """einsum of operands cast to `cast_dtype`, accumulated in float32 at least."""
    wide = jnp.promote_types(cast_dtype, jnp.float32)
    return jnp.einsum(
        subscripts, x.astype(cast_dtype), y.astype(cast_dtype), preferred_element_type=wide
    )


def _scan_rows(
    step: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]], carry: PyTree, rows: PyTree, block: int
) -> tuple[PyTree, PyTree]:
    """`step(carry, block of rows) -> (carry, outputs)` over arrays [T, ...] of equal length.

    A block takes every n-th row, so that a batch sharded over devices is sharded in every block.
    """
    length = jax.tree.leaves(rows)[0].shape[0]
    count = max(1, -(-length // block))
    if count == 1:
        return step(carry, rows)
    # prefer a count below twice as many that needs no padding
    count = next((n for n in range(count, 2 * count) if length % n == 0), count)
    size = -(-length // count)

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, size * count - length), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(size, count, *x.shape[1:]).swapaxes(0, 1)

    def join(x: Array) -> Array:
        return x.swapaxes(0, 1).reshape(size * count, *x.shape[2:])[:length]

    carry, outputs = jax.lax.scan(step, carry, jax.tree.map(split, rows))
    return carry, jax.tree.map(join, outputs)


class _Columns(NamedTuple):
    """A block of the vocabulary: first column, column indices, columns not in earlier blocks.

    The last block overlaps the previous one where blocks do not divide the vocabulary.
    """

    start: Array | int
    index_V: Array
    valid_V: Array | None  # None: all

    def of(self, matrix_DV: Array) -> Array:
        size = self.index_V.shape[0]
        if size == matrix_DV.shape[1]:
            return matrix_DV
        return jax.lax.dynamic_slice_in_dim(matrix_DV, self.start, size, axis=1)

    def add(self, total_DV: Array, part_DV: Array) -> Array:
        if part_DV.shape == total_DV.shape:
            return total_DV + part_DV
        part_DV = self.of(total_DV) + part_DV
        return jax.lax.dynamic_update_slice_in_dim(total_DV, part_DV, self.start, axis=1)

    def where_valid(self, x_RV: Array, otherwise: float) -> Array:
        return x_RV if self.valid_V is None else jnp.where(self.valid_V, x_RV, otherwise)

    def onehot(self, target_R: Array) -> Array:
        """One-hot targets, by comparison: no gather where the vocabulary is sharded."""
        onehot_RV = target_R[:, None] == self.index_V
        return onehot_RV if self.valid_V is None else onehot_RV & self.valid_V


def _scan_vocab(
    step: Callable[[PyTree, _Columns], PyTree], carry: PyTree, vocab: int, block: int | None
) -> PyTree:
    count = 1 if block is None else max(1, -(-vocab // block))
    if count == 1:
        return step(carry, _Columns(0, jnp.arange(vocab), None))
    size = -(-vocab // count)

    def body(carry: PyTree, number: Array) -> tuple[PyTree, None]:
        start = jnp.minimum(number * size, vocab - size)
        index_V = start + jnp.arange(size)
        return step(carry, _Columns(start, index_V, index_V >= number * size)), None

    return jax.lax.scan(body, carry, jnp.arange(count))[0]


def _in_vocab_blocks(blocks: Blocks, vocab: int) -> bool:
    return blocks.vocab is not None and blocks.vocab < vocab


# --- value and gradient of h --------------------------------------------------------------------


def values(blocks: Blocks, h_TD: Array, head_DV: Array, target_T: Array) -> CEResiduals:
    """The losses and their gradients in h: 2 products of [T, D] with [D, V]."""
    row_values = (
        _online_values if _in_vocab_blocks(blocks, head_DV.shape[1]) else _full_vocab_values
    )

    def step(carry: None, rows: tuple[Array, Array]) -> tuple[None, CEResiduals]:
        h_RD, target_R = rows
        return carry, row_values(blocks, h_RD, target_R, head_DV)

    return _scan_rows(step, None, (h_TD, target_T), blocks.rows)[1]


def _full_vocab_values(blocks: Blocks, h_RD: Array, target_R: Array, head_DV: Array) -> CEResiduals:
    """A block of rows with its logits over the full vocabulary."""
    cast_dtype = jnp.result_type(h_RD, head_DV)
    logit_RV = _multiply("rd,dv->rv", h_RD, head_DV, cast_dtype)
    onehot_RV = target_R[:, None] == jnp.arange(head_DV.shape[1])
    top_R = jnp.max(logit_RV, axis=1)
    exp_RV = jnp.exp(logit_RV - top_R[:, None])
    target_logit_R = jnp.sum(jnp.where(onehot_RV, logit_RV, 0), axis=1)
    # 1 - p_y as a sum, not a difference: accurate where p_y is close to 1
    nontarget_sum_R = jnp.sum(jnp.where(onehot_RV, 0, exp_RV), axis=1)
    sum_R = nontarget_sum_R + jnp.exp(target_logit_R - top_R)
    log_sum_R = jnp.log(sum_R)
    scaled_q_RV = jnp.where(onehot_RV, -nontarget_sum_R[:, None], exp_RV)
    grad_RD = _multiply("rv,dv->rd", scaled_q_RV, head_DV, cast_dtype) / sum_R[:, None]
    return CEResiduals(log_sum_R + (top_R - target_logit_R), top_R, log_sum_R, grad_RD)


def _online_values(blocks: Blocks, h_RD: Array, target_R: Array, head_DV: Array) -> CEResiduals:
    """A block of rows by online softmax over blocks of the vocabulary."""
    cast_dtype, wide = jnp.result_type(h_RD, head_DV), _wide_dtype(h_RD, head_DV)
    zero_R = jnp.zeros(h_RD.shape[0], wide)

    def step(carry: tuple[Array, ...], columns: _Columns) -> tuple[Array, ...]:
        top_R, nontarget_sum_R, target_logit_R, sum_RD = carry
        part_DV = columns.of(head_DV)
        logit_RV = columns.where_valid(_multiply("rd,dv->rv", h_RD, part_DV, cast_dtype), -jnp.inf)
        onehot_RV = columns.onehot(target_R)
        new_top_R = jnp.maximum(top_R, jnp.max(logit_RV, axis=1))
        rescale_R = jnp.exp(top_R - new_top_R)
        nontarget_RV = jnp.where(onehot_RV, 0, jnp.exp(logit_RV - new_top_R[:, None]))
        nontarget_sum_R = nontarget_sum_R * rescale_R + jnp.sum(nontarget_RV, axis=1)
        target_logit_R = target_logit_R + jnp.sum(jnp.where(onehot_RV, logit_RV, 0), axis=1)
        part_RD = _multiply("rv,dv->rd", nontarget_RV, part_DV, cast_dtype)
        sum_RD = sum_RD * rescale_R[:, None] + part_RD
        return new_top_R, nontarget_sum_R, target_logit_R, sum_RD

    start = (jnp.full_like(zero_R, -jnp.inf), zero_R, zero_R, jnp.zeros(h_RD.shape, wide))
    top_R, nontarget_sum_R, target_logit_R, sum_RD = _scan_vocab(
        step, start, head_DV.shape[1], blocks.vocab
    )
    sum_R = nontarget_sum_R + jnp.exp(target_logit_R - top_R)
    log_sum_R = jnp.log(sum_R)
    target_RD = head_DV[:, target_R].T.astype(wide)
    grad_RD = (sum_RD - nontarget_sum_R[:, None] * target_RD) / sum_R[:, None]
    return CEResiduals(log_sum_R + (top_R - target_logit_R), top_R, log_sum_R, grad_RD)


# --- gradients ----------------------------------------------------------------------------------


class Tangent(NamedTuple):
    """A direction of h, the losses' derivative along it, and the cotangent of that derivative."""

    h_dot_TD: Array
    nll_dot_T: Array
    b_T: Array


def gradients(
    blocks: Blocks, h_TD: Array, head_DV: Array, target_T: Array, residuals: CEResiduals,
    a_T: Array, tangent: Tangent | None = None,
) -> tuple[Array | None, Array]:  # fmt: skip
    """(curvature [T, D], the head's gradient [D, V]) of Σ a nll + b nll_dot, in float32 at least.

    curvature: the part of h's gradient that is not a multiple of grad_TD; None without tangent.
    One pass over the blocks. Products of [T, D] with [D, V]: 2; with tangent 5.
    """
    cast_dtype, wide = jnp.result_type(h_TD, head_DV), _wide_dtype(h_TD, head_DV)
    vocab, mean_T = head_DV.shape[1], None
    h_dot_TD, _, b_T = tangent or (None, None, None)
    if tangent and _in_vocab_blocks(blocks, vocab):
        target_TD = head_DV[:, target_T].astype(wide).T
        mean_T = tangent.nll_dot_T + jnp.sum(tangent.h_dot_TD.astype(wide) * target_TD, axis=1)

    def row_step(head_grad: Array, rows: PyTree) -> tuple[Array, Array | None]:
        h_RD, target_R, top_R, log_sum_R, a_R, h_dot_RD, b_R, mean_R = rows

        def step(carry: PyTree, columns: _Columns) -> tuple[Array | None, Array]:
            curvature_RD, head_grad = carry
            part_DV = columns.of(head_DV)
            logit_RV = _multiply("rd,dv->rv", h_RD, part_DV, cast_dtype)
            p_RV = jnp.exp((logit_RV - top_R[:, None]) - log_sum_R[:, None])
            p_RV = columns.where_valid(p_RV, 0)
            q_RV = p_RV - columns.onehot(target_R)
            logit_bar_RV = a_R[:, None] * q_RV
            if tangent is None:
                part = _multiply("rd,rv->dv", h_RD, logit_bar_RV, cast_dtype)
                return None, columns.add(head_grad, part)
            dot_RV = _multiply("rd,dv->rv", h_dot_RD, part_DV, cast_dtype)
            m_R = jnp.sum(p_RV * dot_RV, axis=1) if mean_R is None else mean_R
            br_RV = b_R[:, None] * (p_RV * (dot_RV - m_R[:, None]))
            curvature_RD = curvature_RD + _multiply("rv,dv->rd", br_RV, part_DV, cast_dtype)
            part = _multiply("rd,rv->dv", h_RD, logit_bar_RV + br_RV, cast_dtype)
            part = part + _multiply("rd,rv->dv", h_dot_RD, b_R[:, None] * q_RV, cast_dtype)
            return curvature_RD, columns.add(head_grad, part)

        curvature_RD = jnp.zeros(h_RD.shape, wide) if tangent else None
        curvature_RD, head_grad = _scan_vocab(step, (curvature_RD, head_grad), vocab, blocks.vocab)
        return head_grad, curvature_RD

    rows = (h_TD, target_T, residuals.top_T, residuals.log_sum_T, a_T, h_dot_TD, b_T, mean_T)
    head_grad, curvature_TD = _scan_rows(
        row_step, jnp.zeros(head_DV.shape, wide), rows, blocks.rows
    )
    return curvature_TD, head_grad
