"""Forward and backward of window attention as Pallas kernels, for TPUs (Mosaic) and GPUs (Triton).

Both platforms run the same kernels. A program handles one head and one block of queries (or keys)
and loops over the blocks of keys (or queries) that overlap its mask. `blocks` has the math of one
tile, `grids` the loops, `calls` the functions, and `platforms` what differs: memory space of
scalars, tile sizes and compiler options.

Tokens are the last axis, [N, K, S] for N heads of all sequences: a head size of 64 wastes none of a
TPU's 128 lanes, sums over keys need no lane shuffles, and numbers per query are rows [1, Q] that
broadcast over scores [S, Q].
"""

from tttjax.ops.window_attention.kernels.calls import (
    backward,
    forward,
    pair_backward,
    pair_forward,
)
from tttjax.ops.window_attention.kernels.platforms import unsupported_reason

__all__ = ["backward", "forward", "pair_backward", "pair_forward", "unsupported_reason"]
