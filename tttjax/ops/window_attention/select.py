"""Which form of the four functions runs where: XLA's (`functions`), or the kernels (`kernels`).

It is chosen by the platform that a program is compiled for, which need not be one of this machine:
where platforms get different forms or block sizes, `jax.lax.platform_dependent` holds all of them
until then, and only the one that is needed is compiled.

kernel: "auto", the kernels on TPUs and NVIDIA GPUs where they apply and there is enough to do for
them, else XLA; "xla"; or "pallas", the kernels wherever they apply, interpreted on a CPU.

Kernels cannot be divided by the partitioner. Inside shard_map the mesh axes that it leaves to the
partitioner (such as `tensor`) divide the heads, in a shard_map of the kernels' own; where they do
not divide those of keys and values evenly, and under `jax.set_mesh` without shard_map, XLA's form
runs. A program over several devices that says its mesh by its arguments' shardings alone has to ask
for "xla".

XLA's form knows grouped queries. The kernels do not: keys and values are spread to all heads before
them, and the cotangents summed, which costs as much memory for a moment as H heads would have.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from tttjax.errors import UserError
from tttjax.ops.attention.attend import AttentionMask
from tttjax.ops.window_attention import functions, kernels
from tttjax.ops.window_attention.functions import QKV, Statistics
from tttjax.ops.window_attention.tiles import AUTO, ChunkGeometry, Tiling, tiling_of
from tttjax.parallel.kernel_mesh import shard_over_heads, unsharded_reason
from tttjax.types import Array

KERNELS = ("auto", "xla", "pallas")
PLATFORMS = ("cpu", "tpu", "cuda")  # the others are XLA's, with tiles as for a TPU
LEAST_KEYS = 256  # "auto" leaves fewer to XLA

Form = tuple[str, Tiling]  # "xla" or "pallas", and blocks (of the kernels: as asked)


def unsupported_reason(
    platform: str,
    shape: tuple[int, ...],
    past: int,
    dtype: jnp.dtype,
    *,
    kv_heads: int = 0,
    kernel: str = "auto",
    tiling: Tiling = AUTO,
) -> str:
    """Why the kernels do not run where a program for `platform` is written; "" if they do.

    platform: "cpu", "tpu" or "cuda". shape: of q, [..., C, H, K]; past: keys before the chunk;
    kv_heads: heads of keys and values, 0: H.
    Inside shard_map or `jax.set_mesh`, for the mesh that is in force there.
    Raises UserError for a `kernel` that there is not.
    """
    if kernel not in KERNELS:
        raise UserError(f"attention kernel {kernel!r}: choose among {', '.join(KERNELS)}.")
    if kernel == "xla":
        return "XLA's form was asked for"
    if reason := unsharded_reason(kv_heads or shape[-2]) or kernels.unsupported_reason(
        platform, shape, past, dtype, tiling
    ):
        return reason
    if kernel == "auto" and platform == "cpu":
        return "on a CPU a kernel is interpreted"
    keys = past + shape[-3]
    if kernel == "auto" and keys < LEAST_KEYS:
        return f"{keys} keys are fewer than the {LEAST_KEYS} from which a kernel pays"
    return ""


def forward(
    chunk: QKV, position: Array, attention_mask: AttentionMask, tiling: Tiling, kernel: str
) -> tuple[Array, Array]:
    """`functions.forward` in the chosen form."""
    return _run("forward", chunk, (chunk,), position, attention_mask, tiling, kernel)


def backward(
    chunk: QKV,
    o: Array,
    logsumexp_HC: Array,
    o_bar: Array,
    position: Array,
    attention_mask: AttentionMask,
    tiling: Tiling,
    kernel: str,
    past: bool,
) -> QKV:
    """`functions.backward` in the chosen form."""
    arrays = chunk, o, logsumexp_HC, o_bar
    return _run("backward", chunk, arrays, position, attention_mask, tiling, kernel, past=past)


def pair_forward(
    chunk: QKV,
    dot: QKV,
    position: Array,
    attention_mask: AttentionMask,
    tiling: Tiling,
    kernel: str,
) -> tuple[Array, Array, Statistics]:
    """`functions.pair_forward` in the chosen form."""
    return _run("pair_forward", chunk, (chunk, dot), position, attention_mask, tiling, kernel)


def pair_backward(
    chunk: QKV,
    dot: QKV,
    outputs: tuple[Array, Array, Statistics],
    o_bar: Array,
    o_dot_bar: Array,
    position: Array,
    attention_mask: AttentionMask,
    tiling: Tiling,
    kernel: str,
) -> tuple[QKV, QKV]:
    """`functions.pair_backward` in the chosen form."""
    arrays = chunk, dot, outputs, o_bar, o_dot_bar
    return _run("pair_backward", chunk, arrays, position, attention_mask, tiling, kernel)


def _run(
    name: str,
    chunk: QKV,
    arrays: tuple[Any, ...],
    position: Array,
    attention_mask: AttentionMask,
    tiling: Tiling,
    kernel: str,
    **static: bool,
) -> Any:
    """The function of that name, in the form of the platform that it will be compiled for."""

    def bind(form: str, blocks: Tiling, platform: str) -> Callable:
        def call(position: Array, *arrays: Any) -> Any:
            view = ChunkGeometry(position, chunk.q.shape[-3], attention_mask, blocks)
            if form == "xla":
                return getattr(functions, name)(*arrays, view=view, **static)
            heads, kv_heads = chunk.q.shape[-2], chunk.k_own.shape[-2]
            spread = _in_chunks(partial(_spread, times=heads // kv_heads), arrays)
            results = getattr(kernels, name)(*spread, view=view, platform=platform, **static)
            return _in_chunks(partial(_gathered, times=heads // kv_heads), results)

        return call if form == "xla" else shard_over_heads(call)

    forms = {platform: _form(platform, chunk, tiling, kernel) for platform in PLATFORMS}
    elsewhere = _xla(chunk, tiling, "")
    same = {form: p for p, form in [*forms.items(), ("", elsewhere)] if form[0] == "xla"}
    calls = {form: bind(*form, "") for form in same}
    branches = {
        platform: calls.get(form) or bind(*form, platform) for platform, form in forms.items()
    }
    default = calls[elsewhere]
    others = {platform: call for platform, call in branches.items() if call is not default}
    if not others:
        return default(position, *arrays)
    return jax.lax.platform_dependent(jnp.asarray(position), *arrays, **others, default=default)


def _in_chunks(change: Callable[[Array], Array], tree: Any) -> Any:
    """A tree with the keys and values of all chunks in it changed, where there are any."""

    def one(node: Any) -> Any:
        if not isinstance(node, QKV):
            return node
        return QKV(node.q, *(x if x is None else change(x) for x in node[1:]))

    return jax.tree.map(one, tree, is_leaf=lambda node: isinstance(node, QKV))


def _spread(x: Array, times: int) -> Array:
    """[..., S, G, K] as [..., S, H, K]: the kernels read one head of keys for each of queries."""
    return x if times == 1 else jnp.repeat(x, times, axis=-2)


def _gathered(bar: Array, times: int) -> Array:
    """[..., S, G, K], the cotangent of what was spread, from [..., S, H, K]."""
    if times == 1:
        return bar
    wide = jnp.promote_types(bar.dtype, jnp.float32)
    shared = bar.reshape(*bar.shape[:-2], -1, times, bar.shape[-1])
    return jnp.sum(shared, axis=-2, dtype=wide).astype(bar.dtype)


def _form(platform: str, chunk: QKV, tiling: Tiling, kernel: str) -> Form:
    past = chunk.k_past.shape[-3]
    reason = unsupported_reason(
        *(platform, chunk.q.shape, past, chunk.q.dtype),
        kv_heads=chunk.k_own.shape[-2],
        kernel=kernel,
        tiling=tiling,
    )
    return _xla(chunk, tiling, platform) if reason else ("pallas", tiling)


def _xla(chunk: QKV, tiling: Tiling, platform: str) -> Form:
    keys = max(chunk.q.shape[-3], chunk.k_past.shape[-3])
    return "xla", tiling_of(chunk.q.shape, keys, tiling, platform)
