"""Next-token cross-entropy in float32: reference form, blocked forms, masked mean.

`token_nll` is the reference. The blocked forms give the same values without storing the logits of
a sequence, and define their own derivatives: `blocked_nll` for a value and its gradient,
`blocked_nll_pair` for a value, its tangent and the gradient of both, `blocked_nll_jvp` for jax.jvp
(it calls the pair).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from tttjax.errors import UserError
from tttjax.ops.cross_entropy.blocked import (
    Blocks,
    CEResiduals,
    Gradients,
    RequestedGradients,
    Tangent,
    gradients,
    head_tangent,
    values,
)
from tttjax.types import Array, PyTree

ROWS = 1024  # default number of rows of logits in memory at a time


def token_nll(h_TD: Array, head_DV: Array, target_T: Array) -> Array:
    """Negative log-likelihood of each target in nats, float32 at least, [T].

    Logits are accumulated and normalised in float32 even when h and head are bfloat16, so the
    result is not rounded to bfloat16 (steps of 0.03 nats at 6 nats).
    """
    wide = jnp.promote_types(h_TD.dtype, jnp.float32)
    logit_TV = jnp.einsum("td,dv->tv", h_TD, head_DV, preferred_element_type=wide)
    target_logit_T = jnp.take_along_axis(logit_TV, target_T[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logit_TV, axis=-1) - target_logit_T


def token_nll_in_blocks(h_TD: Array, head_DV: Array, target_T: Array, block: int) -> Array:
    """`token_nll` of a long sequence with the logits of `block` tokens in memory at a time."""
    length = h_TD.shape[0]
    if length <= block:
        return token_nll(h_TD, head_DV, target_T)
    back = -length % block
    h_NCD = jnp.pad(h_TD, ((0, back), (0, 0))).reshape(-1, block, h_TD.shape[1])
    target_NC = jnp.pad(target_T, (0, back)).reshape(-1, block)
    rows = jax.checkpoint(lambda row: token_nll(row[0], head_DV, row[1]), prevent_cse=False)
    return jax.lax.map(rows, (h_NCD, target_NC)).reshape(-1)[:length]


def masked_mean(nll_C: Array, mask_C: Array) -> Array:
    """Mean over unmasked tokens; 0 where all are masked."""
    count = jnp.sum(mask_C, axis=-1)
    total = jnp.sum(jnp.where(mask_C, nll_C, 0), axis=-1)
    return total / jnp.maximum(count, 1).astype(total.dtype)


# --- without logits -----------------------------------------------------------------------------


def blocked_nll(
    h_TD: Array,
    head_DV: Array,
    target_T: Array,
    *,
    rows_block: int = ROWS,
    vocab_block: int | None = None,
) -> Array:
    """`token_nll` without storing logits [T, V]; h [..., D] and targets [...], any batch shape.

    Memory besides arguments and results: at most 6 arrays rows_block x V (or rows_block x
    vocab_block) in float32 at least; the gradients [T, D] of the losses until the backward pass;
    for the head's gradient one sum [D, V] over all rows, in float32 at least. Do not set
    vocab_block where the head is sharded over V: each device then has a small block anyway.

    Products of [T, D] with [D, V]: 1; with the gradient of h 2 (none in the backward pass); with
    the head's gradient 4. Supports jax.grad and grad of grad, both blocked. For jax.jvp use
    `blocked_nll_jvp`. Prefer a batch dimension in h to vmap: vmap sums the head's gradient last.
    """
    flat = _flatten(rows_block, vocab_block, h_TD, head_DV, target_T)
    return _nll(*flat).reshape(target_T.shape)


def blocked_nll_with_residuals(
    h_TD: Array,
    head_DV: Array,
    target_T: Array,
    *,
    rows_block: int = ROWS,
    vocab_block: int | None = None,
) -> tuple[Array, CEResiduals]:
    """(`blocked_nll`, residuals that save `blocked_nll_pair` its first pass): 2 products."""
    flat = _flatten(rows_block, vocab_block, h_TD, head_DV, target_T)
    residuals = _with_residuals(*flat)
    return residuals.nll_T.reshape(target_T.shape), _reshape(residuals, target_T.shape)


def blocked_nll_pair(
    h_TD: Array,
    head_DV: Array,
    target_T: Array,
    h_dot_TD: Array,
    head_dot_DV: Array | None = None,
    residuals: CEResiduals | None = None,
    *,
    rows_block: int = ROWS,
    vocab_block: int | None = None,
) -> tuple[Array, Array]:
    """(`blocked_nll`, its derivative along h_dot and head_dot), differentiable in reverse mode.

    head_dot: None means zero, at no cost. residuals: from `blocked_nll_with_residuals` for the same
    h, head and targets; treated as a constant by differentiation.

    Products of [T, D] with [D, V]: forward 2, or none with `residuals`; backward 5, in one pass,
    for the cotangents of h, h_dot and head together. So the gradient, the tangent and the
    tangent's gradient take 7, where autodiff takes 11. head_dot adds 2 forward and 3 backward.
    Memory as `blocked_nll`.
    """
    blocks, h, head, target = _flatten(rows_block, vocab_block, h_TD, head_DV, target_T)
    if h_dot_TD.shape != h_TD.shape or (residuals and residuals.top_T.shape != target_T.shape):
        raise UserError(
            f"h_dot {h_dot_TD.shape} must be shaped like h {h_TD.shape}, and the "
            "residuals must be of the same targets."
        )
    h_dot, residuals = h_dot_TD.reshape(h.shape), residuals and _reshape(residuals, target.shape)
    nll_T, nll_dot_T = _pair(blocks, h, head, target, h_dot, head_dot_DV, residuals)
    return nll_T.reshape(target_T.shape), nll_dot_T.reshape(target_T.shape)


def blocked_nll_jvp(
    h_TD: Array,
    head_DV: Array,
    target_T: Array,
    residuals: CEResiduals | None = None,
    *,
    rows_block: int = ROWS,
    vocab_block: int | None = None,
) -> Array:
    """`blocked_nll` for jax.jvp, and for jax.grad of a function that contains that jax.jvp.

    The tangent is that of `blocked_nll_pair`; a head with zero tangent costs nothing. For jax.grad
    without a jax.jvp inside use `blocked_nll`.
    """
    blocks, h, head, target = _flatten(rows_block, vocab_block, h_TD, head_DV, target_T)
    residuals = residuals and _reshape(residuals, target.shape)
    return _nll_jvp(blocks, h, head, target, residuals).reshape(target_T.shape)


def _flatten(
    rows_block: int, vocab_block: int | None, h_TD: Array, head_DV: Array, target_T: Array
) -> tuple[Blocks, Array, Array, Array]:
    for name, size in (("rows_block", rows_block), ("vocab_block", vocab_block)):
        if size is not None and size < 1:
            raise UserError(f"{name}={size} must be at least 1.")
    if h_TD.shape[:-1] != target_T.shape or head_DV.ndim != 2 or h_TD.shape[-1] != len(head_DV):
        raise UserError(
            f"h {h_TD.shape}, head {head_DV.shape} and targets {target_T.shape} must be shaped "
            "[..., D], [D, V] and [...]."
        )
    h_TD = h_TD.reshape(-1, h_TD.shape[-1])
    return Blocks(rows_block, vocab_block), h_TD, head_DV, target_T.reshape(-1)


def _reshape(residuals: CEResiduals, shape: tuple[int, ...]) -> CEResiduals:
    nll_T, top_T, log_sum_T = (x.reshape(shape) for x in residuals[:3])
    grad_TD = residuals.grad_TD.reshape(*shape, residuals.grad_TD.shape[-1])
    return CEResiduals(nll_T, top_T, log_sum_T, grad_TD)


# --- derivative rules; h [T, D], targets [T], residuals a CEResiduals ---------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nll(blocks, h, head, target):
    return values(blocks, h, head, target, with_grad=False)[0]


def _nll_forward(blocks, h, head, target):
    requested = RequestedGradients(h.perturbed, head.perturbed)
    h, head, target = h.value, head.value, target.value
    residuals = _with_residuals(blocks, h, head, target)
    return residuals.nll_T, (h, head, target, residuals, requested)


def _nll_backward(blocks, saved, a):
    h, head, target, residuals, requested = saved
    if isinstance(a, SymbolicZero):
        return None, None, None
    d_head = _head_gradient(blocks, h, head, target, residuals, a) if requested.head else None
    return _h_gradient(h, a, residuals.grad_TD), d_head, None


_nll.defvjp(_nll_forward, _nll_backward, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_residuals(blocks, h, head, target):
    """The CEResiduals. The cotangent u of grad is a direction of h, because ⟨u, grad⟩ is the
    tangent of nll along u."""
    return CEResiduals(*values(blocks, h, head, target, with_grad=True))


def _with_residuals_forward(blocks, h, head, target):
    requested = RequestedGradients(h.perturbed, head.perturbed)
    h, head, target = h.value, head.value, target.value
    residuals = _with_residuals(blocks, h, head, target)  # differentiable again
    return residuals, (h, head, target, residuals, requested)


def _with_residuals_backward(blocks, saved, cotangent):
    a, u = _array_or_none(cotangent.nll_T), _array_or_none(cotangent.grad_TD)
    if u is None:
        return _nll_backward(blocks, saved, cotangent.nll_T)
    saved, a, u = _forbid_third_derivative((saved, a, u))
    h, head, target, residuals, requested = saved
    tangent = Tangent(u, None, jnp.sum(residuals.grad_TD * u, axis=1))
    b = jnp.ones_like(residuals.nll_T)
    grads = gradients(blocks, h, head, target, residuals, tangent, a, b, requested)
    d_h = _h_gradient(h, a, residuals.grad_TD, grads.curvature_TD)
    return d_h, _cast_like(grads.head_DV, head), None


_with_residuals.defvjp(_with_residuals_forward, _with_residuals_backward, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _head_gradient(blocks, h, head, target, residuals, a):
    """Σ a ∂nll/∂head [D, V]. Its cotangent U is a direction of the head, because ⟨U, this⟩ is
    Σ a times nll's tangent along U. The cotangents of h and head include those through residuals.
    """
    requested = RequestedGradients(h=False, head=True)
    grads = gradients(blocks, h, head, target, residuals, None, a, None, requested)
    return _cast_like(grads.head_DV, head)


def _head_gradient_forward(blocks, h, head, target, residuals, a):
    requested = RequestedGradients(h.perturbed, head.perturbed)
    h, head, target, residuals, a = _primal_values((h, head, target, residuals, a))
    result = _head_gradient(blocks, h, head, target, residuals, a)
    return result, (h, head, target, residuals, a, requested)


def _head_gradient_backward(blocks, saved, direction):
    if isinstance(direction, SymbolicZero):
        return None, None, None, None, None
    saved, direction = _forbid_third_derivative((saved, direction))
    h, head, target, residuals, a, requested = saved
    nll_dot = head_tangent(blocks, h, head, target, residuals, direction)
    tangent = Tangent(None, direction, nll_dot)
    grads = gradients(blocks, h, head, target, residuals, tangent, None, a, requested)
    return _cast_like(grads.curvature_TD, h), _cast_like(grads.head_DV, head), None, None, nll_dot


_head_gradient.defvjp(_head_gradient_forward, _head_gradient_backward, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pair(blocks, h, head, target, h_dot, head_dot, residuals):
    return _pair_with_residuals(blocks, h, head, target, h_dot, head_dot, residuals)[1]


def _pair_with_residuals(blocks, h, head, target, h_dot, head_dot, residuals):
    if residuals is None:
        residuals = _with_residuals(blocks, h, head, target)
    nll_dot = jnp.sum(residuals.grad_TD * h_dot, axis=1)
    if head_dot is not None:
        nll_dot = nll_dot + head_tangent(blocks, h, head, target, residuals, head_dot)
    return residuals, (residuals.nll_T, nll_dot)


def _pair_forward(blocks, h, head, target, h_dot, head_dot, residuals):
    head_dot_requested = head_dot is not None and head_dot.perturbed
    requested = RequestedGradients(h.perturbed, head.perturbed, head_dot_requested)
    h, head, target, h_dot, head_dot, residuals = _primal_values(
        (h, head, target, h_dot, head_dot, residuals)
    )
    residuals, pair = _pair_with_residuals(blocks, h, head, target, h_dot, head_dot, residuals)
    return pair, (h, head, target, h_dot, head_dot, residuals, pair[1], requested)


def _pair_backward(blocks, saved, cotangents):
    a, b = (_array_or_none(x) for x in cotangents)
    saved, a, b = _forbid_third_derivative((saved, a, b))
    h, head, target, h_dot, head_dot, residuals, nll_dot, requested = saved
    tangent = Tangent(h_dot, head_dot, nll_dot)
    grads = Gradients(None, None, None)
    if any(requested) and (a is not None or b is not None):
        grads = gradients(blocks, h, head, target, residuals, tangent, a, b, requested)
    d_h = _h_gradient(h, a, residuals.grad_TD, grads.curvature_TD)
    d_h_dot = _h_gradient(h_dot, b, residuals.grad_TD)
    d_head = _cast_like(grads.head_DV, head)
    d_head_dot = _cast_like(grads.head_dot_DV, head_dot)
    return d_h, d_head, None, d_h_dot, d_head_dot, None


_pair.defvjp(_pair_forward, _pair_backward, symbolic_zeros=True)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _nll_jvp(blocks, h, head, target, residuals):
    return _nll(blocks, h, head, target) if residuals is None else residuals.nll_T


@partial(_nll_jvp.defjvp, symbolic_zeros=True)
def _nll_jvp_rule(blocks, primals, tangents):
    h, head, target, residuals = primals
    h_dot, head_dot = (_array_or_none(x) for x in tangents[:2])
    if h_dot is None:
        h_dot = jnp.zeros_like(h)
    return _pair(blocks, h, head, target, h_dot, head_dot, residuals)


@jax.custom_jvp
def _forbid_third_derivative(tree: PyTree) -> PyTree:
    """The identity, whose derivative is an error: it would omit terms treated as constants."""
    return tree


@_forbid_third_derivative.defjvp
def _third_derivative_error(primals, tangents):
    raise UserError(
        "The blocked cross-entropy has first and second derivatives only; use token_nll, which "
        "stores all logits, for a third."
    )


def _array_or_none(cotangent: Array | SymbolicZero) -> Array | None:
    return None if isinstance(cotangent, SymbolicZero) else cotangent


def _primal_values(primals: PyTree) -> PyTree:
    return jax.tree.map(lambda primal: primal.value, primals)


def _cast_like(x: Array | None, like: Array | None) -> Array | None:
    return x if x is None or like is None else x.astype(like.dtype)


def _h_gradient(
    like_TD: Array, a_T: Array | None, grad_TD: Array, curvature_TD: Array | None = None
):
    """a grad + curvature, in the dtype of `like`; None where both are None."""
    scaled_TD = None if a_T is None else a_T[:, None] * grad_TD
    if scaled_TD is not None and curvature_TD is not None:
        scaled_TD = scaled_TD + curvature_TD
    return _cast_like(curvature_TD if scaled_TD is None else scaled_TD, like_TD)
