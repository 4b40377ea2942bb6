"""The four functions of window attention as Pallas kernels, for TPUs (Mosaic) and GPUs (Triton).

One kernel serves both: it is written for one head, one block of queries (or of keys), and loops
over the blocks of keys (of queries) that meet it, so the mathematics in `blocks`, the loops in
`walks` and the four functions are the same everywhere. What differs is where scalars lie, block
sizes, and hints for the compilers (`machines`).

Tokens lie last, [N, K, S] for N heads of all sequences: a head size of 64 then fills no more of a
TPU's 128 lanes than it needs, sums over keys need no lanes to be exchanged, and numbers per query
are rows [1, Q] that meet scores [S, Q] as they are.
"""

from tttjax.ops.window_attention.kernels.calls import (
    backward,
    forward,
    pair_backward,
    pair_forward,
)
from tttjax.ops.window_attention.kernels.platforms import unsupported_reason

__all__ = ["backward", "forward", "pair_backward", "pair_forward", "unsupported_reason"]
