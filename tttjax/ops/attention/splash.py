"""Splash attention, JAX's TPU kernel, for one sequence of any length.

Importing it is slow, so callers import this module lazily.
"""

import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from tttjax.types import Array

TILES = (512, 256, 128)  # tile sizes; the kernel supports none below the last


class _WindowMask(splash.LocalMask):
    """Causal mask with at most `window` keys, the query's own included (0: all).

    The kernel's set-up evaluates every tile of the mask, 65,536 at 128K tokens. The mask depends
    only on the distance of query and key, so tiles are cached and shared.
    """

    def __init__(self, length: int, window: int):
        super().__init__((length, length), (window - 1 if window else None, 0), 0)
        self._tiles: dict[tuple[int, int, int], np.ndarray] = {}
        self._uniform: dict[tuple[bool, int, int], np.ndarray] = {}

    def __getitem__(self, idx: tuple[slice, slice]) -> np.ndarray:
        rows, cols = idx
        key = rows.start - cols.start, rows.stop - rows.start, cols.stop - cols.start
        if key not in self._tiles:
            tile = super().__getitem__(idx)
            if tile.all() or not tile.any():
                tile = self._uniform.setdefault((bool(tile.flat[0]), *tile.shape), tile)
            self._tiles[key] = tile
        return self._tiles[key]


def splash_attention(
    q_THK: Array, k_TGK: Array, v_TGK: Array, window: int, interpret: bool = False
) -> Array:
    """Causal self-attention of a sequence, [T, H, K], differentiable once, in reverse mode.

    window: keys per query, its own included; 0: all. interpret: run without a TPU.
    The sequence is padded at the end to whole tiles; the causal mask hides the padding's keys.
    """
    length, heads, head_dim = q_THK.shape
    tile = choose_tile(length, window)
    padding = -length % tile
    attend = splash.make_splash_mha(
        splash.MultiHeadMask([_WindowMask(length + padding, window)] * heads),
        block_sizes=splash.BlockSizes(
            block_q=tile,
            block_kv=tile,
            block_q_dkv=tile,
            block_kv_dkv=tile,
            block_q_dq=tile,
            block_kv_dq=tile,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def heads_first(x_THK: Array) -> Array:
        return jnp.pad(x_THK, ((0, padding), (0, 0), (0, 0))).swapaxes(0, 1)

    accum_dtype = jnp.promote_types(q_THK.dtype, jnp.float32)
    q_THK = (q_THK.astype(accum_dtype) * head_dim**-0.5).astype(
        q_THK.dtype
    )  # the kernel does not scale
    return attend(*map(heads_first, (q_THK, k_TGK, v_TGK))).swapaxes(0, 1)[:length]


def choose_tile(length: int, window: int) -> int:
    """The largest tile size with little padding that is not wider than the window."""
    max_keys = window or length
    candidates = (t for t in TILES if t <= max_keys and -length % t <= length // 8)
    return next(candidates, TILES[-1])
