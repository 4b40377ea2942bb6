"""Next-token cross-entropy in float32: reference form, blocked form, masked mean.

`token_nll` is the reference. The blocked form, of the fast meta-gradient, gives the same values
without storing the logits of a sequence, and defines its own derivatives: `blocked_nll` for a value
and its gradient, `blocked_nll_jvp` for a value, its tangent and the gradient of both.
"""

from functools import partial
from typing import NoReturn

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from tttjax.errors import UserError
from tttjax.ops.cross_entropy.blocked import Blocks, CEResiduals, Tangent, gradients, values
from tttjax.types import Array, PyTree


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
    h_TD: Array, head_DV: Array, target_T: Array, blocks: Blocks
) -> tuple[Array, CEResiduals]:
    """`token_nll` without storing logits [T, V], and residuals for `blocked_nll_jvp`.

    h [..., D] and targets [...], any batch shape. The residuals are constants under
    differentiation. Do not divide the vocabulary where the head is sharded over V: each device then
    has a small block anyway.

    Memory besides arguments and results: at most 6 blocks of logits in float32 at least; for the
    head's gradient one sum [D, V] over all rows, in float32 at least.

    Products of [T, D] with [D, V]: 2, which include the gradient of h; with the head's gradient 4.
    The second derivative is plain autodiff, which stores the logits.
    """
    residuals = _nll(blocks, *_flatten(h_TD, head_DV, target_T))
    constants = jax.lax.stop_gradient(_reshape(residuals, target_T.shape))
    return residuals.nll_T.reshape(target_T.shape), constants


def blocked_nll_jvp(
    h_TD: Array, head_DV: Array, target_T: Array, residuals: CEResiduals, blocks: Blocks
) -> Array:
    """`blocked_nll` for jax.jvp along h, and for jax.grad of a function that contains that jax.jvp.

    residuals: of `blocked_nll` for the same h, head and targets, treated as constants.

    Products of [T, D] with [D, V]: none for the value and its tangent, 5 for the gradient of both
    in h, its tangent and the head, in one pass. With those of the residuals 7, where autodiff takes
    11. Memory as `blocked_nll`.
    """
    h, head, target = _flatten(h_TD, head_DV, target_T)
    residuals = _reshape(residuals, target.shape)
    return _nll_jvp(blocks, h, head, target, residuals).reshape(target_T.shape)


def _flatten(h_TD: Array, head_DV: Array, target_T: Array) -> tuple[Array, Array, Array]:
    if h_TD.shape[:-1] != target_T.shape or head_DV.ndim != 2 or h_TD.shape[-1] != len(head_DV):
        raise UserError(
            f"h {h_TD.shape}, head {head_DV.shape} and targets {target_T.shape} must be shaped "
            "[..., D], [D, V] and [...]."
        )
    return h_TD.reshape(-1, h_TD.shape[-1]), head_DV, target_T.reshape(-1)


def _reshape(residuals: CEResiduals, shape: tuple[int, ...]) -> CEResiduals:
    nll_T, top_T, log_sum_T = (x.reshape(shape) for x in residuals[:3])
    grad_TD = residuals.grad_TD.reshape(*shape, residuals.grad_TD.shape[-1])
    return CEResiduals(nll_T, top_T, log_sum_T, grad_TD)


# --- derivative rules; h [T, D], targets [T], residuals a CEResiduals ---------------------------


# h, head (None: no gradient of it), targets, residuals
_NLLSaved = tuple[Array, Array | None, Array, CEResiduals]
# h, head, targets, residuals, h_dot, nll_dot
_PairSaved = tuple[Array, Array, Array, CEResiduals, Array, Array]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nll(blocks: Blocks, h: Array, head: Array, target: Array) -> CEResiduals:
    return values(blocks, h, head, target)


def _nll_forward(
    blocks: Blocks, h: CustomVJPPrimal, head: CustomVJPPrimal, target: CustomVJPPrimal
) -> tuple[CEResiduals, _NLLSaved]:
    residuals = values(blocks, h.value, head.value, target.value)
    # no head: its gradient is not requested, as in the inner loop
    saved_head = head.value if head.perturbed else None
    return residuals, (h.value, saved_head, target.value, residuals)


def _nll_backward(
    blocks: Blocks, saved: _NLLSaved, cotangent: CEResiduals
) -> tuple[Array, Array | None, None]:
    h, head, target, residuals = saved
    a, d_head = cotangent.nll_T, None
    if head is not None:
        _, d_head = gradients(blocks, h, head, target, residuals, a)
        d_head = d_head.astype(head.dtype)
    return (a[:, None] * residuals.grad_TD).astype(h.dtype), d_head, None


_nll.defvjp(_nll_forward, _nll_backward, symbolic_zeros=True)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _nll_jvp(blocks: Blocks, h: Array, head: Array, target: Array, residuals: CEResiduals) -> Array:
    return residuals.nll_T


@partial(_nll_jvp.defjvp, symbolic_zeros=True)
def _nll_jvp_rule(
    blocks: Blocks, primals: tuple[Array, Array, Array, CEResiduals], tangents: tuple[PyTree, ...]
) -> tuple[Array, Array]:
    h_dot, head_dot, *_ = tangents
    if not isinstance(head_dot, SymbolicZero):
        raise UserError("The blocked cross-entropy has no tangent along the head; use token_nll.")
    return _pair(blocks, *primals, h_dot)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pair(
    blocks: Blocks, h: Array, head: Array, target: Array, residuals: CEResiduals, h_dot: Array
) -> tuple[Array, Array]:
    """(the losses, their derivative along h_dot)."""
    return residuals.nll_T, jnp.sum(residuals.grad_TD * h_dot, axis=1)


def _pair_forward(
    blocks: Blocks, h: Array, head: Array, target: Array, residuals: CEResiduals, h_dot: Array
) -> tuple[tuple[Array, Array], _PairSaved]:
    pair = _pair(blocks, h, head, target, residuals, h_dot)
    return pair, (h, head, target, residuals, h_dot, pair[1])


def _pair_backward(
    blocks: Blocks, saved: _PairSaved, cotangents: tuple[Array, Array]
) -> tuple[Array, Array, None, None, Array]:
    saved, (a, b) = _forbid_third_derivative((saved, cotangents))
    h, head, target, residuals, h_dot, nll_dot = saved
    tangent = Tangent(h_dot, nll_dot, b)
    curvature, d_head = gradients(blocks, h, head, target, residuals, a, tangent)
    d_h = a[:, None] * residuals.grad_TD + curvature
    d_h_dot = b[:, None] * residuals.grad_TD
    return d_h.astype(h.dtype), d_head.astype(head.dtype), None, None, d_h_dot.astype(h_dot.dtype)


_pair.defvjp(_pair_forward, _pair_backward)


@jax.custom_jvp
def _forbid_third_derivative(tree: PyTree) -> PyTree:
    """The identity, whose derivative is an error: it would omit terms treated as constants."""
    return tree


@_forbid_third_derivative.defjvp
def _third_derivative_error(primals: tuple[PyTree], tangents: tuple[PyTree]) -> NoReturn:
    raise UserError(
        "The blocked cross-entropy has first and second derivatives only; use token_nll, which "
        "stores all logits, for a third."
    )
