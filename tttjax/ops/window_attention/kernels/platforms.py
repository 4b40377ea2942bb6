"""What the kernels need to know of the machine they are compiled for.

Platforms are named as JAX names them: "tpu", "cuda", and "cpu", where Pallas interprets a kernel
(for tests: it is slow).
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

from tttjax.ops.window_attention.tiles import AUTO, Tiling

ZERO = np.int32(0)  # typed: a Python number would be an int64 where those are switched on
PLATFORMS = ("tpu", "cuda", "cpu")
BLOCK_MULTIPLE = {
    "tpu": 128,
    "cuda": 16,
    "cpu": 1,
}  # a TPU's registers have 128 lanes; of GPUs, powers of 2
GPU_HEAD_SIZES = (16, 32, 64, 128)
VMEM_LIMIT = 48 * 2**20  # bytes of a TPU's fast memory that a kernel may ask for
VMEM_FOR_SCORES = 12 * 2**20  # of it, scores of a block and what is made of them


def max_tiling(platform: str, head_bytes: int, pair: bool) -> Tiling:
    """Queries and keys of a block. width: bytes of a head's part of a token. pair: of the pair's
    kernels, which hold twice as much.

    On a TPU enough to keep its matrix units busy. On a GPU a block's scores lie in registers, and
    its keys, values and tangents, twice, in 160 KiB of shared memory (an A100's).
    """
    if platform != "cuda":
        return Tiling(256, 512) if platform == "tpu" else Tiling(64, 64)
    if head_bytes <= 128:
        return Tiling(32, 64) if pair else Tiling(64, 64)
    if head_bytes <= 256:
        return Tiling(32, 32) if pair else Tiling(64, 64)
    return Tiling(16, 32) if pair else Tiling(32, 32)


def position_spec(platform: str) -> pl.BlockSpec:
    """Where the kernel finds the chunk's position: a TPU's scalars have a memory of their own."""
    if platform == "tpu":
        return pl.BlockSpec((1,), lambda n, i: (ZERO,), memory_space=pltpu.SMEM)
    return pl.BlockSpec()


def call_options(platform: str, head_bytes: int) -> dict[str, Any]:
    """Of `pallas_call`; width as in `max_tiling`. No estimate of cost: it depends on the position."""
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
    """Block sizes for so many queries, and keys on one side: `requested`, or the largest, if not too
    long; width and pair as in `max_tiling`."""
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
    """Why the kernels do not apply on this platform; "" where they do.

    shape: of q, [..., C, H, K]. past: keys before the chunk.
    """
    *_, queries, _, head_size = shape
    dtype = jnp.dtype(dtype)
    if platform not in PLATFORMS:
        return f"there is no kernel for {platform}"
    if platform == "cpu":
        return ""
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"the kernels compute with float32 or bfloat16, not {dtype}"
    if platform == "cuda":
        sizes = ", ".join(map(str, GPU_HEAD_SIZES))
        return (
            "" if head_size in GPU_HEAD_SIZES else f"a head size of {head_size} is none of {sizes}"
        )
    if head_size % 16:
        return f"a head size of {head_size} is no multiple of 16"
    needed = _vmem_bytes(queries, num_buffered, head_size * dtype.itemsize, tiling)
    if needed > VMEM_LIMIT:
        return (
            f"a head of {num_buffered} + {queries} keys needs {needed / 2**20:.0f} MiB of a TPU's fast "
            f"memory, of which {VMEM_LIMIT / 2**20:.0f} are used"
        )
    return ""


def _vmem_bytes(queries: int, num_buffered: int, head_bytes: int, tiling: Tiling) -> int:
    """Of the hungriest kernel: keys and values, tangents of the chunk's, all kept twice."""
    chunk, before = (
        math.ceil(n / size) * size
        for n in (queries, num_buffered)
        for size in [choose_kernel_tiling("tpu", n or 1, n or 1, tiling, head_bytes, pair=True).key]
    )
    return 2 * head_bytes * (2 * before + 6 * chunk) + VMEM_FOR_SCORES
