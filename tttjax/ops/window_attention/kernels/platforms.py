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
UNIT = {"tpu": 128, "cuda": 16, "cpu": 1}  # a TPU's registers have 128 lanes; of GPUs, powers of 2
GPU_HEADS = (16, 32, 64, 128)
VMEM = 48 * 2**20  # bytes of a TPU's fast memory that a kernel may ask for
VMEM_OF_BLOCKS = 12 * 2**20  # of it, scores of a block and what is made of them


def largest(platform: str, width: int, pair: bool) -> Tiling:
    """Queries and keys of a block. width: bytes of a head's part of a token. pair: of the pair's
    kernels, which hold twice as much.

    On a TPU enough to keep its matrix units busy. On a GPU a block's scores lie in registers, and
    its keys, values and tangents, twice, in 160 KiB of shared memory (an A100's).
    """
    if platform != "cuda":
        return Tiling(256, 512) if platform == "tpu" else Tiling(64, 64)
    if width <= 128:
        return Tiling(32, 64) if pair else Tiling(64, 64)
    if width <= 256:
        return Tiling(32, 32) if pair else Tiling(64, 64)
    return Tiling(16, 32) if pair else Tiling(32, 32)


def position_spec(platform: str) -> pl.BlockSpec:
    """Where the kernel finds the chunk's position: a TPU's scalars have a memory of their own."""
    if platform == "tpu":
        return pl.BlockSpec((1,), lambda n, i: (ZERO,), memory_space=pltpu.SMEM)
    return pl.BlockSpec()


def call_options(platform: str, width: int) -> dict[str, Any]:
    """Of `pallas_call`; width as in `largest`. No estimate of cost: it depends on the position."""
    if platform == "cpu":
        return {"interpret": True}
    if platform == "tpu":
        order = (pltpu.PARALLEL, pltpu.ARBITRARY)
        params = pltpu.CompilerParams(dimension_semantics=order, vmem_limit_bytes=VMEM)
        return {"compiler_params": params}
    return {
        "compiler_params": plgpu.CompilerParams(num_warps=4 if width <= 128 else 8, num_stages=2)
    }


def tiling_for(
    platform: str, queries: int, keys: int, asked: Tiling, width: int, pair: bool
) -> Tiling:
    """Block sizes for so many queries, and keys on one side: `asked`, or the largest, if not too
    long; width and pair as in `largest`."""
    most = largest(platform, width, pair)
    return Tiling(
        _size(platform, queries, asked.query or most.query),
        _size(platform, keys, asked.key or most.key),
    )


def _size(platform: str, length: int, most: int) -> int:
    unit, size = UNIT[platform], min(most, length)
    if platform == "cuda":
        return max(unit, 1 << (size - 1).bit_length())
    return -(-size // unit) * unit


def unsupported_reason(
    platform: str, shape: tuple[int, ...], past: int, dtype: jnp.dtype, tiling: Tiling = AUTO
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
        sizes = ", ".join(map(str, GPU_HEADS))
        return "" if head_size in GPU_HEADS else f"a head size of {head_size} is none of {sizes}"
    if head_size % 16:
        return f"a head size of {head_size} is no multiple of 16"
    needed = _vmem(queries, past, head_size * dtype.itemsize, tiling)
    if needed > VMEM:
        return (
            f"a head of {past} + {queries} keys needs {needed / 2**20:.0f} MiB of a TPU's fast "
            f"memory, of which {VMEM / 2**20:.0f} are used"
        )
    return ""


def _vmem(queries: int, past: int, width: int, tiling: Tiling) -> int:
    """Of the hungriest kernel: keys and values, tangents of the chunk's, all kept twice."""
    chunk, before = (
        math.ceil(n / size) * size
        for n in (queries, past)
        for size in [tiling_for("tpu", n or 1, n or 1, tiling, width, pair=True).key]
    )
    return 2 * width * (2 * before + 6 * chunk) + VMEM_OF_BLOCKS
