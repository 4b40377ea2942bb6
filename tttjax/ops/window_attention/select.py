"""Dispatch of window attention between XLA (`functions`) and Pallas (`kernels`), per platform.

The choice is made at lowering, for the target platform, which this machine need not have: if
platforms differ in implementation or tile size, `jax.lax.platform_dependent` holds one branch each
and only the target's is compiled.

kernel: "auto": Pallas on TPUs and NVIDIA GPUs if supported and the problem is large enough, else
XLA; "xla"; or "pallas": Pallas wherever supported, interpreted on a CPU.

The partitioner cannot shard a kernel. Inside shard_map, the axes left to the partitioner (such as
`tensor`) shard the heads, in a nested shard_map around the kernels. XLA runs if these axes do not
divide the KV heads evenly, and under `jax.set_mesh` without shard_map. A program over several
devices whose mesh is given only by argument shardings must set kernel="xla".

The XLA implementation supports grouped queries. For the kernels, keys and values are repeated to
all H heads and their cotangents summed, which temporarily takes the memory of H KV heads.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from tttjax.errors import UserError
from tttjax.ops.attention.attend import AttentionMask
from tttjax.ops.window_attention import functions, kernels
from tttjax.ops.window_attention.functions import QKV, Statistics
from tttjax.ops.window_attention.tiles import AUTO, ChunkGeometry, Tiling, choose_tiling
from tttjax.parallel.kernel_mesh import shard_over_heads, unsharded_reason
from tttjax.types import Array, PyTree

KERNELS = ("auto", "xla", "pallas")
PLATFORMS = ("cpu", "tpu", "cuda")  # others use XLA with the tile sizes of a TPU
MIN_KEYS = 256  # "auto" uses XLA below

Implementation = tuple[str, Tiling]  # "xla" or "pallas", and tile sizes (Pallas: as requested)


def unsupported_reason(
    platform: str,
    shape: tuple[int, ...],
    num_buffered: int,
    dtype: jnp.dtype,
    *,
    kv_heads: int = 0,
    kernel: str = "auto",
    tiling: Tiling = AUTO,
) -> str:
    """Why the kernels do not run on `platform`; "" if they do.

    platform: "cpu", "tpu" or "cuda". shape: of q, [..., C, H, K]. num_buffered: buffered keys.
    kv_heads: heads of keys and values, 0: H.
    Inside shard_map or `jax.set_mesh`, applies to the current mesh.
    Raises UserError for an unknown `kernel`.
    """
    if kernel not in KERNELS:
        raise UserError(f"attention kernel {kernel!r}: choose among {', '.join(KERNELS)}.")
    if kernel == "xla":
        return 'kernel="xla" was requested'
    if reason := unsharded_reason(kv_heads or shape[-2]) or kernels.unsupported_reason(
        platform, shape, num_buffered, dtype, tiling
    ):
        return reason
    if kernel == "auto" and platform == "cpu":
        return "kernels are only interpreted on a CPU"
    keys = num_buffered + shape[-3]
    if kernel == "auto" and keys < MIN_KEYS:
        return f"{keys} keys are fewer than the {MIN_KEYS} at which kernels are used"
    return ""


def forward(
    qkv: QKV, position: Array, attention_mask: AttentionMask, tiling: Tiling, kernel: str
) -> tuple[Array, Array]:
    """`functions.forward` in the chosen implementation."""
    return _run("forward", qkv, (qkv,), position, attention_mask, tiling, kernel)


def backward(
    qkv: QKV,
    o: Array,
    logsumexp_HC: Array,
    o_bar: Array,
    position: Array,
    attention_mask: AttentionMask,
    tiling: Tiling,
    kernel: str,
    buffer_grads: bool,
) -> QKV:
    """`functions.backward` in the chosen implementation."""
    arrays = qkv, o, logsumexp_HC, o_bar
    return _run(
        "backward", qkv, arrays, position, attention_mask, tiling, kernel, buffer_grads=buffer_grads
    )


def pair_forward(
    qkv: QKV,
    qkv_dot: QKV,
    position: Array,
    attention_mask: AttentionMask,
    tiling: Tiling,
    kernel: str,
) -> tuple[Array, Array, Statistics]:
    """`functions.pair_forward` in the chosen implementation."""
    return _run("pair_forward", qkv, (qkv, qkv_dot), position, attention_mask, tiling, kernel)


def pair_backward(
    qkv: QKV,
    qkv_dot: QKV,
    outputs: tuple[Array, Array, Statistics],
    o_bar: Array,
    o_dot_bar: Array,
    position: Array,
    attention_mask: AttentionMask,
    tiling: Tiling,
    kernel: str,
) -> tuple[QKV, QKV]:
    """`functions.pair_backward` in the chosen implementation."""
    arrays = qkv, qkv_dot, outputs, o_bar, o_dot_bar
    return _run("pair_backward", qkv, arrays, position, attention_mask, tiling, kernel)


def _run(
    name: str,
    qkv: QKV,
    arrays: tuple[PyTree, ...],
    position: Array,
    attention_mask: AttentionMask,
    tiling: Tiling,
    kernel: str,
    **static: bool,
) -> PyTree:
    """Runs the function `name` in the implementation of the target platform."""

    def bind(implementation: str, blocks: Tiling, platform: str) -> Callable:
        def call(position: Array, *arrays: PyTree) -> PyTree:
            geometry = ChunkGeometry(position, qkv.q.shape[-3], attention_mask, blocks)
            if implementation == "xla":
                return getattr(functions, name)(*arrays, geometry=geometry, **static)
            heads, kv_heads = qkv.q.shape[-2], qkv.k_chunk.shape[-2]
            repeated = _map_kv(partial(_repeat_kv_heads, times=heads // kv_heads), arrays)
            results = getattr(kernels, name)(
                *repeated, geometry=geometry, platform=platform, **static
            )
            return _map_kv(partial(_sum_kv_heads, times=heads // kv_heads), results)

        return call if implementation == "xla" else shard_over_heads(call)

    implementations = {
        platform: _choose_implementation(platform, qkv, tiling, kernel) for platform in PLATFORMS
    }
    fallback = _xla_implementation(qkv, tiling, "")
    xla = [i for i in (*implementations.values(), fallback) if i[0] == "xla"]
    calls = {implementation: bind(*implementation, "") for implementation in dict.fromkeys(xla)}
    branches = {
        platform: calls.get(implementation) or bind(*implementation, platform)
        for platform, implementation in implementations.items()
    }
    default = calls[fallback]
    platform_branches = {
        platform: call for platform, call in branches.items() if call is not default
    }
    if not platform_branches:
        return default(position, *arrays)
    return jax.lax.platform_dependent(
        jnp.asarray(position), *arrays, **platform_branches, default=default
    )


def _map_kv(fn: Callable[[Array], Array], tree: PyTree) -> PyTree:
    """Applies `fn` to the keys and values of every QKV in `tree`."""

    def map_node(node: PyTree) -> PyTree:
        if not isinstance(node, QKV):
            return node
        return QKV(node.q, *(x if x is None else fn(x) for x in node[1:]))

    return jax.tree.map(map_node, tree, is_leaf=lambda node: isinstance(node, QKV))


def _repeat_kv_heads(x: Array, times: int) -> Array:
    """[..., S, G, K] to [..., S, H, K]: the kernels need one KV head per query head."""
    return x if times == 1 else jnp.repeat(x, times, axis=-2)


def _sum_kv_heads(bar: Array, times: int) -> Array:
    """Transpose of `_repeat_kv_heads`: cotangents [..., S, H, K] to [..., S, G, K]."""
    if times == 1:
        return bar
    accum_dtype = jnp.promote_types(bar.dtype, jnp.float32)
    grouped = bar.reshape(*bar.shape[:-2], -1, times, bar.shape[-1])
    return jnp.sum(grouped, axis=-2, dtype=accum_dtype).astype(bar.dtype)


def _choose_implementation(platform: str, qkv: QKV, tiling: Tiling, kernel: str) -> Implementation:
    num_buffered = qkv.k_buffered.shape[-3]
    reason = unsupported_reason(
        *(platform, qkv.q.shape, num_buffered, qkv.q.dtype),
        kv_heads=qkv.k_chunk.shape[-2],
        kernel=kernel,
        tiling=tiling,
    )
    return _xla_implementation(qkv, tiling, platform) if reason else ("pallas", tiling)


def _xla_implementation(qkv: QKV, tiling: Tiling, platform: str) -> Implementation:
    keys = max(qkv.q.shape[-3], qkv.k_buffered.shape[-3])
    return "xla", choose_tiling(qkv.q.shape, keys, tiling, platform)
