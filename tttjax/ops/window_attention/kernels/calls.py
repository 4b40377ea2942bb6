"""The four functions as calls of kernels; signatures and results are those of `..functions`."""

import math

import jax
import jax.numpy as jnp

from tttjax.ops.window_attention.functions import QKV, Statistics
from tttjax.ops.window_attention.kernels import blocks
from tttjax.ops.window_attention.kernels.blocks import Keys, wide
from tttjax.ops.window_attention.kernels.grids import KeyBlocks, Walk, by_keys, by_queries
from tttjax.ops.window_attention.kernels.platforms import tiling_for
from tttjax.ops.window_attention.tiles import ChunkGeometry
from tttjax.types import Array


class _Layout:
    """Between arrays as the model has them and as kernels do, for one chunk."""

    def __init__(self, chunk: QKV, view: ChunkGeometry, platform: str, pair: bool = False):
        *self.lead, self.length, self.heads, self.head_size = chunk.q.shape
        self.past = chunk.k_past.shape[-3]
        width = self.head_size * chunk.q.dtype.itemsize
        sizes = [
            tiling_for(platform, self.length, keys or 1, view.tiling, width, pair)
            for keys in (self.past, self.length)
        ]
        self.key_sizes = [tiling.key for tiling in sizes]
        self.walk = Walk(view._replace(tiling=sizes[0]), self.past, platform, width)
        self.wide, self.like = wide(chunk.q), chunk.q

    def rows(self, *arrays: Array) -> tuple[Array, ...]:
        """[..., C, H, K] or numbers per query [..., H, C] to [N, K or 1, C padded]."""
        return tuple(
            self._flat(x[..., None, :] if x.ndim < self.like.ndim else _tokens_last(x), back=True)
            for x in arrays
        )

    def _flat(self, x: Array, back: bool, size: int = 0) -> Array:
        more = -x.shape[-1] % (size or self.walk.view.tiling.query)
        x = x.reshape(-1, *x.shape[-2:])
        return jnp.pad(x, ((0, 0), (0, 0), (0, more) if back else (more, 0))) if more else x

    def groups(self, chunk: QKV, dot: QKV | None = None) -> tuple[KeyBlocks | None, KeyBlocks]:
        """(past, own) keys; None: there is no past."""
        dot = dot or QKV(None, None, None, None, None)
        own = Keys(chunk.k_own, chunk.v_own, dot.k_own, dot.v_own)
        if not self.past:
            return None, self._group(own, 1)
        past = Keys(chunk.k_past, chunk.v_past, dot.k_past, dot.v_past)
        return self._group(past, 0), self._group(own, 1)

    def _group(self, keys: Keys, side: int) -> KeyBlocks:
        size, back = self.key_sizes[side], side == 1
        flat = jax.tree.map(lambda x: self._flat(_tokens_last(x), back, size), keys)
        return KeyBlocks(0 if back else -flat.k.shape[-1], size, flat)

    def out(self, rows: int, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        """A result per query."""
        size = self.walk.view.tiling.query
        padded = -(-self.length // size) * size
        return jax.ShapeDtypeStruct((math.prod(self.lead) * self.heads, rows, padded), dtype)

    def of_queries(self, x: Array) -> Array:
        """[N, K, C padded] to [..., C, H, K]."""
        x = x[..., : self.length]
        return _tokens_first(x.reshape(*self.lead, self.heads, *x.shape[1:]))

    def per_query(self, x: Array) -> Array:
        """[N, 1, C padded] to [..., H, C]."""
        return x[..., : self.length].reshape(*self.lead, self.heads, self.length)

    def of_keys(self, x: Array, side: int) -> Array:
        """[N, K, S padded] to [..., S, H, K]."""
        length = self.length if side else self.past
        x = x[..., :length] if side else x[..., x.shape[-1] - length :]
        return _tokens_first(x.reshape(*self.lead, self.heads, *x.shape[1:]))


def forward(chunk: QKV, view: ChunkGeometry, platform: str) -> tuple[Array, Array]:
    """o and the scores' logsumexp."""
    layout = _Layout(chunk, view, platform)
    o, logsumexp = by_queries(
        layout.walk,
        layout.rows(chunk.q),
        _present(layout.groups(chunk)),
        (layout.out(layout.head_size, chunk.v_own.dtype), layout.out(1, layout.wide)),
        blocks.start_forward,
        blocks.step_forward,
        blocks.finish_forward,
    )
    return layout.of_queries(o), layout.per_query(logsumexp)


def backward(
    chunk: QKV,
    o: Array,
    logsumexp_HC: Array,
    o_bar: Array,
    view: ChunkGeometry,
    past: bool,
    platform: str,
) -> QKV:
    """Cotangents of the chunk from that of o; of past keys and values only if `past`."""
    layout = _Layout(chunk, view, platform)
    rows = layout.rows(chunk.q, o_bar, logsumexp_HC, _dot(o_bar, o, layout.wide))
    groups = layout.groups(chunk)

    def for_queries(q_bar, rows, keys, seen):
        return q_bar + blocks.to_queries(keys.k, blocks.bars(rows, keys, seen)[1])

    def for_keys(rows, keys, seen):
        weight, score_bar = blocks.bars(rows, keys, seen)
        return blocks.to_keys(rows[0], score_bar), blocks.to_keys(rows[1], weight)

    (q_bar,) = by_queries(
        layout.walk,
        rows,
        _present(groups),
        (layout.out(layout.head_size, chunk.q.dtype),),
        lambda rows: jnp.zeros(rows[0].shape, layout.wide),
        for_queries,
        lambda q_bar: (q_bar,),
    )
    sides: list[Array | None] = []
    for side, (wanted, group) in enumerate(zip((past, True), groups, strict=True)):
        if not wanted:
            sides += [None, None]
        elif group is None:
            sides += [jnp.zeros_like(chunk.k_past), jnp.zeros_like(chunk.v_past)]
        else:
            found = by_keys(layout.walk, rows, group, 2, for_keys)
            sides += [layout.of_keys(x, side) for x in found]
    return QKV(layout.of_queries(q_bar), *sides)


def pair_forward(
    chunk: QKV, dot: QKV, view: ChunkGeometry, platform: str
) -> tuple[Array, Array, Statistics]:
    """o, its tangent along `dot`, and what the backward pass needs."""
    layout = _Layout(chunk, view, platform, pair=True)
    rows = layout.rows(chunk.q, dot.q)
    like_o, per_query = layout.out(layout.head_size, chunk.v_own.dtype), layout.out(1, layout.wide)
    found = by_queries(
        layout.walk,
        rows,
        _present(layout.groups(chunk, dot)),
        (like_o, like_o, per_query, per_query),
        blocks.start_pair,
        blocks.step_pair,
        blocks.finish_pair,
    )
    o, o_dot = map(layout.of_queries, found[:2])
    return o, o_dot, Statistics(*map(layout.per_query, found[2:]))


def pair_backward(
    chunk: QKV,
    dot: QKV,
    outputs: tuple[Array, Array, Statistics],
    o_bar: Array,
    o_dot_bar: Array,
    view: ChunkGeometry,
    platform: str,
) -> tuple[QKV, QKV]:
    """Cotangents of the chunk and of its tangents, from those of o and of o's tangent."""
    layout = _Layout(chunk, view, platform, pair=True)
    o, o_dot, statistics = outputs
    level = _dot(o_bar, o, layout.wide) + _dot(o_dot_bar, o_dot, layout.wide)
    dot_level = _dot(o_dot_bar, o, layout.wide)
    rows = layout.rows(chunk.q, dot.q, o_bar, o_dot_bar, *statistics, level, dot_level)
    groups = layout.groups(chunk, dot)

    def for_queries(carry, rows, keys, seen):
        found = blocks.pair_bars(rows, keys, seen)
        q_bar, q_dot_bar = carry
        q_bar += blocks.to_queries(keys.k, found.score_bar)
        if keys.k_dot is not None:
            q_bar += blocks.to_queries(keys.k_dot, found.score_dot_bar)
        return q_bar, q_dot_bar + blocks.to_queries(keys.k, found.score_dot_bar)

    def for_keys(rows, keys, seen):
        q, q_dot, bar, dot_bar, *_ = rows
        found = blocks.pair_bars(rows, keys, seen)
        k_bar = blocks.to_keys(q, found.score_bar) + blocks.to_keys(q_dot, found.score_dot_bar)
        v_bar = blocks.to_keys(bar, found.weight)
        v_bar += blocks.to_keys(dot_bar, found.weight * found.score_dot)
        if keys.k_dot is None:
            return k_bar, v_bar
        k_dot_bar, v_dot_bar = (
            blocks.to_keys(q, found.score_dot_bar),
            blocks.to_keys(dot_bar, found.weight),
        )
        return k_bar, v_bar, k_dot_bar, v_dot_bar

    q_bars = by_queries(
        layout.walk,
        rows,
        _present(groups),
        (layout.out(layout.head_size, chunk.q.dtype),) * 2,
        lambda rows: (jnp.zeros(rows[0].shape, layout.wide),) * 2,
        for_queries,
        lambda carry: carry,
    )
    bars: list[Array] = []
    dot_bars: list[Array | None] = []
    for side, group in enumerate(groups):
        if group is None:
            found = [jnp.zeros_like(x) for x in (chunk.k_past, chunk.v_past)]
            found += [jnp.zeros_like(x) for x in (dot.k_past, dot.v_past) if x is not None]
        else:
            outs = len(jax.tree.leaves(group.keys))
            found = by_keys(layout.walk, rows, group, outs, for_keys)
            found = [layout.of_keys(x, side) for x in found]
        bars += found[:2]
        dot_bars += found[2:] or (None, None)
    q_bar, q_dot_bar = map(layout.of_queries, q_bars)
    return QKV(q_bar, *bars), QKV(q_dot_bar, *dot_bars)


def _present(groups: tuple[KeyBlocks | None, KeyBlocks]) -> tuple[KeyBlocks, ...]:
    return tuple(group for group in groups if group is not None)


def _dot(x: Array, y: Array, dtype: jnp.dtype) -> Array:
    """[..., H, C], of two arrays [..., C, H, K]."""
    return jnp.einsum("...chk,...chk->...hc", x, y, preferred_element_type=dtype)


def _tokens_last(x: Array) -> Array:
    """[..., S, H, K] to [..., H, K, S]."""
    return jnp.moveaxis(x, -3, -1)


def _tokens_first(x: Array) -> Array:
    """And back."""
    return jnp.moveaxis(x, -1, -3)
