"""State-space duality (SSD, Mamba-2, arXiv 2405.21060): linear recurrence, one decay per head.

Per head, with a state S of P x N entries:

    S_t = exp(dt_t a) S_{t-1} + dt_t x_t b_t^T        y_t = S_t c_t + skip x_t

`ssd_recurrent` is that recurrence, token by token, for decoding. `ssd` gives the same numbers with
matrix products over chunks of tokens (section 6 of the paper), for training and prefill.

Letters: H heads of P entries, in G groups of R that share b and c (head h is in group h // R); N
entries of the state; M chunks of C tokens; S source tokens of a chunk.
"""

from functools import partial

import jax
import jax.numpy as jnp

from tttjax.types import Array


def ssd(
    x_THP: Array,
    dt_TH: Array,
    a_H: Array,
    b_TGN: Array,
    c_TGN: Array,
    skip_H: Array,
    state_HPN: Array,
    chunk: int,
    chunks_per_segment: int | None = None,
) -> tuple[Array, Array]:
    """Chunk-parallel form: y [T, H, P] in the dtype of x, and the state after the last token.

    dt >= 0 and a < 0 (both dimensionless: exp(dt a) is one token's decay). Any T. Decays and
    states are float32 at least; matrix products take x, b, c in their own dtype and sum in
    float32 at least. Every exponent is <= 0, so nothing overflows however large dt is.

    chunk: tokens of one masked product. chunks_per_segment: chunks computed in parallel; segments
    are sequential (None: a default for the device). Neither changes the result.
    """
    length, heads, width = x_THP.shape
    groups = b_TGN.shape[1]
    wide = jnp.promote_types(x_THP.dtype, jnp.float32)
    chunk = min(chunk, max(length, 1))
    count = -(-length // chunk)
    segments = -(-count // (chunks_per_segment or _default_chunks_per_segment()))
    chunks_per_segment = -(-count // max(segments, 1))
    tokens = segments * chunks_per_segment * chunk

    def split(array_T: Array) -> Array:
        """[T, ...] -> [segments, M, C, ...], padded with tokens of dt = 0, which have no effect."""
        padding = [(0, tokens - length)] + [(0, 0)] * (array_T.ndim - 1)
        return jnp.pad(array_T, padding).reshape(
            segments, chunks_per_segment, chunk, *array_T.shape[1:]
        )

    def by_group(array: Array, axis: int) -> Array:
        """[..., H, ...] -> [..., G, R, ...]"""
        shape = array.shape
        return array.reshape(*shape[:axis], groups, heads // groups, *shape[axis + 1 :])

    dt_TH = dt_TH.astype(wide)
    operands = (
        by_group(x_THP, 1),
        by_group(dt_TH, 1),
        by_group(_log_decay(dt_TH, a_H), 1),
        b_TGN,
        c_TGN,
    )
    last_GRPN, y = jax.lax.scan(
        # Rematerialised: the C x C arrays of all heads are cheap to compute and large to store.
        jax.checkpoint(partial(_segment, by_group(skip_H.astype(wide), 0)), prevent_cse=False),
        by_group(state_HPN.astype(wide), 0),
        jax.tree.map(split, operands),
    )
    y_THP = y.reshape(tokens, heads, width)[:length]
    return y_THP, last_GRPN.reshape(state_HPN.shape).astype(state_HPN.dtype)


def _default_chunks_per_segment() -> int:
    """1 on CPUs, so that arrays fit the cache; elsewhere enough to fill the device."""
    return 1 if jax.default_backend() == "cpu" else 16


def _segment(skip_GR: Array, state_GRPN: Array, operands: tuple[Array, ...]) -> tuple[Array, Array]:
    """M chunks in parallel: the state after them, and y [M, C, G, R, P] in the dtype of x."""
    x_MCGRP, dt_MCGR, log_decay_MCGR, b_MCGN, c_MCGN = operands
    dt_MGRC = jnp.moveaxis(dt_MCGR, 1, -1)
    log_decay_sum_MGRC = jnp.moveaxis(jnp.cumsum(log_decay_MCGR, axis=1), 1, -1)

    def next_chunk(state_GRPN: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        decay_GR, update_GRPN = step
        return decay_GR[..., None, None] * state_GRPN + update_GRPN, state_GRPN

    update_MGRPN = _state_updates(x_MCGRP, dt_MGRC, log_decay_sum_MGRC, b_MCGN)
    decay_MGR = jnp.exp(log_decay_sum_MGRC[..., -1])
    state_GRPN, start_MGRPN = jax.lax.scan(next_chunk, state_GRPN, (decay_MGR, update_MGRPN))
    y_MCGRP = _within_chunks(x_MCGRP, dt_MGRC, log_decay_sum_MGRC, b_MCGN, c_MCGN)
    y_MCGRP += _from_state(start_MGRPN, log_decay_sum_MGRC, c_MCGN)
    y_MCGRP += skip_GR[..., None] * x_MCGRP.astype(skip_GR.dtype)
    return state_GRPN, y_MCGRP.astype(x_MCGRP.dtype)


def _log_decay(dt_TH: Array, a_H: Array) -> Array:
    """dt a, clipped from below at the log of the smallest normal number.

    Smaller decays are zero anyway, and large terms in the running sums would cost the other decays
    of the chunk their precision.
    """
    least = jnp.log(jnp.finfo(dt_TH.dtype).tiny)
    return jnp.maximum(dt_TH * a_H.astype(dt_TH.dtype), least)


def _within_chunks(
    x_MSGRP: Array, dt_MGRS: Array, log_decay_sum_MGRS: Array, b_MSGN: Array, c_MCGN: Array
) -> Array:
    """Outputs from tokens of the same chunk: (c b^T * decay * dt) x."""
    wide = dt_MGRS.dtype
    score_MGCS = jnp.einsum("mcgn,msgn->mgcs", c_MCGN, b_MSGN, preferred_element_type=wide)
    exponent_MGRCS = log_decay_sum_MGRS[..., :, None] - log_decay_sum_MGRS[..., None, :]
    causal_CS = jnp.tri(dt_MGRS.shape[-1], dtype=bool)
    # Masked before the exponential: future tokens would overflow, with gradient inf * 0.
    decay_MGRCS = jnp.exp(jnp.where(causal_CS, exponent_MGRCS, -jnp.inf))
    weight_MGRCS = score_MGCS[:, :, None] * decay_MGRCS * dt_MGRS[..., None, :]
    return jnp.einsum(
        "mgrcs,msgrp->mcgrp", weight_MGRCS.astype(x_MSGRP.dtype), x_MSGRP,
        preferred_element_type=wide,
    )  # fmt: skip


def _state_updates(
    x_MSGRP: Array, dt_MGRS: Array, log_decay_sum_MGRS: Array, b_MSGN: Array
) -> Array:
    """Each chunk's contribution to the state after its last token: [M, G, R, P, N]."""
    scale_MGRS = jnp.exp(log_decay_sum_MGRS[..., -1:] - log_decay_sum_MGRS) * dt_MGRS
    scaled_MSGRP = jnp.moveaxis(scale_MGRS, -1, 1)[..., None] * x_MSGRP
    return jnp.einsum(
        "msgrp,msgn->mgrpn", scaled_MSGRP.astype(x_MSGRP.dtype), b_MSGN,
        preferred_element_type=dt_MGRS.dtype,
    )  # fmt: skip


def _from_state(start_MGRPN: Array, log_decay_sum_MGRC: Array, c_MCGN: Array) -> Array:
    """Outputs from the state at the start of each chunk: [M, C, G, R, P]."""
    y_MCGRP = jnp.einsum(
        "mcgn,mgrpn->mcgrp", c_MCGN, start_MGRPN.astype(c_MCGN.dtype),
        preferred_element_type=start_MGRPN.dtype,
    )  # fmt: skip
    return jnp.moveaxis(jnp.exp(log_decay_sum_MGRC), -1, 1)[..., None] * y_MCGRP


def ssd_recurrent(
    x_THP: Array,
    dt_TH: Array,
    a_H: Array,
    b_TGN: Array,
    c_TGN: Array,
    skip_H: Array,
    state_HPN: Array,
) -> tuple[Array, Array]:
    """`ssd` token by token, computed in float32 at least."""
    groups, heads = b_TGN.shape[1], x_THP.shape[1]
    wide = jnp.promote_types(x_THP.dtype, jnp.float32)
    a_H, skip_H = a_H.astype(wide), skip_H.astype(wide)

    def step(state_HPN: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        x_HP, dt_H, b_GN, c_GN = (array.astype(wide) for array in token)
        b_HN, c_HN = (jnp.repeat(array, heads // groups, axis=0) for array in (b_GN, c_GN))
        update_HPN = (dt_H[:, None] * x_HP)[:, :, None] * b_HN[:, None, :]
        state_HPN = jnp.exp(dt_H * a_H)[:, None, None] * state_HPN + update_HPN
        y_HP = jnp.einsum("hpn,hn->hp", state_HPN, c_HN) + skip_H[:, None] * x_HP
        return state_HPN, y_HP

    last_HPN, y_THP = jax.lax.scan(step, state_HPN.astype(wide), (x_THP, dt_TH, b_TGN, c_TGN))
    return y_THP.astype(x_THP.dtype), last_HPN.astype(state_HPN.dtype)
