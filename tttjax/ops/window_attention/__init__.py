"""Sliding-window attention of a chunk, with derivatives in closed form up to the second.

A chunk of C queries looks at the W keys before it and at its own. Library kernels can be
differentiated once; the meta-gradient needs, of the attention inside the inner loop,

(a) the value and its gradient, in the inner step, where past keys and values are constants, and
(b) the gradient of the pair (value, tangent along the inner gradient's cotangent).

Four functions do this in blocks, for XLA in `functions` and as Pallas kernels in `kernels`;
`select` says which of the two runs. `rules` makes three entry points of them: `window_attention`
for (a), `window_attention_pair` for (b), and `window_attention_jvp`, whose `jax.jvp` is the pair.

The mathematics, for one head and one query, with s its scores over the keys j (scale included), P
their softmax over visible keys, a dot for tangents, and a bar for cotangents:

    o   = sum_j P_j v_j                              s_j  = q . k_j,   P = exp(s - logsumexp)
    s._j = q. . k_j + q . k._j                       m    = sum_j P_j s._j
    o.  = sum_j P_j (s._j - m) v_j + P_j v._j        since P. = P (s. - m)

First-order, with e = o_bar:

    s_bar_j = P_j (e . v_j - e . o)                  v_bar_j += P_j e
    q_bar   = sum_j s_bar_j k_j                      k_bar_j += s_bar_j q

The second term of s_bar is what normalising P costs, sum_j P_j (e . v_j), known beforehand. The
same happens with the pair. With e = o_bar and f = o._bar, the cotangent of s. is

    s._bar_j = P_j (f . v_j - f . o)                 = P_j b_j

and the cotangent of P_j is, up to a constant in j, e . v_j + f . v._j + (s._j - m) b_j, whose mean
under P is e . o + f . o. (the last part has none: sum_j P_j (s._j - m) f . v_j is already in
f . o.). Hence

    s_bar_j = P_j (e . v_j + f . v._j - e . o - f . o. + (s._j - m) b_j)

    q_bar   = sum_j s_bar_j k_j + s._bar_j k._j      q._bar   = sum_j s._bar_j k_j
    k_bar_j += s_bar_j q + s._bar_j q.               k._bar_j += s._bar_j q
    v_bar_j += P_j e + P_j (s._j - m) f              v._bar_j += P_j f

Everything that sums over all keys (logsumexp, m, e . o, f . o, f . o.) is known per query from the
forward pass, so one pass over blocks of P gives all cotangents; past keys have k. = v. = 0.
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
