"""Loops of the blocked cross-entropy over rows and vocabulary, without derivative rules.

For a row t with logits z = W^T h, target y, softmax p and e the one-hot vector of y:

    nll = log Σ_v exp z_v - z_y            grad = ∂nll/∂h = W q,   q = p - e
    nll_dot = ⟨q, ż⟩,  ż = W^T ḣ + Ẇ^T h   = ⟨grad, ḣ⟩ where Ẇ = 0: no product with W
    ∂nll_dot/∂z = p (ż - m) =: r,  m = ⟨p, ż⟩ = nll_dot + ż_y

Products with W use the common dtype of h and W and accumulate in float32 or wider, as does
everything between them. `nll.py` defines the differentiable functions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

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
    All in float32 at least. top_T, log_sum_T are constants under differentiation.
    """

    nll_T: Array
    top_T: Array
    log_sum_T: Array
    grad_TD: Array


def wide_dtype(*arrays: Array) -> Any:
    """The accumulation dtype."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def _multiply(subscripts: str, x: Array, y: Array, cast_dtype: Any) -> Array:
    """einsum of operands cast to `cast_dtype`, accumulated in float32 at least."""
    wide = jnp.promote_types(cast_dtype, jnp.float32)
    return jnp.einsum(
        subscripts, x.astype(cast_dtype), y.astype(cast_dtype), preferred_element_type=wide
    )


def _sum_products(
    subscripts: str, pairs: tuple[tuple[Array | None, Array | None], ...], cast_dtype: Any
) -> Any:
    """The sum of `_multiply` over pairs without None; None if there is no such pair."""
    total = None
    for x, y in pairs:
        if x is not None and y is not None:
            total = _add(total, _multiply(subscripts, x, y, cast_dtype))
    return total


def _scale(x_R: Array | None, y_RV: Array) -> Any:
    return None if x_R is None else x_R[:, None] * y_RV


def _add(x: Array | None, y: Array | None) -> Array | None:
    if x is None or y is None:
        return x if y is None else y
    return x + y


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

    def split(x):
        x = jnp.pad(x, ((0, size * count - length), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(size, count, *x.shape[1:]).swapaxes(0, 1)

    def join(x):
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

    def body(carry, number):
        start = jnp.minimum(number * size, vocab - size)
        index_V = start + jnp.arange(size)
        return step(carry, _Columns(start, index_V, index_V >= number * size)), None

    return jax.lax.scan(body, carry, jnp.arange(count))[0]


def _in_vocab_blocks(blocks: Blocks, vocab: int) -> bool:
    return blocks.vocab is not None and blocks.vocab < vocab


# the fields of CEResiduals; grad_TD is None unless requested
Values = tuple[Array, Array, Array, Any]


# --- value and gradient of h --------------------------------------------------------------------


def values(blocks: Blocks, h_TD: Array, head_DV: Array, target_T: Array, with_grad: bool) -> Values:
    """The losses: 1 product of [T, D] with [D, V]; with their gradients in h: 2."""
    row_values = (
        _online_values if _in_vocab_blocks(blocks, head_DV.shape[1]) else _full_vocab_values
    )

    def step(carry, rows):
        h_RD, target_R = rows
        return carry, row_values(blocks, h_RD, target_R, head_DV, with_grad)

    return _scan_rows(step, None, (h_TD, target_T), blocks.rows)[1]


def _full_vocab_values(
    blocks: Blocks, h_RD: Array, target_R: Array, head_DV: Array, with_grad: bool
) -> Values:
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
    grad_RD = None
    if with_grad:
        scaled_q_RV = jnp.where(onehot_RV, -nontarget_sum_R[:, None], exp_RV)
        grad_RD = _multiply("rv,dv->rd", scaled_q_RV, head_DV, cast_dtype) / sum_R[:, None]
    return log_sum_R + (top_R - target_logit_R), top_R, log_sum_R, grad_RD


def _online_values(
    blocks: Blocks, h_RD: Array, target_R: Array, head_DV: Array, with_grad: bool
) -> Values:
    """A block of rows by online softmax over blocks of the vocabulary."""
    cast_dtype, wide = jnp.result_type(h_RD, head_DV), wide_dtype(h_RD, head_DV)
    zero_R = jnp.zeros(h_RD.shape[0], wide)
    sum_RD = jnp.zeros(h_RD.shape, wide) if with_grad else None

    def step(carry, columns):
        top_R, nontarget_sum_R, target_logit_R, sum_RD = carry
        part_DV = columns.of(head_DV)
        logit_RV = columns.where_valid(_multiply("rd,dv->rv", h_RD, part_DV, cast_dtype), -jnp.inf)
        onehot_RV = columns.onehot(target_R)
        new_top_R = jnp.maximum(top_R, jnp.max(logit_RV, axis=1))
        rescale_R = jnp.exp(top_R - new_top_R)
        nontarget_RV = jnp.where(onehot_RV, 0, jnp.exp(logit_RV - new_top_R[:, None]))
        nontarget_sum_R = nontarget_sum_R * rescale_R + jnp.sum(nontarget_RV, axis=1)
        target_logit_R = target_logit_R + jnp.sum(jnp.where(onehot_RV, logit_RV, 0), axis=1)
        if with_grad:
            part_RD = _multiply("rv,dv->rd", nontarget_RV, part_DV, cast_dtype)
            sum_RD = sum_RD * rescale_R[:, None] + part_RD
        return new_top_R, nontarget_sum_R, target_logit_R, sum_RD

    start = (jnp.full_like(zero_R, -jnp.inf), zero_R, zero_R, sum_RD)
    top_R, nontarget_sum_R, target_logit_R, sum_RD = _scan_vocab(
        step, start, head_DV.shape[1], blocks.vocab
    )
    sum_R = nontarget_sum_R + jnp.exp(target_logit_R - top_R)
    log_sum_R = jnp.log(sum_R)
    grad_RD = None
    if with_grad:
        target_RD = head_DV[:, target_R].T.astype(wide)
        grad_RD = (sum_RD - nontarget_sum_R[:, None] * target_RD) / sum_R[:, None]
    return log_sum_R + (top_R - target_logit_R), top_R, log_sum_R, grad_RD


def head_tangent(
    blocks: Blocks,
    h_TD: Array,
    head_DV: Array,
    target_T: Array,
    residuals: CEResiduals,
    head_dot_DV: Array,
) -> Array:
    """The part ⟨q, Ẇ^T h⟩ of nll_dot [T]: 2 products."""
    cast_dtype, wide = jnp.result_type(h_TD, head_DV), wide_dtype(h_TD, head_DV)

    def row_step(carry, rows):
        h_RD, target_R, top_R, log_sum_R = rows

        def step(sum_R, columns):
            _, q_RV = _softmax(h_RD, target_R, top_R, log_sum_R, columns, head_DV, cast_dtype)
            dot_RV = _multiply("rd,dv->rv", h_RD, columns.of(head_dot_DV), cast_dtype)
            return sum_R + jnp.sum(q_RV * dot_RV, axis=1)

        zero_R = jnp.zeros(h_RD.shape[0], wide)
        return carry, _scan_vocab(step, zero_R, head_DV.shape[1], blocks.vocab)

    rows = h_TD, target_T, residuals.top_T, residuals.log_sum_T
    return _scan_rows(row_step, None, rows, blocks.rows)[1]


def _softmax(
    h_RD: Array, target_R: Array, top_R: Array, log_sum_R: Array, columns: _Columns,
    head_DV: Array, cast_dtype: Any,
) -> tuple[Array, Array]:  # fmt: skip
    """(p, q = p - e) of a block of rows and columns."""
    logit_RV = _multiply("rd,dv->rv", h_RD, columns.of(head_DV), cast_dtype)
    p_RV = jnp.exp((logit_RV - top_R[:, None]) - log_sum_R[:, None])
    p_RV = columns.where_valid(p_RV, 0)
    return p_RV, p_RV - columns.onehot(target_R)


# --- gradients ----------------------------------------------------------------------------------


class Tangent(NamedTuple):
    """Directions of h and of the head (None: zero), and the losses' derivative along both."""

    h_dot_TD: Array | None
    head_dot_DV: Array | None
    nll_dot_T: Array


@jax.tree_util.register_static
class RequestedGradients(NamedTuple):
    """Which gradients to compute; static, so that it can be among the saved residuals."""

    h: bool
    head: bool
    head_dot: bool = False


class Gradients(NamedTuple):
    """Gradients of Σ a nll + b nll_dot, in float32 at least; None: not requested.

    curve_TD is the part of h's gradient that is not a multiple of grad_TD.
    """

    curvature_TD: Array | None
    head_DV: Array | None
    head_dot_DV: Array | None


def gradients(
    blocks: Blocks, h_TD: Array, head_DV: Array, target_T: Array, residuals: CEResiduals,
    tangent: Tangent | None, a_T: Array | None, b_T: Array | None, requested: RequestedGradients,
) -> Gradients:  # fmt: skip
    """One pass over the blocks for cotangents a of nll and b of nll_dot (None: zero).

    Products of [T, D] with [D, V]: z again; with b: ḣ's logits and Ẇ's logits; one (with Ẇ: two)
    for the curvature, one each for h and ḣ in the head's gradient, one for Ẇ's gradient.
    """
    cast_dtype, wide = jnp.result_type(h_TD, head_DV), wide_dtype(h_TD, head_DV)
    vocab, mean_T = head_DV.shape[1], None
    if b_T is None or tangent is None:
        tangent, b_T, requested = None, None, RequestedGradients(False, requested.head)
    elif _in_vocab_blocks(blocks, vocab):
        mean_T = tangent.nll_dot_T + _target_tangent(h_TD, head_DV, target_T, tangent)
    h_dot_TD, head_dot_DV = (tangent.h_dot_TD, tangent.head_dot_DV) if tangent else (None, None)

    def row_step(totals, rows):
        h_RD, target_R, top_R, log_sum_R, a_R, b_R, h_dot_RD, mean_R = rows

        def step(carry, columns):
            curvature_RD, head_grad, head_dot_grad = carry
            part_DV = columns.of(head_DV)
            dot_part_DV = None if head_dot_DV is None else columns.of(head_dot_DV)
            p_RV, q_RV = _softmax(h_RD, target_R, top_R, log_sum_R, columns, head_DV, cast_dtype)
            aq_RV, bq_RV, br_RV = _scale(a_R, q_RV), _scale(b_R, q_RV), None
            if b_R is not None:
                pairs = ((h_dot_RD, part_DV), (h_RD, dot_part_DV))
                dot_RV = _sum_products("rd,dv->rv", pairs, cast_dtype)
                m_R = jnp.sum(p_RV * dot_RV, axis=1) if mean_R is None else mean_R
                br_RV = _scale(b_R, p_RV * (dot_RV - m_R[:, None]))
            if requested.h:
                pairs = ((br_RV, part_DV), (bq_RV, dot_part_DV))
                curvature_RD = curvature_RD + _sum_products("rv,dv->rd", pairs, cast_dtype)
            if requested.head:
                pairs = ((h_RD, _add(aq_RV, br_RV)), (h_dot_RD, bq_RV))
                head_grad = columns.add(head_grad, _sum_products("rd,rv->dv", pairs, cast_dtype))
            if requested.head_dot:
                part = _multiply("rd,rv->dv", h_RD, bq_RV, cast_dtype)
                head_dot_grad = columns.add(head_dot_grad, part)
            return curvature_RD, head_grad, head_dot_grad

        curvature_RD = jnp.zeros(h_RD.shape, wide) if requested.h else None
        curvature_RD, *totals = _scan_vocab(step, (curvature_RD, *totals), vocab, blocks.vocab)
        return tuple(totals), curvature_RD

    zero = (
        jnp.zeros(head_DV.shape, wide) if requested.head else None,
        jnp.zeros(head_DV.shape, wide) if requested.head_dot else None,
    )
    rows = (h_TD, target_T, residuals.top_T, residuals.log_sum_T, a_T, b_T, h_dot_TD, mean_T)
    totals, curvature_TD = _scan_rows(row_step, zero, rows, blocks.rows)
    return Gradients(curvature_TD, *totals)


def _target_tangent(h_TD: Array, head_DV: Array, target_T: Array, tangent: Tangent) -> Array:
    """The tangent of each target's logit [T]."""
    wide = wide_dtype(h_TD, head_DV)
    total_T = jnp.zeros(h_TD.shape[0], wide)
    for lhs_TD, rhs_DV in ((tangent.h_dot_TD, head_DV), (h_TD, tangent.head_dot_DV)):
        if lhs_TD is not None and rhs_DV is not None:
            columns_DT = rhs_DV[:, target_T].astype(wide)
            total_T = total_T + jnp.sum(lhs_TD.astype(wide) * columns_DT.T, axis=1)
    return total_T
