"""Test-time training of one inner model per head: TTT-Linear and TTT-MLP (arXiv 2407.04620).

Each head has an inner model f, one dense layer or two with a GELU between, trained at test time to
reconstruct a token's value from its key k_j, by the loss

    l_j = 1/2 |LN(f(k_j; W)) - (v_j - k_j)|^2.

Tokens come in mini-batches of C. All gradients of a mini-batch are taken at the weights W at its
start; token i of the mini-batch, counted from 0, uses

    W_i = W - rate_i sum_{j<=i} lam_j dl_j/dW,     z_i = q_i + LN(f(q_i; W_i)),

where rate_i depends on the index in the mini-batch and lam_j on token j. The next mini-batch starts
from W_{C-1}.

Two forms give the same numbers. *primal* computes W_i for every token. *dual* does not: the
gradient of a dense layer is an outer product x_j e_j^T of its input and the error at its output, so
that x_i W_i equals x_i W - rate_i sum_{j<=i} (x_i . x_j) e_j: causal linear attention within the
mini-batch, computed by matrix products.

Additional letters: I inputs and O outputs of one dense layer of the inner model.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tttjax.ops.norms import layer_norm
from tttjax.types import Array, PyTree

Weights = dict[str, Array]  # w1 [H,K,O], b1 [H,O]; with two layers also w2 [H,O,K], b2 [H,K]

FORMS = ("dual", "primal")
SUM = "g_"  # prefix of a weight's name: the gradient sum of an incomplete mini-batch


class InnerNorm(NamedTuple):
    """The layer norm at the inner model's output, per head; the inner loop does not update it."""

    scale_HK: Array
    bias_HK: Array
    eps: float


class Tokens(NamedTuple):
    """Inputs of the inner loop: one mini-batch [H, C, K], or N of them [N, H, C, K].

    query: input of the updated inner model; None: the simplified output rule of the TTT-E2E paper,
    z_i = k_i + LN(f(k_i; W)), with the weights at the start of the mini-batch.
    lam: [H, C], weight of each token's gradient; 0 in a slot without a token.
    """

    query: Array | None
    key: Array
    value: Array
    lam: Array


def learning_rates(base_lr: float, head_dim: int, token_idx_C: Array) -> Array:
    """rate_i = base_lr / head_dim * max(0, 1/(i+1) + token_idx_i), [C], in float32 at least."""
    wide = jnp.promote_types(token_idx_C.dtype, jnp.float32)
    index_C = jnp.arange(1, token_idx_C.shape[0] + 1, dtype=wide)
    return base_lr / head_dim * jnp.maximum(1 / index_C + token_idx_C.astype(wide), 0)


def ttt(
    q_THK: Array | None,
    k_THK: Array,
    v_THK: Array,
    lam_TH: Array,
    rate_C: Array,
    weights: Weights,
    norm: InnerNorm,
    state: Weights | None = None,
    position: Array | int = 0,
    *,
    form: str = "dual",
) -> tuple[Array, Weights | None]:
    """T tokens of one sequence, with test-time training: (z [T, H, K], state).

    q, k: after RoPE where the layer has it. q_THK None: the simplified output rule.
    lam_TH: weight of each token's gradient; rate_C: `learning_rates`.
    weights: the inner model before the first token of the sequence.
    state: from `initial_state` or an earlier call; position: number of tokens before this call.
        None: the sequence starts and ends in this call.
    All in float32 at least. Any split of a sequence into calls gives the same z and final state.
    """
    wide = jnp.promote_types(k_THK.dtype, jnp.float32)
    tokens = Tokens(q_THK, k_THK, v_THK, lam_TH)
    tokens, weights, rate_C = jax.tree.map(lambda x: x.astype(wide), (tokens, weights, rate_C))
    if state is None:
        z_THK, _ = _scan(tokens, rate_C, weights, None, 0, norm, form)
        return z_THK, None
    phase = position % rate_C.shape[0]
    weights, sums = split_state(state, weights, position, wide)
    run = _decode if k_THK.shape[0] == 1 else _scan
    z_THK, (weights, sums) = run(tokens, rate_C, weights, sums, phase, norm, form)
    return z_THK, join_state(weights, sums)


# --- state ----------------------------------------------------------------------------------------


def initial_state(shapes: dict[str, tuple[int, ...]], dtype: jnp.dtype) -> Weights:
    """The state of an empty sequence: zeros, independent of the weights.

    A state holds the weights at the start of the current mini-batch; at position 0 the model's
    initial weights are used instead, so that this needs only their shapes.
    """
    zeros = {name: jnp.zeros(shape, dtype) for name, shape in shapes.items()}
    return join_state(zeros, zeros)


def join_state(weights: Weights, sums: Weights) -> Weights:
    return {**weights, **{SUM + name: total for name, total in sums.items()}}


def split_state(
    state: Weights, initial: Weights, position: Array | int, dtype: jnp.dtype
) -> tuple[Weights, Weights]:
    """(weights at the start of the current mini-batch, sums of lam_j dl_j/dW within it)."""
    state = {name: x.astype(dtype) for name, x in state.items()}
    initial = {name: w.astype(dtype) for name, w in initial.items()}
    current = {name: jnp.where(position == 0, w, state[name]) for name, w in initial.items()}
    return current, {name: state[SUM + name] for name in initial}


def final_weights(
    state: Weights, initial: Weights, rate_C: Array, position: Array | int
) -> Weights:
    """The inner model after `position` tokens: W_{r-1} after r tokens of the mini-batch."""
    weights, sums = split_state(state, initial, position, state["w1"].dtype)
    rate = rate_C[(position - 1) % rate_C.shape[0]]  # sums are 0 at the end of a mini-batch
    return jax.tree.map(lambda w, total: w - rate * total, weights, sums)


def _update_if_full(
    weights: Weights, sums: Weights, rate: Array, full: Array | bool
) -> tuple[Weights, Weights]:
    """Where `full`, applies the gradient sums to the weights and resets them."""
    updated = jax.tree.map(lambda w, total: jnp.where(full, w - rate * total, w), weights, sums)
    return updated, jax.tree.map(lambda total: jnp.where(full, 0, total), sums)


# --- the loop over mini-batches -------------------------------------------------------------------


def _decode(
    tokens: Tokens,
    rate_C: Array,
    weights: Weights,
    sums: Weights,
    phase: Array | int,
    norm: InnerNorm,
    form: str,
) -> tuple[Array, tuple[Weights, Weights]]:
    """The decoding form: one token, at index `phase` of its mini-batch."""
    chunk = rate_C.shape[0]
    one = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tokens)  # [H, 1, ...]
    z_HCK, gradient = _mini_batch(one, rate_C[phase][None], weights, sums, norm, form)
    sums = jax.tree.map(jnp.add, sums, gradient)
    return jnp.swapaxes(z_HCK, 0, 1), _update_if_full(weights, sums, rate_C[-1], phase == chunk - 1)


def _scan(
    tokens: Tokens,
    rate_C: Array,
    weights: Weights,
    sums: Weights | None,
    phase: Array | int,
    norm: InnerNorm,
    form: str,
) -> tuple[Array, PyTree]:
    """Scan over mini-batches. phase: slots of the first one that earlier calls have filled.

    sums None: this call is the whole sequence, and `phase` is 0.
    """
    length, chunk = tokens.key.shape[0], rate_C.shape[0]
    most_filled = 0 if sums is None else chunk - 1
    count = -(-(length + most_filled) // chunk)

    def step(carry: PyTree, row: tuple[Array, Tokens]) -> tuple[PyTree, Array]:
        weights, sums = carry
        last_slot, mini_batch = row
        z_HCK, gradient = _mini_batch(mini_batch, rate_C, weights, sums, norm, form)
        if sums is None:
            updated = jax.tree.map(lambda w, g: w - rate_C[-1] * g, weights, gradient)
            return (updated, None), z_HCK
        sums = jax.tree.map(jnp.add, sums, gradient)
        return _update_if_full(weights, sums, rate_C[-1], last_slot < phase + length), z_HCK

    # Intermediates are several times larger than the carry: rematerialisation saves memory and, on
    # CPUs, time.
    step = jax.checkpoint(step, prevent_cse=False)
    last_slot_N = jnp.arange(1, count + 1) * chunk - 1
    rows = last_slot_N, jax.tree.map(lambda x: _to_mini_batches(x, phase, count, chunk), tokens)
    carry, z_NHCK = jax.lax.scan(step, (weights, sums), rows)
    z_THK = jnp.swapaxes(z_NHCK, 1, 2).reshape(-1, *tokens.key.shape[1:])
    return jax.lax.dynamic_slice_in_dim(z_THK, phase, length), carry


def _to_mini_batches(x_TH: Array, phase: Array | int, count: int, chunk: int) -> Array:
    """[T, H, ...] -> [N, H, C, ...], from slot `phase` on; empty slots are zero."""
    slots = jnp.zeros((count * chunk, *x_TH.shape[1:]), x_TH.dtype)
    slots = jax.lax.dynamic_update_slice_in_dim(slots, x_TH, phase, axis=0)
    return jnp.swapaxes(slots.reshape(count, chunk, *x_TH.shape[1:]), 1, 2)


# --- one mini-batch -------------------------------------------------------------------------------


def _mini_batch(
    tokens: Tokens,
    rate_C: Array,
    weights: Weights,
    sums: Weights | None,
    norm: InnerNorm,
    form: str,
) -> tuple[Array, Weights]:
    """(z [H, C, K], sum_j lam_j dl_j/dW).

    sums: gradient sums of the same mini-batch's tokens in earlier calls.
    """
    inputs, errors, z_HCK = _errors(tokens, weights, norm)
    if tokens.query is None:
        z_HCK = tokens.key + z_HCK
    else:
        apply = {"dual": _apply_dual, "primal": _apply_primal}[form]
        x_HCI = tokens.query
        for n, (key_HCI, error_HCO) in enumerate(zip(inputs, errors, strict=True), start=1):
            previous = None if sums is None else (sums[f"w{n}"], sums[f"b{n}"])
            dense = weights[f"w{n}"], weights[f"b{n}"]
            y_HCO = apply(x_HCI, dense, previous, key_HCI, error_HCO, rate_C)
            x_HCI = _gelu(y_HCO)
        z_HCK = tokens.query + _head_norm(y_HCO, norm)
    gradient = {}
    for n, (key_HCI, error_HCO) in enumerate(zip(inputs, errors, strict=True), start=1):
        gradient[f"w{n}"] = jnp.einsum("hci,hco->hio", key_HCI, error_HCO)
        gradient[f"b{n}"] = error_HCO.sum(1)
    return z_HCK, gradient


def _errors(
    tokens: Tokens, weights: Weights, norm: InnerNorm
) -> tuple[list[Array], list[Array], Array]:
    """For every dense layer its inputs x_j [H, C, I] and errors e_j = lam_j dl_j/dy_j [H, C, O].

    Also LN(f(k)) [H, C, K].
    """
    depth = len(weights) // 2
    inputs, outputs = [tokens.key], []
    for n in range(1, depth + 1):
        outputs.append(_dense(inputs[-1], weights[f"w{n}"], weights[f"b{n}"]))
        inputs.append(_gelu(outputs[-1]))
    normed_HCK, error = _loss_gradient(outputs[-1], tokens.value - tokens.key, norm)
    errors = [error * tokens.lam[..., None]]
    for n in range(depth, 1, -1):
        error = jnp.einsum("hco,hio->hci", errors[0], weights[f"w{n}"])
        errors.insert(0, error * _gelu_derivative(outputs[n - 2]))
    return inputs[:depth], errors, normed_HCK


def _apply_dual(
    x_HCI: Array,
    dense: tuple[Array, Array],
    previous: tuple[Array, Array] | None,
    key_HCI: Array,
    error_HCO: Array,
    rate_C: Array,
) -> Array:
    """x_i W_i + b_i [H, C, O] without computing W_i; the bias is a weight with input 1."""
    overlap_HCC = jnp.tril(jnp.einsum("hci,hsi->hcs", x_HCI, key_HCI) + 1)
    update_HCO = jnp.einsum("hcs,hso->hco", overlap_HCC, error_HCO)
    if previous is not None:
        update_HCO = update_HCO + _dense(x_HCI, *previous)
    return _dense(x_HCI, *dense) - rate_C[:, None] * update_HCO


def _apply_primal(
    x_HCI: Array,
    dense: tuple[Array, Array],
    previous: tuple[Array, Array] | None,
    key_HCI: Array,
    error_HCO: Array,
    rate_C: Array,
) -> Array:
    """x_i W_i + b_i [H, C, O] from the weights of every token."""
    w_HIO, b_HO = dense
    update_HCIO = jnp.cumsum(key_HCI[..., :, None] * error_HCO[..., None, :], axis=1)
    update_HCO = jnp.cumsum(error_HCO, axis=1)
    if previous is not None:
        update_HCIO = update_HCIO + previous[0][:, None]
        update_HCO = update_HCO + previous[1][:, None]
    w_HCIO = w_HIO[:, None] - rate_C[:, None, None] * update_HCIO
    b_HCO = b_HO[:, None] - rate_C[:, None] * update_HCO
    return jnp.einsum("hci,hcio->hco", x_HCI, w_HCIO) + b_HCO


def _dense(x_HCI: Array, w_HIO: Array, b_HO: Array) -> Array:
    return jnp.einsum("hci,hio->hco", x_HCI, w_HIO) + b_HO[:, None]


def _head_norm(x_HCK: Array, norm: InnerNorm) -> Array:
    return layer_norm(x_HCK, norm.scale_HK[:, None], norm.bias_HK[:, None], norm.eps)


def _loss_gradient(y_HCK: Array, target_HCK: Array, norm: InnerNorm) -> tuple[Array, Array]:
    """(LN(y), gradient of 1/2 |LN(y) - target|^2 with respect to y)."""
    scale_H1K = norm.scale_HK[:, None]
    centred = y_HCK - y_HCK.mean(-1, keepdims=True)
    inverse_std = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + norm.eps)
    standard = centred * inverse_std
    normed = standard * scale_H1K + norm.bias_HK[:, None]
    error = (normed - target_HCK) * scale_H1K
    projection = (error * standard).mean(-1, keepdims=True)
    return normed, inverse_std * (error - error.mean(-1, keepdims=True) - standard * projection)


GELU_SCALE = math.sqrt(2 / math.pi)
GELU_CUBIC = 0.044715


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)


def _gelu_derivative(x: Array) -> Array:
    """The derivative of the tanh approximation of GELU."""
    tanh = jnp.tanh(GELU_SCALE * (x + GELU_CUBIC * x**3))
    inner_derivative = GELU_SCALE * (1 + 3 * GELU_CUBIC * x**2)
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * inner_derivative
