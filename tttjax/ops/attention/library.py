"""Attention of a whole sequence by the platform's library kernel, where there is one that applies.

cuDNN on NVIDIA GPUs (`jax.nn.dot_product_attention`), splash attention on TPUs. They keep no scores
in memory, skip what no query of a tile sees, and can be differentiated once, in reverse mode: which
is all that is asked of attention over a whole sequence. Everywhere else `attend_blocked` gives the
same numbers, to rounding.

The kernel is chosen when a program is lowered, for the platform it is lowered for: a program for a
TPU that is compiled on a machine without one has the TPU's kernel.
"""

import importlib.util
from functools import partial

import jax

from tttjax.ops.attention.attend import AttentionMask, attend_blocked
from tttjax.parallel.kernel_mesh import shard_over_heads, unsharded_reason
from tttjax.types import Array

KERNELS = {"cuda": "cuDNN", "tpu": "splash attention"}  # by the platform, as JAX calls it
DTYPES = {"cuda": ("bfloat16", "float16"), "tpu": ("bfloat16",)}
MAX_HEAD_DIM = 256
MIN_LENGTH = 128  # one tile of splash attention; nowhere is there much to gain below


def attend_sequence(
    q_THK: Array,
    k_TGK: Array,
    v_TGK: Array,
    attention_mask: AttentionMask,
    query_block: int,
    kernel: str = "auto",
) -> Array:
    """Causal attention of a whole sequence to itself, [T, H, K]; see `attend_blocked`.

    G heads of keys and values, a divisor of H: the kernels know grouped queries themselves.
    kernel: "xla" for that alone; else the library's kernel on every platform on which it applies.
    Inside shard_map, axes that are left to the partitioner (`tensor`) divide the heads. A program
    over several devices without shard_map has to ask for "xla".
    The result can be differentiated in reverse mode, once.
    """
    blocked = partial(attend_blocked, attention_mask=attention_mask, query_block=query_block)
    shape = jax.ShapeDtypeStruct(q_THK.shape, q_THK.dtype)
    kv_heads = k_TGK.shape[1]
    window = attention_mask.window if attention_mask.window < q_THK.shape[0] else 0
    if kernel == "xla" or unsharded_reason(kv_heads):
        return blocked(q_THK, k_TGK, v_TGK)
    implementations = {
        platform: shard_over_heads(partial(implementation, window=window))
        for platform, implementation in IMPLEMENTATIONS.items()
        if not (
            unsupported_reason(platform, shape, attention_mask)
            or unsupported_reason_on_backend(platform, shape, kv_heads)
        )
    }
    if not implementations:
        return blocked(q_THK, k_TGK, v_TGK)
    return jax.lax.platform_dependent(q_THK, k_TGK, v_TGK, default=blocked, **implementations)


def unsupported_reason(
    platform: str, q_THK: jax.ShapeDtypeStruct, attention_mask: AttentionMask
) -> str:
    """Why the library's kernel does not apply on a platform; empty if it does.

    platform: "cuda", "tpu", "cpu", ... q_THK: shape and dtype of the queries.
    """
    name = KERNELS.get(platform)
    if name is None:
        return f"there is no library kernel for {platform}"
    length, _, head_dim = q_THK.shape
    if q_THK.dtype.name not in DTYPES[platform]:
        return f"{name} computes in {' or '.join(DTYPES[platform])}, not in {q_THK.dtype.name}"
    if attention_mask.block:
        return f"{name} has no attention within blocks"
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        return (
            f"{name} takes heads of at most {MAX_HEAD_DIM} entries, a multiple of 8, not of "
            f"{head_dim}"
        )
    if length < MIN_LENGTH:
        return f"{name} takes sequences of at least {MIN_LENGTH} tokens, not of {length}"
    return ""


def unsupported_reason_on_backend(
    platform: str, q_THK: jax.ShapeDtypeStruct, kv_heads: int = 0
) -> str:
    """Why this machine cannot make programs with a kernel that would apply; empty if it can.

    kv_heads: heads of keys and values; 0: as many as of queries. A program is traced with the
    kernels of all platforms that this machine can compile them for.
    """
    if platform == "tpu":
        result = importlib.util.find_spec("libtpu")
        return "" if result else "libtpu, which splash attention is compiled by, is not installed"
    length, heads, head_dim = q_THK.shape
    k_TGK = jax.ShapeDtypeStruct((length, kv_heads or heads, head_dim), q_THK.dtype)
    try:  # JAX asks cuDNN for its version and the GPU for its generation
        jax.eval_shape(partial(_cudnn, window=0), q_THK, k_TGK, k_TGK)
    except (RuntimeError, NotImplementedError, ValueError) as refusal:
        return str(refusal).partition("\n")[0].rstrip(".")
    return ""


def _cudnn(q_THK: Array, k_TGK: Array, v_TGK: Array, window: int) -> Array:
    return jax.nn.dot_product_attention(
        *(q_THK, k_TGK, v_TGK),
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,  # keys before the query's own
        implementation="cudnn",
    )


def _splash(q_THK: Array, k_TGK: Array, v_TGK: Array, window: int) -> Array:
    from tttjax.ops.attention.splash import splash_attention

    return splash_attention(q_THK, k_TGK, v_TGK, window)


IMPLEMENTATIONS = {"cuda": _cudnn, "tpu": _splash}
