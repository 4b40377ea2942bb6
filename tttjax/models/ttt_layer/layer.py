"""TTT layers: TTT-Linear and TTT-MLP (arXiv 2407.04620), as mixers.

The inner model and its updates are in `tttjax.ops.ttt`; this file has the projections around it.
Two backbones: "plain" projects queries, keys and values; "mamba" computes queries and keys from one
projection by two short convolutions, and gates the output.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from tttjax.config.model import ModelConfig
from tttjax.models.caches import MixerState, RecurrentCache
from tttjax.models.layers import normal_weight
from tttjax.models.mixer import AttentionForm, State
from tttjax.models.ttt_layer.config import MLP_WIDTH
from tttjax.ops.norms import layer_norm
from tttjax.ops.rope import apply_rope
from tttjax.ops.short_conv import short_conv
from tttjax.ops.ttt import (
    InnerNorm,
    Weights,
    final_weights,
    initial_state,
    learning_rates,
    ttt,
)
from tttjax.types import Array


class TTTLayer(nnx.Module):
    """One TTT layer, [T, D] -> [T, D], with the inner model that `kind` names.

    The positions of RoPE restart at 0 in every mini-batch of C = `chunk_size` tokens. With `output`
    "query" the weights after the token's own gradient are applied to the query; with "key", the
    simplified output rule of the TTT-E2E paper, the weights before the mini-batch's update to the
    key, and there are no queries.
    """

    minibatch_form = "dual"  # "primal" computes the same result another way
    # The inner model before the first token; no other mixer has weights of these names.
    INNER_WEIGHTS = ("w1", "b1", "w2", "b2")

    def __init__(self, kind: str, model: ModelConfig, rngs: nnx.Rngs):
        settings, embed_dim = model.ttt_layer, model.embed_dim
        num_heads = settings.num_heads(model)
        head_dim = embed_dim // num_heads
        self.backbone, self.output = settings.backbone, settings.output
        self.head_dim, self.conv_size = head_dim, model.conv_size
        self.base_lr, self.rope_theta = settings.base_lr(kind), settings.rope_theta
        self.norm_eps = settings.norm_eps or model.norm_eps
        dtype, std = jnp.dtype(model.param_dtype), model.init_std

        def matrix(shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
            return normal_weight(rngs, shape, axes, std=std, dtype=dtype, cast_to_compute=True)

        def inner_matrix(shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
            # updated by the layer, in float32 at least
            return normal_weight(rngs, shape, axes, std=std, dtype=dtype)

        def constant(value: int, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
            return nnx.Param(jnp.full(shape, value, dtype), axes=axes)

        into_heads = (embed_dim, num_heads, head_dim), ("embed", "heads", "head_dim")
        per_head = (num_heads, head_dim), ("heads", "head_dim")
        if self.backbone == "mamba" or self.output == "query":
            self.wq = matrix(*into_heads)
        if self.backbone == "plain":
            self.wk = matrix(*into_heads)
        self.wv = matrix(*into_heads)
        self.wo = matrix((num_heads, head_dim, embed_dim), ("heads", "head_dim", "embed"))
        if self.backbone == "mamba":
            self.wg = matrix(*into_heads)
            taps = (model.conv_size, num_heads, head_dim), ("taps", "heads", "head_dim")
            lecun = jax.nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
            for name in self._convolved:
                kernel = nnx.Param(lecun(rngs.params(), taps[0], dtype), axes=taps[1])
                setattr(self, f"conv_{name}", kernel)
                setattr(self, f"conv_{name}_bias", constant(0, *per_head))
        self.wlr = matrix((embed_dim, num_heads), ("embed", "heads"))
        self.lr_bias = constant(0, (num_heads,), ("heads",))
        self.token_idx = constant(0, (settings.chunk_size,), ("taps",))
        self.norm_scale, self.norm_bias = constant(1, *per_head), constant(0, *per_head)
        is_mlp = kind == "ttt_mlp"
        hidden = MLP_WIDTH * head_dim if is_mlp else head_dim
        self.w1 = inner_matrix((num_heads, head_dim, hidden), ("heads", "head_dim", "state"))
        self.b1 = constant(0, (num_heads, hidden), ("heads", "state"))
        self.inner_names: tuple[str, ...] = ("w1", "b1")
        if is_mlp:
            self.w2 = inner_matrix((num_heads, hidden, head_dim), ("heads", "state", "head_dim"))
            self.b2 = constant(0, *per_head)
            self.inner_names = self.INNER_WEIGHTS
        self.post_norm_scale, self.post_norm_bias = constant(1, *per_head), constant(0, *per_head)

    @property
    def _convolved(self) -> tuple[str, ...]:
        """What the mamba backbone computes by convolutions of the shared projection."""
        if self.backbone == "plain":
            return ()
        return ("q", "k") if self.output == "query" else ("k",)

    @property
    def _initial_weights(self) -> Weights:
        """The inner model at the start of a sequence."""
        return {name: getattr(self, name)[...] for name in self.inner_names}

    @property
    def rate_C(self) -> Array:
        """The inner learning rate at each position in a mini-batch, without the token's factor."""
        return learning_rates(self.base_lr, self.head_dim, self.token_idx[...])

    cache = RecurrentCache()

    def init_state(self, max_length: int, dtype: jnp.dtype) -> dict[str, Array]:
        """The state before the first token; its size is constant.

        The inner model at the start of the current mini-batch (`w1`, ...), the sum of the weighted
        gradients within it (`g_w1`, ...), both float32 at least, and the last inputs of the
        convolutions (`conv_q`, `conv_k`) in `dtype`.
        """
        del max_length
        shapes = {name: getattr(self, name).shape for name in self.inner_names}
        state = initial_state(shapes, jnp.promote_types(dtype, jnp.float32))
        shape = (self.conv_size - 1, *self.norm_scale.shape)
        return state | {f"conv_{name}": jnp.zeros(shape, dtype) for name in self._convolved}

    def final_weights(self, state: dict[str, Array], position: Array | int) -> Weights:
        """The inner model after `position` tokens, from the `state` after them."""
        return final_weights(state, self._initial_weights, self.rate_C, position)

    def __call__(
        self, x_TD: Array, state: State, position: Array, form: AttentionForm = "dense"
    ) -> tuple[Array, State]:
        """x [T, D] -> y [T, D]; state None: a whole sequence (see `mixer`)."""
        del form
        wide = jnp.promote_types(x_TD.dtype, jnp.float32)
        qk, convs = self._queries_and_keys(x_TD, state)
        first = 0 if state is None else position
        position_T = (first + jnp.arange(x_TD.shape[0])) % self.token_idx.shape[0]
        qk = {name: apply_rope(x_THK, position_T, self.rope_theta) for name, x_THK in qk.items()}
        lam_TH = jnp.einsum("td,dh->th", x_TD, self.wlr[...].astype(x_TD.dtype))
        lam_TH = jax.nn.sigmoid(lam_TH.astype(wide) + self.lr_bias[...].astype(wide))
        norm = InnerNorm(
            self.norm_scale[...].astype(wide), self.norm_bias[...].astype(wide), self.norm_eps
        )
        z_THK, inner_state = ttt(
            qk.get("q"),
            qk["k"],
            self._project(self.wv, x_TD),
            lam_TH,
            self.rate_C,
            self._initial_weights,
            norm,
            state,
            position,
            form=self.minibatch_form,
        )
        if state is not None:
            state = {**(inner_state or {}), **convs}
        return self._join_heads(z_THK, x_TD), state

    def _project(self, weight: nnx.Param, x_TD: Array) -> Array:
        return jnp.einsum("td,dhk->thk", x_TD, weight[...].astype(x_TD.dtype))

    def _queries_and_keys(self, x_TD: Array, state: State) -> tuple[dict[str, Array], MixerState]:
        """({"q", "k"} [T, H, K] before RoPE, the convolutions' new states)."""
        if self.backbone == "plain":
            names = ("q", "k") if self.output == "query" else ("k",)
            return {name: self._project(getattr(self, f"w{name}"), x_TD) for name in names}, {}
        u_THK = self._project(self.wq, x_TD)
        qk: dict[str, Array] = {}
        convs: MixerState = {}
        for name in self._convolved:
            conv = f"conv_{name}"
            kernel, bias = getattr(self, conv)[...], getattr(self, f"{conv}_bias")[...]
            conv_state = None if state is None else state[conv]
            qk[name], last = short_conv(u_THK, kernel, bias, conv_state)
            if last is not None:
                convs[conv] = last
        return qk, convs

    def _join_heads(self, z_THK: Array, x_TD: Array) -> Array:
        """Norm over all heads, gate, output projection."""
        wide = z_THK.dtype
        scale_HK = self.post_norm_scale[...].astype(wide)
        bias_HK = self.post_norm_bias[...].astype(wide)
        y_THK = layer_norm(z_THK, scale_HK, bias_HK, self.norm_eps, axis=(-2, -1))
        y_THK = y_THK.astype(x_TD.dtype)
        if self.backbone == "mamba":
            y_THK = jax.nn.gelu(self._project(self.wg, x_TD), approximate=True) * y_THK
        return jnp.einsum("thk,hkd->td", y_THK, self.wo[...].astype(x_TD.dtype))
