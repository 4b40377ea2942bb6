"""Sliding-window attention of a chunk, with closed-form first and second derivatives.

A chunk of C queries attends to W buffered keys and to its own. Library kernels are differentiable
once. The meta-gradient needs more of the attention in the inner loop:

(a) the value and its gradient, in the inner step, where buffered keys and values are constants, and
(b) the gradient of the pair (value, tangent along the inner gradient's cotangent).

Four tiled functions compute this: `functions` in XLA, `kernels` in Pallas; `select` chooses between
them. `rules` defines the entry points: `window_attention` for (a), `window_attention_pair` for (b),
and `window_attention_jvp`, whose `jax.jvp` is the pair.

For one head and one query: s are the scores over the keys j (scale included), P is their softmax
over unmasked keys, a dot marks tangents, a bar cotangents:

    o   = sum_j P_j v_j                              s_j  = q . k_j,   P = exp(s - logsumexp)
    s._j = q. . k_j + q . k._j                       m    = sum_j P_j s._j
    o.  = sum_j P_j (s._j - m) v_j + P_j v._j        since P. = P (s. - m)

First-order, with e = o_bar:

    s_bar_j = P_j (e . v_j - e . o)                  v_bar_j += P_j e
    q_bar   = sum_j s_bar_j k_j                      k_bar_j += s_bar_j q

The second term of s_bar, delta = e . o = sum_j P_j (e . v_j), comes from the normalization of P and
is known from the forward pass. For the pair, with e = o_bar and f = o._bar, the cotangent of s. is

    s._bar_j = P_j (f . v_j - f . o)                 = P_j b_j

and the cotangent of P_j is, up to a constant in j, e . v_j + f . v._j + (s._j - m) b_j, whose mean
under P is e . o + f . o. (the last part adds nothing: sum_j P_j (s._j - m) f . v_j is already in
f . o.). Hence

    s_bar_j = P_j (e . v_j + f . v._j - e . o - f . o. + (s._j - m) b_j)

    q_bar   = sum_j s_bar_j k_j + s._bar_j k._j      q._bar   = sum_j s._bar_j k_j
    k_bar_j += s_bar_j q + s._bar_j q.               k._bar_j += s._bar_j q
    v_bar_j += P_j e + P_j (s._j - m) f              v._bar_j += P_j f

All sums over keys (logsumexp, m, e . o, f . o, f . o.) are known per query from the forward pass,
so one pass over tiles of P gives all cotangents. Buffered keys have k. = v. = 0.
"""

from tttjax.ops.window_attention.functions import QKV
from tttjax.ops.window_attention.rules import (
    window_attention,
    window_attention_jvp,
    window_attention_pair,
)
from tttjax.ops.window_attention.select import (
    unsupported_reason as window_attention_unsupported_reason,
)
from tttjax.ops.window_attention.tiles import Tiling

__all__ = [
    "QKV",
    "Tiling",
    "window_attention",
    "window_attention_jvp",
    "window_attention_pair",
    "window_attention_unsupported_reason",
]
