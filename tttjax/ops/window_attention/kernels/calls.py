"""Window attention by kernel calls; signatures and results are those of `..functions`."""

import math

import jax
import jax.numpy as jnp

from tttjax.ops.window_attention.functions import QKV, Statistics
from tttjax.ops.window_attention.kernels import blocks
from tttjax.ops.window_attention.kernels.blocks import Carry, Keys, Rows, accum_dtype
from tttjax.ops.window_attention.kernels.grids import (
    KernelGrid,
    KVBlocks,
    call_key_grid,
    call_query_grid,
)
from tttjax.ops.window_attention.kernels.platforms import choose_kernel_tiling
from tttjax.ops.window_attention.tiles import ChunkGeometry
from tttjax.types import Array


class _Layout:
    """Converts arrays between the model's layout and the kernels', for one chunk."""

    def __init__(self, qkv: QKV, geometry: ChunkGeometry, platform: str, pair: bool = False):
        *self.lead, self.length, self.heads, self.head_size = qkv.q.shape
        self.num_buffered = qkv.k_buffered.shape[-3]
        head_bytes = self.head_size * qkv.q.dtype.itemsize
        sizes = [
            choose_kernel_tiling(
                platform, self.length, keys or 1, geometry.tiling, head_bytes, pair
            )
            for keys in (self.num_buffered, self.length)
        ]
        self.key_sizes = [tiling.key for tiling in sizes]
        self.grid = KernelGrid(
            geometry._replace(tiling=sizes[0]), self.num_buffered, platform, head_bytes
        )
        self.accum_dtype, self.like = accum_dtype(qkv.q), qkv.q

    def rows(self, *arrays: Array) -> tuple[Array, ...]:
        """[..., C, H, K], or numbers per query [..., H, C], to [N, K or 1, padded C]."""
        return tuple(
            self._flat(
                x[..., None, :] if x.ndim < self.like.ndim else _tokens_last(x), pad_end=True
            )
            for x in arrays
        )

    def _flat(self, x: Array, pad_end: bool, size: int = 0) -> Array:
        padding = -x.shape[-1] % (size or self.grid.geometry.tiling.query)
        x = x.reshape(-1, *x.shape[-2:])
        pad_width = (0, padding) if pad_end else (padding, 0)
        return jnp.pad(x, ((0, 0), (0, 0), pad_width)) if padding else x

    def kv_blocks(self, qkv: QKV, qkv_dot: QKV | None = None) -> tuple[KVBlocks | None, KVBlocks]:
        """(buffered, chunk) keys; None: no keys are buffered."""
        chunk_dot = qkv_dot[3:] if qkv_dot else ()
        chunk = self._pad_kv(Keys(qkv.k_chunk, qkv.v_chunk, *chunk_dot), 1)
        if not self.num_buffered:
            return None, chunk
        return self._pad_kv(Keys(qkv.k_buffered, qkv.v_buffered), 0), chunk

    def _pad_kv(self, keys: Keys, kv_index: int) -> KVBlocks:
        size, pad_end = self.key_sizes[kv_index], kv_index == 1
        flat = jax.tree.map(lambda x: self._flat(_tokens_last(x), pad_end, size), keys)
        return KVBlocks(0 if pad_end else -flat.k.shape[-1], size, flat)

    def out(self, rows: int, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        """Shape of a kernel result per query."""
        size = self.grid.geometry.tiling.query
        padded = -(-self.length // size) * size
        return jax.ShapeDtypeStruct((math.prod(self.lead) * self.heads, rows, padded), dtype)

    def of_queries(self, x: Array) -> Array:
        """[N, K, padded C] to [..., C, H, K]."""
        x = x[..., : self.length]
        return _tokens_first(x.reshape(*self.lead, self.heads, *x.shape[1:]))

    def per_query(self, x: Array) -> Array:
        """[N, 1, padded C] to [..., H, C]."""
        return x[..., : self.length].reshape(*self.lead, self.heads, self.length)

    def of_keys(self, x: Array, kv_index: int) -> Array:
        """[N, K, padded S] to [..., S, H, K]. kv_index: 0 buffered, 1 chunk."""
        length = self.length if kv_index else self.num_buffered
        x = x[..., :length] if kv_index else x[..., x.shape[-1] - length :]
        return _tokens_first(x.reshape(*self.lead, self.heads, *x.shape[1:]))


def forward(qkv: QKV, geometry: ChunkGeometry, platform: str) -> tuple[Array, Array]:
    """o and the scores' log-sum-exp."""
    layout = _Layout(qkv, geometry, platform)
    o, logsumexp = call_query_grid(
        layout.grid,
        layout.rows(qkv.q),
        _present(layout.kv_blocks(qkv)),
        (layout.out(layout.head_size, qkv.v_chunk.dtype), layout.out(1, layout.accum_dtype)),
        blocks.start_forward,
        blocks.step_forward,
        blocks.finish_forward,
    )
    return layout.of_queries(o), layout.per_query(logsumexp)


def backward(
    qkv: QKV,
    o: Array,
    logsumexp_HC: Array,
    o_bar: Array,
    geometry: ChunkGeometry,
    buffer_grads: bool,
    platform: str,
) -> QKV:
    """Cotangents of `qkv` from that of o; None for the buffer unless `buffer_grads`."""
    layout = _Layout(qkv, geometry, platform)
    rows = layout.rows(qkv.q, o_bar, logsumexp_HC, _dot(o_bar, o, layout.accum_dtype))
    kv_blocks = layout.kv_blocks(qkv)

    def query_step(q_bar: Array, rows: Rows, keys: Keys, mask: Array) -> Array:
        return q_bar + blocks.sum_over_keys(keys.k, blocks.score_cotangents(rows, keys, mask)[1])

    def key_step(rows: Rows, keys: Keys, mask: Array) -> tuple[Array, ...]:
        prob, score_bar = blocks.score_cotangents(rows, keys, mask)
        return blocks.sum_over_queries(rows[0], score_bar), blocks.sum_over_queries(rows[1], prob)

    (q_bar,) = call_query_grid(
        layout.grid,
        rows,
        _present(kv_blocks),
        (layout.out(layout.head_size, qkv.q.dtype),),
        lambda rows: jnp.zeros(rows[0].shape, layout.accum_dtype),
        query_step,
        lambda q_bar: (q_bar,),
    )
    kv_bars: list[Array | None] = []
    for kv_index, (needs_grad, kv_block) in enumerate(
        zip((buffer_grads, True), kv_blocks, strict=True)
    ):
        if not needs_grad:
            kv_bars += [None, None]
        elif kv_block is None:
            kv_bars += [jnp.zeros_like(qkv.k_buffered), jnp.zeros_like(qkv.v_buffered)]
        else:
            results = call_key_grid(layout.grid, rows, kv_block, 2, key_step)
            kv_bars += [layout.of_keys(x, kv_index) for x in results]
    return QKV(layout.of_queries(q_bar), *kv_bars)


def pair_forward(
    qkv: QKV, qkv_dot: QKV, geometry: ChunkGeometry, platform: str
) -> tuple[Array, Array, Statistics]:
    """o, its tangent along `qkv_dot`, and the softmax statistics."""
    layout = _Layout(qkv, geometry, platform, pair=True)
    rows = layout.rows(qkv.q, qkv_dot.q)
    like_o, per_query = (
        layout.out(layout.head_size, qkv.v_chunk.dtype),
        layout.out(1, layout.accum_dtype),
    )
    results = call_query_grid(
        layout.grid,
        rows,
        _present(layout.kv_blocks(qkv, qkv_dot)),
        (like_o, like_o, per_query, per_query),
        blocks.start_pair,
        blocks.step_pair,
        blocks.finish_pair,
    )
    o, o_dot = map(layout.of_queries, results[:2])
    return o, o_dot, Statistics(*map(layout.per_query, results[2:]))


def pair_backward(
    qkv: QKV,
    qkv_dot: QKV,
    outputs: tuple[Array, Array, Statistics],
    o_bar: Array,
    o_dot_bar: Array,
    geometry: ChunkGeometry,
    platform: str,
) -> tuple[QKV, QKV]:
    """Cotangents of `qkv` and `qkv_dot`, from those of o and of o's tangent."""
    layout = _Layout(qkv, geometry, platform, pair=True)
    o, o_dot, statistics = outputs
    delta = _dot(o_bar, o, layout.accum_dtype) + _dot(o_dot_bar, o_dot, layout.accum_dtype)
    delta_dot = _dot(o_dot_bar, o, layout.accum_dtype)
    rows = layout.rows(qkv.q, qkv_dot.q, o_bar, o_dot_bar, *statistics, delta, delta_dot)
    kv_blocks = layout.kv_blocks(qkv, qkv_dot)

    def query_step(carry: Carry, rows: Rows, keys: Keys, mask: Array) -> Carry:
        bars = blocks.pair_cotangents(rows, keys, mask)
        q_bar, q_dot_bar = carry
        q_bar += blocks.sum_over_keys(keys.k, bars.score_bar)
        if keys.k_dot is not None:
            q_bar += blocks.sum_over_keys(keys.k_dot, bars.score_dot_bar)
        return q_bar, q_dot_bar + blocks.sum_over_keys(keys.k, bars.score_dot_bar)

    def key_step(rows: Rows, keys: Keys, mask: Array) -> tuple[Array, ...]:
        q, q_dot, o_bar, o_dot_bar, *_ = rows
        bars = blocks.pair_cotangents(rows, keys, mask)
        k_bar = blocks.sum_over_queries(q, bars.score_bar) + blocks.sum_over_queries(
            q_dot, bars.score_dot_bar
        )
        v_bar = blocks.sum_over_queries(o_bar, bars.prob)
        v_bar += blocks.sum_over_queries(o_dot_bar, bars.prob * bars.score_dot)
        if keys.k_dot is None:
            return k_bar, v_bar
        k_dot_bar, v_dot_bar = (
            blocks.sum_over_queries(q, bars.score_dot_bar),
            blocks.sum_over_queries(o_dot_bar, bars.prob),
        )
        return k_bar, v_bar, k_dot_bar, v_dot_bar

    q_bars = call_query_grid(
        layout.grid,
        rows,
        _present(kv_blocks),
        (layout.out(layout.head_size, qkv.q.dtype),) * 2,
        lambda rows: (jnp.zeros(rows[0].shape, layout.accum_dtype),) * 2,
        query_step,
        lambda carry: carry,
    )
    buffered, chunk = kv_blocks
    buffered_bars = [jnp.zeros_like(x) for x in (qkv.k_buffered, qkv.v_buffered)]
    if buffered is not None:
        results = call_key_grid(layout.grid, rows, buffered, 2, key_step)
        buffered_bars = [layout.of_keys(x, 0) for x in results]
    results = call_key_grid(layout.grid, rows, chunk, 4, key_step)
    chunk_bars = [layout.of_keys(x, 1) for x in results]
    q_bar, q_dot_bar = map(layout.of_queries, q_bars)
    return (
        QKV(q_bar, *buffered_bars, *chunk_bars[:2]),
        QKV(q_dot_bar, None, None, *chunk_bars[2:]),
    )


def _present(kv_blocks: tuple[KVBlocks | None, KVBlocks]) -> tuple[KVBlocks, ...]:
    return tuple(kv_block for kv_block in kv_blocks if kv_block is not None)


def _dot(x: Array, y: Array, dtype: jnp.dtype) -> Array:
    """[..., H, C]: inner products of two arrays [..., C, H, K]."""
    return jnp.einsum("...chk,...chk->...hc", x, y, preferred_element_type=dtype)


def _tokens_last(x: Array) -> Array:
    """[..., S, H, K] to [..., H, K, S]."""
    return jnp.moveaxis(x, -3, -1)


def _tokens_first(x: Array) -> Array:
    """[..., H, K, S] to [..., S, H, K]."""
    return jnp.moveaxis(x, -1, -3)
