"""Self-attention of a sequence by the platform's library kernel, with an XLA fallback.

cuDNN on NVIDIA GPUs (`jax.nn.dot_product_attention`), splash attention on TPUs. These kernels
materialize no scores, skip fully masked tiles, and are differentiable once, in reverse mode, which
is enough for attention over a full sequence. Otherwise `attend_blocked` gives the same result up to
rounding.

The kernel is chosen at lowering, for the target platform: a program compiled for a TPU on a machine
without one uses the TPU kernel.
"""

import importlib.util
from functools import partial

import jax

from tttjax.ops.attention.attend import AttentionMask, attend_blocked
from tttjax.parallel.kernel_mesh import shard_over_heads, unsharded_reason
from tttjax.types import Array

KERNELS = {"cuda": "cuDNN", "tpu": "splash attention"}  # by JAX's platform name
DTYPES = {"cuda": ("bfloat16", "float16"), "tpu": ("bfloat16",)}
MAX_HEAD_DIM = 256
MIN_LENGTH = 128  # one tile of splash attention; shorter sequences gain little on any platform


def attend_sequence(
    q_THK: Array,
    k_TGK: Array,
    v_TGK: Array,
    attention_mask: AttentionMask,
    query_block: int,
    kernel: str = "auto",
) -> Array:
    """Causal self-attention of a sequence, [T, H, K], by the library kernel or `attend_blocked`.

    G KV heads, a divisor of H: the kernels support grouped queries.
    kernel: "xla": always `attend_blocked`; else the library kernel on every platform that supports
    it. Inside shard_map, axes left to the partitioner (`tensor`) shard the heads. A program over
    several devices without shard_map must set kernel="xla".
    Differentiable once, in reverse mode.
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
    """Why the library kernel does not support these inputs on a platform; empty if it does.

    platform: "cuda", "tpu", "cpu", ... q_THK: shape and dtype of the queries.
    """
    name = KERNELS.get(platform)
    if name is None:
        return f"there is no library kernel for {platform}"
    length, _, head_dim = q_THK.shape
    if q_THK.dtype.name not in DTYPES[platform]:
        return f"{name} supports {' or '.join(DTYPES[platform])}, not {q_THK.dtype.name}"
    if attention_mask.block:
        return f"{name} does not support attention within blocks"
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        return (
            f"{name} supports head sizes up to {MAX_HEAD_DIM} that are a multiple of 8, not "
            f"{head_dim}"
        )
    if length < MIN_LENGTH:
        return f"{name} supports sequences of at least {MIN_LENGTH} tokens, not {length}"
    return ""


def unsupported_reason_on_backend(
    platform: str, q_THK: jax.ShapeDtypeStruct, kv_heads: int = 0
) -> str:
    """Why this machine cannot compile the library kernel for `platform`; empty if it can.

    kv_heads: heads of keys and values; 0: as many as of queries. A program is traced with the
    kernels of all platforms that this machine can compile for.
    """
    if platform == "tpu":
        installed = importlib.util.find_spec("libtpu")
        return "" if installed else "splash attention needs libtpu, which is not installed"
    length, heads, head_dim = q_THK.shape
    k_TGK = jax.ShapeDtypeStruct((length, kv_heads or heads, head_dim), q_THK.dtype)
    try:  # JAX checks the cuDNN version and the GPU generation
        jax.eval_shape(partial(_cudnn, window=0), q_THK, k_TGK, k_TGK)
    except (RuntimeError, NotImplementedError, ValueError) as refusal:
        return str(refusal).partition("\n")[0].rstrip(".")
    return ""


def _cudnn(q_THK: Array, k_TGK: Array, v_TGK: Array, window: int) -> Array:
    return jax.nn.dot_product_attention(
        *(q_THK, k_TGK, v_TGK),
        is_causal=True,
        local_window_size=(window - 1, 0)
        if window
        else None,  # keys before the query's own; none after
        implementation="cudnn",
    )


def _splash(q_THK: Array, k_TGK: Array, v_TGK: Array, window: int) -> Array:
    from tttjax.ops.attention.splash import splash_attention

    return splash_attention(q_THK, k_TGK, v_TGK, window)


IMPLEMENTATIONS = {"cuda": _cudnn, "tpu": _splash}
