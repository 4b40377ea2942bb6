"""Next-token cross-entropy in float32: its definition, its blocked forms, and its means.

`token_nll` is the definition. `blocked_nll` and its kin have the same values without ever holding
the logits of a sequence, and derivatives of their own: `blocked_nll` for a value and its gradient,
`blocked_nll_pair` for a value with its tangent and the gradient of both, `blocked_nll_jvp` for
jax.jvp, which ends in the pair.
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
    Tangent,
    Wanted,
    gradients,
    head_tangent,
    values,
)
from tttjax.types import Array, PyTree

ROWS = 1024  # rows of logits in memory at a time, where the caller does not say


def token_nll(h_TD: Array, head_DV: Array, target_T: Array) -> Array:
    """Negative log-likelihood of each target in nats, float32 at least, [T].

    Logits are accumulated and normalised in float32 even when h and head are bfloat16, so the
    result has no bfloat16 steps (0.03 nats at 6 nats) in it.
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
    """Mean over the tokens that count; 0 where none does (a chunk with all targets masked)."""
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
    """`token_nll` that never holds logits [T, V]; h [..., D] and targets [...] of any batch shape.

    Memory besides arguments and results: a few (at most 6) arrays rows_block x V, or rows_block x
    vocab_block, of the wide dtype; the slopes [T, D] until the gradient; for the head's gradient
    one sum [D, V] for all rows, in float32 at least. Leave vocab_block out where the head is
    divided over V on a mesh: every device then has a narrow block anyway.

    Products of [T, D] with [D, V]: 1; with the gradient of h 2 (none in the backward pass); with
    the head's too 4. Reverse mode, twice: grad of grad is blocked as well. For jax.jvp, and grad of
    it, `blocked_nll_jvp`. Prefer a batch in h to vmap: vmap sums the head's gradient last.
    """
    flat = _flat(rows_block, vocab_block, h_TD, head_DV, target_T)
    return _nll(*flat).reshape(target_T.shape)


def blocked_nll_with_residuals(
    h_TD: Array,
    head_DV: Array,
    target_T: Array,
    *,
    rows_block: int = ROWS,
    vocab_block: int | None = None,
) -> tuple[Array, CEResiduals]:
    """(`blocked_nll`, `CEResiduals` that spare `blocked_nll_pair` its first pass): 2 products."""
    flat = _flat(rows_block, vocab_block, h_TD, head_DV, target_T)
    slope = _with_slope(*flat)
    return slope.nll_T.reshape(target_T.shape), _reshape(slope, target_T.shape)


def blocked_nll_pair(
    h_TD: Array,
    head_DV: Array,
    target_T: Array,
    h_dot_TD: Array,
    head_dot_DV: Array | None = None,
    known: CEResiduals | None = None,
    *,
    rows_block: int = ROWS,
    vocab_block: int | None = None,
) -> tuple[Array, Array]:
    """(`blocked_nll`, its derivative along h_dot and head_dot), differentiable in reverse mode.

    head_dot None is a head that does not move, and costs nothing. known: the slope at these very
    h, head and targets, from `blocked_nll_with_residuals`; a constant to the derivative.

    Products of [T, D] with [D, V]: forward 2, or none with `known`; backward, in one pass, 5 for
    the cotangents of h, h_dot and head together. So gradient, tangent and the tangent's gradient
    take 7, where autodiff takes 11. A head_dot adds 2 forward and 3 backward. Memory as
    `blocked_nll`.
    """
    blocks, h, head, target = _flat(rows_block, vocab_block, h_TD, head_DV, target_T)
    if h_dot_TD.shape != h_TD.shape or (known and known.top_T.shape != target_T.shape):
        raise UserError(
            f"h_dot {h_dot_TD.shape} must be shaped like h {h_TD.shape}, and the known slope "
            "must be of the same targets."
        )
    h_dot, known = h_dot_TD.reshape(h.shape), known and _reshape(known, target.shape)
    nll_T, nll_dot_T = _pair(blocks, h, head, target, h_dot, head_dot_DV, known)
    return nll_T.reshape(target_T.shape), nll_dot_T.reshape(target_T.shape)


def blocked_nll_jvp(
    h_TD: Array,
    head_DV: Array,
    target_T: Array,
    known: CEResiduals | None = None,
    *,
    rows_block: int = ROWS,
    vocab_block: int | None = None,
) -> Array:
    """`blocked_nll` for jax.jvp, and for jax.grad of what contains that jax.jvp.

    Its tangent is `blocked_nll_pair`'s, with no cost for a head that jax.jvp leaves alone. jax.grad
    without a jax.jvp around this function is not possible: there is `blocked_nll` for that.
    """
    blocks, h, head, target = _flat(rows_block, vocab_block, h_TD, head_DV, target_T)
    known = known and _reshape(known, target.shape)
    return _twice(blocks, h, head, target, known).reshape(target_T.shape)


def _flat(
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


def _reshape(slope: CEResiduals, shape: tuple[int, ...]) -> CEResiduals:
    nll_T, top_T, log_sum_T = (x.reshape(shape) for x in slope[:3])
    slope_TD = slope.slope_TD.reshape(*shape, slope.slope_TD.shape[-1])
    return CEResiduals(nll_T, top_T, log_sum_T, slope_TD)


# --- derivative rules; h [T, D], targets [T], known a Slope -------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nll(blocks, h, head, target):
    return values(blocks, h, head, target, slope=False)[0]


def _nll_forward(blocks, h, head, target):
    wanted = Wanted(h.perturbed, head.perturbed)
    h, head, target = h.value, head.value, target.value
    known = _with_slope(blocks, h, head, target)
    return known.nll_T, (h, head, target, known, wanted)


def _nll_backward(blocks, saved, a):
    h, head, target, known, wanted = saved
    if isinstance(a, SymbolicZero):
        return None, None, None
    d_head = _head_gradient(blocks, h, head, target, known, a) if wanted.head else None
    return _rows(h, a, known.slope_TD), d_head, None


_nll.defvjp(_nll_forward, _nll_backward, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_slope(blocks, h, head, target):
    """The Slope. Its derivative, for the slope's cotangent u: u is a direction of h, as
    ⟨u, slope⟩ is the tangent of nll along u."""
    return CEResiduals(*values(blocks, h, head, target, slope=True))


def _with_slope_forward(blocks, h, head, target):
    wanted = Wanted(h.perturbed, head.perturbed)
    h, head, target = h.value, head.value, target.value
    known = _with_slope(blocks, h, head, target)  # itself, for another derivative
    return known, (h, head, target, known, wanted)


def _with_slope_backward(blocks, saved, cotangent):
    a, u = _given(cotangent.nll_T), _given(cotangent.slope_TD)
    if u is None:
        return _nll_backward(blocks, saved, cotangent.nll_T)
    saved, a, u = _no_third((saved, a, u))
    h, head, target, known, wanted = saved
    along = Tangent(u, None, jnp.sum(known.slope_TD * u, axis=1))
    b = jnp.ones_like(known.nll_T)
    got = gradients(blocks, h, head, target, known, along, a, b, wanted)
    return _rows(h, a, known.slope_TD, got.curve_TD), _as(got.head_DV, head), None


_with_slope.defvjp(_with_slope_forward, _with_slope_backward, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _head_gradient(blocks, h, head, target, known, a):
    """Σ a ∂nll/∂head [D, V]. Its cotangent U is a direction of the head, as ⟨U, this⟩ is Σ a times
    nll's tangent along U; what this says of h and head includes the way through `known`."""
    wanted = Wanted(h=False, head=True)
    return _as(gradients(blocks, h, head, target, known, None, a, None, wanted).head_DV, head)


def _head_gradient_forward(blocks, h, head, target, known, a):
    wanted = Wanted(h.perturbed, head.perturbed)
    h, head, target, known, a = _values((h, head, target, known, a))
    return _head_gradient(blocks, h, head, target, known, a), (h, head, target, known, a, wanted)


def _head_gradient_backward(blocks, saved, direction):
    if isinstance(direction, SymbolicZero):
        return None, None, None, None, None
    saved, direction = _no_third((saved, direction))
    h, head, target, known, a, wanted = saved
    nll_dot = head_tangent(blocks, h, head, target, known, direction)
    along = Tangent(None, direction, nll_dot)
    got = gradients(blocks, h, head, target, known, along, None, a, wanted)
    return _as(got.curve_TD, h), _as(got.head_DV, head), None, None, nll_dot


_head_gradient.defvjp(_head_gradient_forward, _head_gradient_backward, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pair(blocks, h, head, target, h_dot, head_dot, known):
    return _known_pair(blocks, h, head, target, h_dot, head_dot, known)[1]


def _known_pair(blocks, h, head, target, h_dot, head_dot, known):
    if known is None:
        known = _with_slope(blocks, h, head, target)
    nll_dot = jnp.sum(known.slope_TD * h_dot, axis=1)
    if head_dot is not None:
        nll_dot = nll_dot + head_tangent(blocks, h, head, target, known, head_dot)
    return known, (known.nll_T, nll_dot)


def _pair_forward(blocks, h, head, target, h_dot, head_dot, known):
    moved = head_dot is not None and head_dot.perturbed
    wanted = Wanted(h.perturbed, head.perturbed, moved)
    h, head, target, h_dot, head_dot, known = _values((h, head, target, h_dot, head_dot, known))
    known, pair = _known_pair(blocks, h, head, target, h_dot, head_dot, known)
    return pair, (h, head, target, h_dot, head_dot, known, pair[1], wanted)


def _pair_backward(blocks, saved, cotangents):
    a, b = (_given(x) for x in cotangents)
    saved, a, b = _no_third((saved, a, b))
    h, head, target, h_dot, head_dot, known, nll_dot, wanted = saved
    along = Tangent(h_dot, head_dot, nll_dot)
    got = Gradients(None, None, None)
    if any(wanted) and (a is not None or b is not None):
        got = gradients(blocks, h, head, target, known, along, a, b, wanted)
    d_h = _rows(h, a, known.slope_TD, got.curve_TD)
    d_h_dot = _rows(h_dot, b, known.slope_TD)
    return d_h, _as(got.head_DV, head), None, d_h_dot, _as(got.head_dot_DV, head_dot), None


_pair.defvjp(_pair_forward, _pair_backward, symbolic_zeros=True)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _twice(blocks, h, head, target, known):
    return _nll(blocks, h, head, target) if known is None else known.nll_T


@partial(_twice.defjvp, symbolic_zeros=True)
def _twice_tangent(blocks, primals, tangents):
    h, head, target, known = primals
    h_dot, head_dot = (_given(x) for x in tangents[:2])
    if h_dot is None:
        h_dot = jnp.zeros_like(h)
    return _pair(blocks, h, head, target, h_dot, head_dot, known)


@jax.custom_jvp
def _no_third(tree: PyTree) -> PyTree:
    """The same; not to be differentiated. Here a derivative would forget what is constant."""
    return tree


@_no_third.defjvp
def _no_third_tangent(primals, tangents):
    raise UserError(
        "The blocked cross-entropy has first and second derivatives only: for a third use "
        "token_nll, which holds all logits."
    )


def _given(cotangent: Array | SymbolicZero) -> Array | None:
    return None if isinstance(cotangent, SymbolicZero) else cotangent


def _values(primals: PyTree) -> PyTree:
    return jax.tree.map(lambda primal: primal.value, primals)


def _as(x: Array | None, like: Array | None) -> Array | None:
    return x if x is None or like is None else x.astype(like.dtype)


def _rows(like_TD: Array, a_T: Array | None, slope_TD: Array, curve_TD: Array | None = None):
    """a slope + curve, in the dtype of `like`; None where both are none."""
    scaled_TD = None if a_T is None else a_T[:, None] * slope_TD
    if scaled_TD is not None and curve_TD is not None:
        scaled_TD = scaled_TD + curve_TD
    return _as(curve_TD if scaled_TD is None else scaled_TD, like_TD)
