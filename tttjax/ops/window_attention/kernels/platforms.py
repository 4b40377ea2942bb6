"""Platform-specific limits, tile sizes and compiler options of the kernels.

Platforms are JAX's names: "tpu", "cuda", and "cpu", where Pallas interprets a kernel (slow, for
tests).
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

from tttjax.ops.window_attention.tiles import AUTO, Tiling

ZERO = np.int32(0)  # typed: a Python number would be an int64 under x64
PLATFORMS = ("tpu", "cuda", "cpu")
# A TPU's registers have 128 lanes; GPU blocks are powers of 2 of at least 16.
BLOCK_MULTIPLE = {"tpu": 128, "cuda": 16, "cpu": 1}
GPU_HEAD_SIZES = (16, 32, 64, 128)
VMEM_LIMIT = 48 * 2**20  # bytes of a TPU's VMEM that a kernel may use
VMEM_FOR_SCORES = 12 * 2**20  # of which for the scores of a tile and arrays of their shape


def max_tiling(platform: str, head_bytes: int, pair: bool) -> Tiling:
    """Largest tile. head_bytes: head size in bytes. pair: for the pair, which holds twice as much.

    On a TPU, large enough to occupy its matrix units. On a GPU the scores of a tile must fit in
    registers, and its keys, values and tangents, double-buffered, in an A100's 160 KiB of shared
    memory.
    """
    if platform != "cuda":
        return Tiling(256, 512) if platform == "tpu" else Tiling(64, 64)
    if head_bytes <= 128:
        return Tiling(32, 64) if pair else Tiling(64, 64)
    if head_bytes <= 256:
        return Tiling(32, 32) if pair else Tiling(64, 64)
    return Tiling(16, 32) if pair else Tiling(32, 32)


def position_spec(platform: str) -> pl.BlockSpec:
    """Block spec of the chunk's position; on a TPU, scalars are in SMEM."""
    if platform == "tpu":
        return pl.BlockSpec((1,), lambda n, i: (ZERO,), memory_space=pltpu.SMEM)
    return pl.BlockSpec()


def call_options(platform: str, head_bytes: int) -> dict[str, Any]:
    """Options of `pallas_call`. No cost estimate: the cost depends on the position."""
    if platform == "cpu":
        return {"interpret": True}
    if platform == "tpu":
        order = (pltpu.PARALLEL, pltpu.ARBITRARY)
        params = pltpu.CompilerParams(dimension_semantics=order, vmem_limit_bytes=VMEM_LIMIT)
        return {"compiler_params": params}
    return {
        "compiler_params": plgpu.CompilerParams(
            num_warps=4 if head_bytes <= 128 else 8, num_stages=2
        )
    }


def choose_kernel_tiling(
    platform: str, queries: int, keys: int, requested: Tiling, head_bytes: int, pair: bool
) -> Tiling:
    """Tile sizes for these numbers of queries and keys: `requested` or `max_tiling`'s, clipped."""
    largest = max_tiling(platform, head_bytes, pair)
    return Tiling(
        _size(platform, queries, requested.query or largest.query),
        _size(platform, keys, requested.key or largest.key),
    )


def _size(platform: str, length: int, max_size: int) -> int:
    multiple, size = BLOCK_MULTIPLE[platform], min(max_size, length)
    if platform == "cuda":
        return max(multiple, 1 << (size - 1).bit_length())
    return -(-size // multiple) * multiple


def unsupported_reason(
    platform: str,
    shape: tuple[int, ...],
    num_buffered: int,
    dtype: jnp.dtype,
    tiling: Tiling = AUTO,
) -> str:
    """Why the kernels do not support these inputs on `platform`; "" if they do.

    shape: of q, [..., C, H, K]. num_buffered: buffered keys.
    """
    *_, queries, _, head_size = shape
    dtype = jnp.dtype(dtype)
    if platform not in PLATFORMS:
        return f"there is no kernel for {platform}"
    if platform == "cpu":
        return ""
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"the kernels support float32 and bfloat16, not {dtype}"
    if platform == "cuda":
        sizes = ", ".join(map(str, GPU_HEAD_SIZES))
        return "" if head_size in GPU_HEAD_SIZES else f"head size {head_size} is none of {sizes}"
    if head_size % 16:
        return f"head size {head_size} is not a multiple of 16"
    needed = _vmem_bytes(queries, num_buffered, head_size * dtype.itemsize, tiling)
    if needed > VMEM_LIMIT:
        return (
            f"{num_buffered} + {queries} keys need {needed / 2**20:.0f} MiB of a TPU's VMEM per "
            f"head, above the limit of {VMEM_LIMIT / 2**20:.0f}"
        )
    return ""


def _vmem_bytes(queries: int, num_buffered: int, head_bytes: int, tiling: Tiling) -> int:
    """VMEM of the largest kernel: keys, values, and the chunk's tangents, double-buffered."""
    chunk, before = (
        math.ceil(n / size) * size
        for n in (queries, num_buffered)
        for size in [choose_kernel_tiling("tpu", n or 1, n or 1, tiling, head_bytes, pair=True).key]
    )
    return 2 * head_bytes * (2 * before + 6 * chunk) + VMEM_FOR_SCORES
