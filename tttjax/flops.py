"""Model FLOPs of a train step by formula, and the peak rates that they are compared with.

Counted are matrix products (2 FLOPs per multiply-add) that the mathematics needs: nothing that is
recomputed to save memory, no norms, softmaxes or optimizer. Per token, with s(T) the mean number
of keys that a query sees,

    linear maps    F = 2 x entries of the matrix
    attention      F = 4 H K s(T)        scores and mixed values
    head           F = 2 D V

Training without an inner loop costs 3 F: the forward pass, and twice that backward, once for the
inputs and once for the weights. With an inner loop, the suffix (head included) also takes an inner
backward pass B for each chunk, towards the fast weights only:

    above the lowest fast weight:  2 x entries of every matrix (gradients of activations)
                                   4 H K s(T) + 4 H K s(C)  for attention: earlier chunks' keys
                                   and values are constants of the inner step
    of each fast matrix:           2 x entries (its own gradient)

The exact meta-gradient is the derivative of forward pass and inner backward pass alike, and both
are products of two things that depend on the weights, so each costs 3 times itself:

    3 F_prefix + 3 (F_suffix + F_head) + 3 B (n - 1) / n

for n chunks; the last chunk's update reaches no loss. An update that the outer gradient treats as
a constant (first order; truncated, before the last m chunks) costs B once instead of 3 times.
"""

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import numpy as np

from tttjax.models import build_model, combine

if TYPE_CHECKING:
    from tttjax.config import InnerConfig, ModelConfig

# Dense bfloat16 peaks per chip, FLOP/s. TPU: Google Cloud's system architecture pages; GPU:
# NVIDIA's data sheets (tensor cores, without sparsity). Matched by the start of `device_kind`,
# the longest first.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


@dataclass(frozen=True)
class Part:
    """One residual branch (or the head) of the model: FLOPs of one token's forward pass.

    linear: its matrices. fast: those of them that are fast. out: its last matrix alone.
    scores: attention over all keys. own_scores: attention over keys of the query's chunk.
    """

    linear: float
    fast: float = 0.0
    out: float = 0.0
    scores: float = 0.0
    own_scores: float = 0.0


def mean_keys(length: int, window: int) -> float:
    """Mean over queries t = 0 .. length-1 of min(t + 1, window)."""
    full = min(length, window)
    return (full * (full + 1) / 2 + (length - full) * window) / length


def _parts(
    model: "ModelConfig", inner: "InnerConfig", seq_len: int
) -> tuple[list[Part], list[Part]]:
    """Branches of the prefix, and of the suffix with the head, in the order they run."""
    network = build_model(model, inner)
    params = network.abstract_params()
    weights = {
        "/".join(k.key for k in path): leaf.shape
        for path, leaf in jax.tree_util.tree_flatten_with_path(combine(params.slow, params.fast))[0]
    }

    def entries(prefix: str, only_fast: bool = False) -> float:
        """FLOPs of a token through the matrices below a path of stacked blocks."""
        return sum(
            2.0 * math.prod(shape[1:])
            for path, shape in weights.items()
            if path.startswith(prefix)
            and len(shape) > 2
            and (not only_fast or path in network.fast_paths)
        )

    head_width = model.num_heads * (model.head_dim or model.embed_dim // model.num_heads)
    chunk = inner.chunk_size
    sights = {"full": seq_len, "window": model.window_size, "local": chunk, "none": 0}
    prefix: list[Part] = []
    suffix: list[Part] = []
    for (stack, _), kind in zip(network.block_paths(), network.kinds, strict=True):
        keys = mean_keys(chunk if kind == "local" else seq_len, sights[kind])
        for branch, out in (("mixer", "wo"), ("fast_mlp", "w2"), ("mlp", "w2")):
            path = f"{stack}/{branch}/"
            attends = branch == "mixer"
            (suffix if stack.startswith("suffix") else prefix).append(
                Part(
                    linear=entries(path),
                    fast=entries(path, only_fast=True),
                    out=entries(path + out),
                    scores=4 * head_width * keys * attends,
                    own_scores=4 * head_width * mean_keys(chunk, sights[kind]) * attends,
                )
            )
    head = 2.0 * model.embed_dim * model.vocab_size
    suffix.append(Part(linear=head, fast=head * ("head" in network.fast_paths)))
    return prefix, suffix


def _forward(parts: list[Part]) -> float:
    return sum(part.linear + part.scores for part in parts)


def _inner_backward(parts: list[Part]) -> float:
    """B of the module's docstring: the gradient of a chunk's loss in the fast weights."""
    lowest = next((i for i, part in enumerate(parts) if part.fast), None)
    if lowest is None:
        return 0.0
    total = parts[lowest].fast + parts[lowest].out
    if parts[lowest].scores:
        total += parts[lowest].scores + parts[lowest].own_scores
    for part in parts[lowest + 1 :]:
        total += part.fast + part.linear + part.scores + part.own_scores
    return total


def forward_flops_per_token(model: "ModelConfig", inner: "InnerConfig", seq_len: int) -> float:
    """Model FLOPs per token of one forward pass over sequences of `seq_len` tokens."""
    prefix, suffix = _parts(model, inner, seq_len)
    return _forward(prefix) + _forward(suffix)


def train_flops_per_token(model: "ModelConfig", inner: "InnerConfig", seq_len: int) -> float:
    """Model FLOPs per token of a train step, inner and second-order terms counted."""
    prefix, suffix = _parts(model, inner, seq_len)
    plain = 3 * (_forward(prefix) + _forward(suffix))
    if inner.meta_gradient == "none":
        return plain
    chunks = seq_len // inner.chunk_size
    useful = chunks - 1
    exact = {
        "exact": useful,
        "truncated": max(0, min(inner.truncate_chunks, chunks) - 1),
        "first_order": 0,
    }[inner.meta_gradient]
    return plain + _inner_backward(suffix) * (useful + 2 * exact) / chunks


@dataclass(frozen=True)
class Peak:
    """FLOP/s of all devices of the run together, and where the figure comes from."""

    flops_per_second: float
    source: str


def device_peak(devices: list[jax.Device] | None = None) -> Peak | None:
    """The peak that MFU refers to; None for an accelerator that is not in the table.

    On CPU it is the float32 rate of a matrix product, measured here and now in a fraction of a
    second: not the processor's peak, but what XLA reaches on it at best.
    """
    devices = devices or jax.devices()
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        return Peak(_measured_matmul_rate() * jax.process_count(), "matrix product measured here")
    known = [name for name in PEAKS if kind.startswith(name)]
    if not known:
        return None
    name = max(known, key=len)
    return Peak(PEAKS[name] * len(devices), f"bfloat16 peak of {name}")


def _measured_matmul_rate(size: int = 1024, repeats: int = 5) -> float:
    x = jax.device_put(np.ones((size, size), np.float32), jax.local_devices()[0])
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
