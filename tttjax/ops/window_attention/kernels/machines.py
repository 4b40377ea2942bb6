"""What the kernels need to know of the machine they are compiled for.

Platforms are named as JAX names them: "tpu", "cuda", and "cpu", where Pallas interprets a kernel
(for tests: it is slow).
"""

import math
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

from tttjax.ops.window_attention.tiles import AUTO, Tiling

# TPU: blocks of whole registers of 128 lanes, large enough to keep its matrix units busy.
# GPU: of one program, whose scores lie in registers.
LARGEST = {"tpu": Tiling(256, 512), "cuda": Tiling(64, 64), "cpu": Tiling(64, 64)}
UNIT = {"tpu": 128, "cuda": 16, "cpu": 1}
GPU_HEADS = (16, 32, 64, 128)
VMEM = 48 * 2**20  # bytes of a TPU's fast memory that a kernel may ask for
VMEM_OF_BLOCKS = 12 * 2**20  # of it, scores of a block and what is made of them


def position_spec(platform: str) -> pl.BlockSpec:
    """Where the kernel finds the chunk's position: a TPU's scalars have a memory of their own."""
    return pl.BlockSpec(memory_space=pltpu.SMEM) if platform == "tpu" else pl.BlockSpec()


def call_options(platform: str) -> dict[str, Any]:
    """Of `pallas_call`. No estimate of cost: it depends on the position."""
    if platform == "cpu":
        return {"interpret": True}
    if platform == "tpu":
        order = ("parallel", "arbitrary")
        params = pltpu.CompilerParams(dimension_semantics=order, vmem_limit_bytes=VMEM)
        return {"compiler_params": params}
    return {"compiler_params": plgpu.CompilerParams(num_warps=4, num_stages=2)}


def tiling_for(platform: str, queries: int, keys: int, tiling: Tiling) -> Tiling:
    """Block sizes for so many queries, and keys on one side; `tiling`'s own, as far as they fit."""
    return Tiling(*map(_size, (platform,) * 2, (queries, keys), tiling, LARGEST[platform]))


def _size(platform: str, length: int, asked: int, largest: int) -> int:
    unit = UNIT[platform]
    size = min(asked or largest, length)
    if platform == "cuda":
        return max(unit, 1 << (size - 1).bit_length())
    return -(-size // unit) * unit


def why_not(
    platform: str, shape: tuple[int, ...], past: int, dtype: jnp.dtype, tiling: Tiling = AUTO
) -> str:
    """Why the kernels do not apply on this platform; "" where they do.

    shape: of q, [..., C, H, K]. past: keys before the chunk.
    """
    *_, queries, _, head_size = shape
    dtype = jnp.dtype(dtype)
    if platform not in LARGEST:
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
    needed = _vmem(queries, past, head_size, dtype.itemsize, tiling)
    if needed > VMEM:
        return (
            f"a head of {past} + {queries} keys needs {needed / 2**20:.0f} MiB of a TPU's fast "
            f"memory, of which {VMEM / 2**20:.0f} are used"
        )
    return ""


def _vmem(queries: int, past: int, head_size: int, itemsize: int, tiling: Tiling) -> int:
    """Of the hungriest kernel: keys and values, tangents of the chunk's, all kept twice."""
    chunk, before = (
        math.ceil(n / size) * size
        for n in (queries, past)
        for size in [tiling_for("tpu", n or 1, n or 1, tiling).key]
    )
    return 2 * head_size * itemsize * (2 * before + 6 * chunk) + VMEM_OF_BLOCKS
