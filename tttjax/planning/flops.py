"""Model FLOPs of a train step by formula, and the peak FLOP/s of the devices.

Only the matrix products that the method requires are counted (2 FLOPs per multiply-add): no
recomputation, norms, softmaxes or optimizer, and for recurrent mixers the products of the
token-by-token recurrence, not those of the chunk-parallel form. Per token, with s(T) the mean
number of keys that a query attends to,

    linear maps       F = 2 x entries of the matrix
    convolutions      F = 2 x entries of the kernel: one tap per channel and token
    attention         F = 4 H K s(T)        scores and weighted values
    Mamba-2           F = 4 H P N           x B^T into the state, the state times C
    Gated DeltaNet, KDA   F = 6 H K V       the state times k, the write, the state times q
    TTT layer         F = 2 E for the inner model on the key, E its matrices' entries,
                        + 2 E for its weight gradients, and 2 x entries of w2 back through w2,
                        + 2 E for the inner model on the query (not with output = "key")
    head              F = 2 D V

Training without an inner loop costs 3 F: the forward pass, and twice that backward, once for the
inputs and once for the weights. With an inner loop, the suffix (head included) also takes an inner
backward pass B for each chunk, for the fast weights only:

    from the output down to the first fast weight:
                                   2 x entries of every matrix (gradients of activations)
                                   4 H K s(T) + 4 H K s(C)  for attention: earlier chunks' keys
                                   and values are constants of the inner step
                                   2 F  for the recurrence of a recurrent mixer
    of each fast matrix:           2 x entries (its own gradient)

The exact meta-gradient differentiates the forward pass and the inner backward pass, both products
of two factors that depend on the weights, so each costs 3 times itself:

    3 F_prefix + 3 (F_suffix + F_head) + 3 B (n - 1) / n

for n chunks; the last chunk's update does not affect the loss. An update that the outer gradient
treats as a constant (first order; truncated, before the last m chunks) costs B instead of 3 B.
"""

import math
import time
from dataclasses import dataclass

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from tttjax.config import InnerConfig, ModelConfig
from tttjax.config.model import split_mixers
from tttjax.models.stacking import combine
from tttjax.models.transformer import Transformer, build_model
from tttjax.planning.accelerators import peaks

# By prefix of `device_kind`; the longest match applies.
PEAKS = peaks()


@dataclass(frozen=True)
class Part:
    """One residual branch (or the head) of the model: FLOPs of one token's forward pass.

    linear: matrices and convolutions. fast: the fast weights among them. out: the last matrix.
    scores: attention over all keys. own_scores: attention over the keys of the query's chunk.
    recurrence: state updates and reads of a recurrent mixer.
    """

    linear: float
    fast: float = 0.0
    out: float = 0.0
    scores: float = 0.0
    own_scores: float = 0.0
    recurrence: float = 0.0

    @property
    def forward(self) -> float:
        return self.linear + self.scores + self.recurrence

    @property
    def backward_without_matrices(self) -> float:
        """The inner backward pass of attention or recurrence."""
        return self.scores + self.own_scores + 2 * self.recurrence


def mean_keys(length: int, window: int) -> float:
    """Mean over queries t = 0 .. length-1 of min(t + 1, window)."""
    full = min(length, window)
    return (full * (full + 1) / 2 + (length - full) * window) / length


def _parts(model: ModelConfig, inner: InnerConfig, seq_len: int) -> tuple[list[Part], list[Part]]:
    """Branches of the prefix, and of the suffix with the head, in forward order."""
    network = build_model(model, inner)
    entries = _Entries(network)
    prefix: list[Part] = []
    suffix: list[Part] = []
    for (stack, _), kinds in zip(network.block_paths(), network.kinds, strict=True):
        parts = suffix if stack.startswith("suffix") else prefix
        if model.pre_conv:
            parts.append(entries.part(f"{stack}/pre_conv"))
        for i, kind in enumerate(split_mixers(kinds)):
            path = f"{stack}/mixer{i + 1 if i else ''}"
            parts.append(entries.part(path, out="wo", **_mixing(kind, model, inner, seq_len)))
        for branch in ("fast_mlp", "mlp"):
            parts.append(entries.part(f"{stack}/{branch}", out="w2"))
    head = 2.0 * model.embed_dim * model.vocab_size
    suffix.append(Part(linear=head, fast=head * ("head" in network.fast_paths)))
    return prefix, suffix


class _Entries:
    """FLOPs per token of the weights under each path of stacked blocks."""

    def __init__(self, network: Transformer):
        params, axes = network.abstract_params(), network.axes()
        shapes = flatten_dict(combine(params.slow, params.fast), sep="/")
        names = flatten_dict(combine(axes.slow, axes.fast), sep="/")
        self.fast_paths = network.fast_paths
        self.flops = {
            path: 2.0 * math.prod(shape.shape[1:])
            for path, shape in shapes.items()
            if path.startswith(("prefix/", "suffix/")) and _multiplies_tokens(path, names[path])
        }

    def part(self, path: str, out: str = "", **mixing: float) -> Part:
        """The branch at `path`, all zeros if the block has none; out: its last matrix's name."""
        linear = {p: n for p, n in self.flops.items() if p.startswith(f"{path}/")}
        return Part(
            linear=sum(linear.values()),
            fast=sum(n for p, n in linear.items() if p in self.fast_paths),
            out=linear.get(f"{path}/{out}", 0.0),
            **mixing,
        )


def _multiplies_tokens(path: str, axes: tuple[str, ...]) -> bool:
    """Whether a stacked weight is a matrix or a convolution kernel applied to every token.

    False for norms, biases, and the initial inner weights of a TTT layer, which are its state.
    """
    if "/fast_mlp/" in path and "heads" in axes:
        return "head_dim" in axes and "hidden" in axes
    return len(axes) > 2 and not {"embed", "taps", "hidden"}.isdisjoint(axes)


def _mixing(kind: str, model: ModelConfig, inner: InnerConfig, seq_len: int) -> dict[str, float]:
    """The fields of a mixer's Part that are not its matrices: attention or recurrence."""
    spans = {"full": seq_len, "window": model.window_size}
    if kind not in spans:
        return {"recurrence": model.mixer(kind).recurrence_flops(kind, model)}
    per_key = 4 * model.num_heads * model.head_size
    return {
        "scores": per_key * mean_keys(seq_len, spans[kind]),
        "own_scores": per_key * mean_keys(inner.chunk_size, spans[kind]),
    }


def _forward(parts: list[Part]) -> float:
    return sum(part.forward for part in parts)


def _inner_backward(parts: list[Part]) -> float:
    """B of the module's docstring: the gradient of a chunk's loss in the fast weights."""
    lowest = next((i for i, part in enumerate(parts) if part.fast), None)
    if lowest is None:
        return 0.0
    total = parts[lowest].fast + parts[lowest].out + parts[lowest].backward_without_matrices
    for part in parts[lowest + 1 :]:
        total += part.fast + part.linear + part.backward_without_matrices
    return total


def forward_flops_per_token(model: ModelConfig, inner: InnerConfig, seq_len: int) -> float:
    """Model FLOPs per token of one forward pass over sequences of `seq_len` tokens."""
    prefix, suffix = _parts(model, inner, seq_len)
    return _forward(prefix) + _forward(suffix)


@dataclass(frozen=True)
class TrainFlops:
    """Model FLOPs per token of a train step by part; see the module's docstring.

    prefix, suffix: forward pass, the head with the suffix. inner_backward: gradients of the inner
    updates. outer: the backward pass of these three.
    """

    prefix: float
    suffix: float
    inner_backward: float
    outer: float

    @property
    def total(self) -> float:
        return self.prefix + self.suffix + self.inner_backward + self.outer


def train_flops_by_part(model: ModelConfig, inner: InnerConfig, seq_len: int) -> TrainFlops:
    """`train_flops_per_token` by part."""
    prefix_parts, suffix_parts = _parts(model, inner, seq_len)
    prefix, suffix = _forward(prefix_parts), _forward(suffix_parts)
    inner_backward, outer = 0.0, 2 * (prefix + suffix)
    if inner.meta_gradient != "none":
        chunks = seq_len // inner.chunk_size
        useful = chunks - 1  # updates that affect the loss
        differentiated = {
            "exact": useful,
            "truncated": max(0, min(inner.truncate_chunks, chunks) - 1),
            "first_order": 0,
        }[inner.meta_gradient]
        backward = _inner_backward(suffix_parts) / chunks
        inner_backward = backward * useful
        outer += 2 * backward * differentiated
    return TrainFlops(prefix, suffix, inner_backward, outer)


def train_flops_per_token(model: ModelConfig, inner: InnerConfig, seq_len: int) -> float:
    """Model FLOPs per token of a train step, inner and second-order terms included."""
    return train_flops_by_part(model, inner, seq_len).total


@dataclass(frozen=True)
class Peak:
    """Total FLOP/s of the devices of a run, and the source of the figure."""

    flops_per_second: float
    source: str


def device_peak(devices: list[jax.Device] | None = None) -> Peak | None:
    """The peak that MFU refers to; None for an accelerator that is not in the table.

    On CPU it is the float32 rate of a matrix product, measured in a fraction of a second: the best
    that XLA reaches, not the processor's peak.
    """
    devices = devices or jax.devices()
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        return Peak(_measured_matmul_rate() * jax.process_count(), "matrix product measured here")
    matches = [name for name in PEAKS if kind.startswith(name)]
    if not matches:
        return None
    name = max(matches, key=len)
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
