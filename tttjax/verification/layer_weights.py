"""Conversion of the reference layers' parameters to the weights of our mixers.

Every function takes a layer's sizes and reference parameters and returns the mixer's weights by
name. They only transpose, split and reshape, so `jax.grad` through them gives gradients with
respect to the reference's parameters. Letters: D width, H heads, J convolution taps.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from tttjax.errors import UserError
from tttjax.models.gated_deltanet.config import GatedDeltaNetConfig
from tttjax.models.mamba2.config import Mamba2Config
from tttjax.models.ttt_layer.config import TTTLayerConfig
from tttjax.types import Array
from tttjax.verification.layer_format import CaseArrays, CaseFields

Weights = dict[str, Array]

TTT_EPS = 1e-6  # of every layer norm in the reference's TTT layers


def _split(array: Array, sizes: tuple[int, ...], axis: int = 0) -> list[Array]:
    offsets = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    return jnp.split(array, offsets, axis=axis)


def _linear(weight_OD: Array, *heads: int) -> Array:
    """A weight stored (out, in) as [in, *heads]."""
    return weight_OD.T.reshape(weight_OD.shape[1], *heads)


@dataclass(frozen=True)
class Mamba2Sizes:
    """P: channels of a head; G groups of B and C; N state size."""

    D: int
    H: int
    P: int
    G: int
    N: int
    J: int

    @property
    def inner(self) -> int:
        """Channels of all heads together."""
        return self.H * self.P

    @property
    def expand(self) -> int:
        return self.inner // self.D

    @classmethod
    def from_fields(cls, config: CaseFields) -> "Mamba2Sizes":
        sizes = cls(
            D=config.positive_int("hidden_size"),
            H=config.positive_int("num_heads"),
            P=config.positive_int("head_dim"),
            G=config.positive_int("n_groups", 1),
            N=config.positive_int("state_size"),
            J=config.positive_int("conv_kernel"),
        )
        inner = sizes.inner
        if inner % sizes.D:
            raise UserError(
                f"unsupported setting: num_heads x head_dim = {inner} is no whole multiple of "
                f"hidden_size {sizes.D}"
            )
        config.require("expand", (sizes.expand,), sizes.expand)
        if sizes.H % sizes.G:
            raise UserError(f"config.n_groups = {sizes.G} does not divide num_heads {sizes.H}")
        return sizes


def mamba2_settings(s: Mamba2Sizes, fields: CaseFields) -> dict[str, Any]:
    """The fields of our `ModelConfig` that the layer needs."""
    return {
        "embed_dim": s.D,
        "mixer_norm_eps": fields.number("eps", 1e-5),
        "conv_size": s.J,
        "scan_chunk": fields.positive_int("chunk_size", 64),
        "mamba2": Mamba2Config(
            expand=s.expand,
            head_dim=s.P,
            state_size=s.N,
            groups=s.G,
            dt_limits=fields.limits("time_step_limit"),
        ),
    }


def mamba2(s: Mamba2Sizes, take: CaseArrays) -> Weights:
    inner, bc_channels = s.inner, s.G * s.N
    rows = _split(
        take("in_proj.weight", 2 * inner + 2 * bc_channels + s.H, s.D),
        (inner, inner, bc_channels, bc_channels, s.H),
    )
    heads, bc_shape = (s.H, s.P), (s.G, s.N)
    channels = inner + 2 * bc_channels
    taps_JC = take("conv1d.weight", channels, 1, s.J)[:, 0].T
    conv_x, conv_b, conv_c = _split(taps_JC, (inner, bc_channels, bc_channels), axis=1)
    bias_x, bias_b, bias_c = _split(
        take("conv1d.bias", channels), (inner, bc_channels, bc_channels)
    )
    return {
        "wz": _linear(rows[0], *heads),
        "wx": _linear(rows[1], *heads),
        "wb": _linear(rows[2], *bc_shape),
        "wc": _linear(rows[3], *bc_shape),
        "wdt": _linear(rows[4], s.H),
        "conv_x": conv_x.reshape(s.J, *heads),
        "conv_b": conv_b.reshape(s.J, *bc_shape),
        "conv_c": conv_c.reshape(s.J, *bc_shape),
        "conv_x_bias": bias_x.reshape(heads),
        "conv_b_bias": bias_b.reshape(bc_shape),
        "conv_c_bias": bias_c.reshape(bc_shape),
        "dt_bias": take("dt_bias", s.H),
        "a_log": take("A_log", s.H),
        "skip": take("D", s.H),
        "norm": take("norm.weight", inner).reshape(heads),
        "wo": take("out_proj.weight", s.D, inner).T.reshape(*heads, s.D),
    }


@dataclass(frozen=True)
class DeltaSizes:
    """G key heads of K, H value heads of V; each key head serves H / G value heads."""

    D: int
    G: int
    H: int
    K: int
    V: int
    J: int

    @classmethod
    def from_fields(cls, config: CaseFields) -> "DeltaSizes":
        sizes = cls(
            D=config.positive_int("hidden_size"),
            G=config.positive_int("num_k_heads"),
            H=config.positive_int("num_v_heads"),
            K=config.positive_int("head_k_dim"),
            V=config.positive_int("head_v_dim"),
            J=config.positive_int("conv_kernel"),
        )
        if sizes.H % sizes.G:
            raise UserError(f"config.num_k_heads = {sizes.G} does not divide num_v_heads {sizes.H}")
        return sizes


def _delta_common(s: DeltaSizes, take: CaseArrays, norm: str, out: str) -> Weights:
    keys, values = s.G * s.K, s.H * s.V
    taps_JC = take("conv1d.weight", 2 * keys + values, 1, s.J)[:, 0].T
    conv_q, conv_k, conv_v = _split(taps_JC, (keys, keys, values), axis=1)
    return {
        "conv_q": conv_q.reshape(s.J, s.G, s.K),
        "conv_k": conv_k.reshape(s.J, s.G, s.K),
        "conv_v": conv_v.reshape(s.J, s.H, s.V),
        "a_log": take("A_log", s.H),
        "dt_bias": take("dt_bias", s.H),
        "norm": take(norm, s.V),
        "wo": take(out, s.D, values).T.reshape(s.H, s.V, s.D),
    }


def delta_settings(s: DeltaSizes, fields: CaseFields, fused: bool) -> dict[str, Any]:
    """The fields of our `ModelConfig` that the layer needs."""
    return {
        "embed_dim": s.D,
        "mixer_norm_eps": fields.number("eps", 1e-6 if fused else 1e-5),
        "conv_size": s.J,
        "scan_chunk": fields.positive_int("chunk_size", 64),
        "gated_deltanet": GatedDeltaNetConfig(
            key_heads=s.G,
            value_heads=s.H,
            key_dim=s.K,
            value_dim=s.V,
            negative_eigenvalues=fields.flag("allow_neg_eigval", False),
        ),
    }


def delta_separate(s: DeltaSizes, take: CaseArrays) -> Weights:
    """Gated DeltaNet with separate projections of q, k, v, the gate z, b and a."""
    return {
        "wq": _linear(take("q_proj.weight", s.G * s.K, s.D), s.G, s.K),
        "wk": _linear(take("k_proj.weight", s.G * s.K, s.D), s.G, s.K),
        "wv": _linear(take("v_proj.weight", s.H * s.V, s.D), s.H, s.V),
        "wz": _linear(take("g_proj.weight", s.H * s.V, s.D), s.H, s.V),
        "wb": _linear(take("b_proj.weight", s.H, s.D), s.H),
        "wa": _linear(take("a_proj.weight", s.H, s.D), s.H),
        **_delta_common(s, take, "o_norm.weight", "o_proj.weight"),
    }


def delta_fused(s: DeltaSizes, take: CaseArrays) -> Weights:
    """Gated DeltaNet with fused projections, whose rows are grouped by key head."""
    shared = s.H // s.G
    parts = (s.K, s.K, shared * s.V, shared * s.V)
    qkvz = take("in_proj_qkvz.weight", s.G * sum(parts), s.D).reshape(s.G, sum(parts), s.D)
    q_GKD, k_GKD, v_GRD, z_GRD = _split(qkvz, parts, axis=1)
    ba = take("in_proj_ba.weight", 2 * s.H, s.D).reshape(s.G, 2 * shared, s.D)
    b_GRD, a_GRD = _split(ba, (shared, shared), axis=1)
    return {
        "wq": _linear(q_GKD.reshape(-1, s.D), s.G, s.K),
        "wk": _linear(k_GKD.reshape(-1, s.D), s.G, s.K),
        "wv": _linear(v_GRD.reshape(-1, s.D), s.H, s.V),
        "wz": _linear(z_GRD.reshape(-1, s.D), s.H, s.V),
        "wb": _linear(b_GRD.reshape(-1, s.D), s.H),
        "wa": _linear(a_GRD.reshape(-1, s.D), s.H),
        **_delta_common(s, take, "norm.weight", "out_proj.weight"),
    }


@dataclass(frozen=True)
class TTTSizes:
    """K: channels of a head; C: tokens of a mini-batch. inner: "linear" or "mlp" (F = 4K wide).

    plain: q, k, v projections of their own, no convolutions and no gate.
    """

    D: int
    H: int
    K: int
    C: int
    J: int
    inner: str
    plain: bool

    @classmethod
    def from_fields(cls, config: CaseFields, inner: str, plain: bool) -> "TTTSizes":
        D, H = config.positive_int("hidden_size"), config.positive_int("num_heads")
        if D % H:
            raise UserError(f"config.num_heads = {H} does not divide hidden_size {D}")
        config.require("head_dim", (D // H,), D // H)
        if (D // H) % 2:
            raise UserError(f"head_dim {D // H} is odd; RoPE needs pairs")
        C = config.positive_int("mini_batch_size")
        return cls(D, H, D // H, C, config.positive_int("conv_width", 4), inner, plain)


def ttt_settings(s: TTTSizes, fields: CaseFields, plain: bool) -> dict[str, Any]:
    """The fields of our `ModelConfig` that the layer needs."""
    lr = fields.number("ttt_base_lr")
    if lr <= 0:
        raise UserError(f"unsupported setting: config.ttt_base_lr = {lr}, not above 0")
    return {
        "embed_dim": s.D,
        "conv_size": s.J,
        "ttt_layer": TTTLayerConfig(
            heads=s.H,
            chunk_size=s.C,
            lr=lr,
            rope_theta=fields.number("rope_theta", 10000.0),
            backbone="plain" if plain else "mamba",
            norm_eps=TTT_EPS,
        ),
    }


def ttt(s: TTTSizes, take: CaseArrays) -> Weights:
    heads = s.H, s.K
    hidden = s.K if s.inner == "linear" else 4 * s.K
    weights = {
        "wq": take("wq.kernel", s.D, s.D).reshape(s.D, *heads),
        "wv": take("wv.kernel", s.D, s.D).reshape(s.D, *heads),
        "wo": take("wo.kernel", s.D, s.D).reshape(*heads, s.D),
        "wlr": take("learnable_ttt_lr.kernel", s.H, s.D, 1)[..., 0].T,
        "lr_bias": take("learnable_ttt_lr.bias", s.H, 1)[:, 0],
        "token_idx": take("learnable_token_idx", s.C),
        "norm_scale": take("ttt_norm.scale", *heads),
        "norm_bias": take("ttt_norm.bias", *heads),
        "w1": take("ttt_dense_0", s.H, s.K, hidden),
        "b1": take("ttt_bias_0", s.H, 1, hidden)[:, 0],
        "post_norm_scale": take("post_norm.scale", s.D).reshape(heads),
        "post_norm_bias": take("post_norm.bias", s.D).reshape(heads),
    }
    if s.inner == "mlp":
        weights["w2"] = take("ttt_dense_1", s.H, hidden, s.K)
        weights["b2"] = take("ttt_bias_1", s.H, 1, s.K)[:, 0]
    if s.plain:
        weights["wk"] = take("wk.kernel", s.D, s.D).reshape(s.D, *heads)
        return weights
    weights["wg"] = take("wg.kernel", s.D, s.D).reshape(s.D, *heads)
    for name in ("conv_q", "conv_k"):
        weights[name] = take(f"{name}.kernel", s.J, 1, s.D).reshape(s.J, *heads)
        weights[f"{name}_bias"] = take(f"{name}.bias", s.D).reshape(heads)
    return weights
