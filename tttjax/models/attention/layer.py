"""Attention mixers: full, sliding-window, and local (within blocks)."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from tttjax.config.model import ModelConfig
from tttjax.models.caches import FullCache, MixerState, WindowCache
from tttjax.models.layers import Identity, RMSNorm, normal_weight
from tttjax.models.mixer import AttentionForm, State
from tttjax.ops.attention.attend import AttentionMask, attend, attend_decode, mask_fn
from tttjax.ops.attention.library import attend_sequence
from tttjax.ops.rope import apply_rope
from tttjax.ops.window_attention import window_attention, window_attention_jvp
from tttjax.types import Array


def attention_mask(kind: str, model: ModelConfig) -> AttentionMask:
    """The mask of "full", "window" or "local:SIZE"."""
    name, _, size = kind.partition(":")
    if name == "local":
        return AttentionMask(window=model.window_size, block=int(size))
    return AttentionMask(window=model.window_size) if name == "window" else AttentionMask()


class Attention(nnx.Module):
    """Multi-head attention under `attention_mask`, with QK-norm before RoPE.

    Only keys and values of G = `model.kv_heads` heads are cached. `model.attention_kernel`: "xla":
    no kernels. Otherwise library kernels for full sequences and Pallas kernels for chunks, where
    supported; decoding and full attention with a state always use XLA.
    """

    def __init__(self, kind: str, model: ModelConfig, rngs: nnx.Rngs):
        D, H, G, K = model.embed_dim, model.num_heads, model.kv_heads, model.head_size
        dtype = jnp.dtype(model.param_dtype)

        def weight(shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
            std = model.init_std
            return normal_weight(rngs, shape, axes, std=std, dtype=dtype, cast_to_compute=True)

        def head_norm() -> RMSNorm:
            return RMSNorm(K, "head_dim", eps=model.norm_eps, dtype=dtype)

        def into_heads(heads: int, name: str) -> nnx.Param:
            return weight((D, heads, K), ("embed", name, "head_dim"))

        self.wq = into_heads(H, "heads")
        self.wk = into_heads(G, "kv_heads")
        self.wv = into_heads(G, "kv_heads")
        self.wo = weight((H, K, D), ("heads", "head_dim", "embed"))
        self.q_norm: RMSNorm | Identity = head_norm() if model.qk_norm else Identity()
        self.k_norm: RMSNorm | Identity = head_norm() if model.qk_norm else Identity()
        self.attention_mask = attention_mask(kind, model)
        self.apply_rope = partial(apply_rope, theta=model.rope_theta, scaling=model.rope_scaling)
        self.query_block = min(1024, max(128, model.window_size // 2))
        self.kernel = model.attention_kernel

    @property
    def cache(self) -> WindowCache | FullCache:
        """A window as wide as the mask, or all keys without a limit."""
        limits = [size for size in self.attention_mask if size]
        return WindowCache(min(limits), self.apply_rope) if limits else FullCache()

    def init_state(self, max_length: int, dtype: jnp.dtype) -> MixerState:
        """An empty state. Its size does not depend on `max_length` except for full attention."""
        row = self.wk.shape[-2:]
        return {name: self.cache.empty(max_length, row, dtype) for name in ("k", "v")}

    def __call__(
        self, x_TD: Array, state: State, position: Array, form: AttentionForm = "dense"
    ) -> tuple[Array, State]:
        """x [T, D] -> y [T, D] (`mixer`).

        The new state of a window after "blocked_jvp" holds only the rows of these tokens. "decode"
        returns a row for `cache.append_kv`.
        """

        def project(weight: nnx.Param) -> Array:
            return jnp.einsum("td,dhk->thk", x_TD, weight[...].astype(x_TD.dtype))

        q_THK = self.q_norm(project(self.wq))
        k_TGK = self.k_norm(project(self.wk))
        v_TGK = project(self.wv)
        if state is None or form == "prefill":
            position_T = jnp.arange(x_TD.shape[0])
            q_THK, rotated_TGK = (self.apply_rope(x, position_T) for x in (q_THK, k_TGK))
            if state is not None:
                is_window = isinstance(self.cache, WindowCache)
                new = {"k": k_TGK if is_window else rotated_TGK, "v": v_TGK}
                state = {name: self.cache.append(state[name], new[name], 0) for name in new}
            y_THK = attend_sequence(
                q_THK, rotated_TGK, v_TGK, self.attention_mask, self.query_block, self.kernel
            )
        elif form == "decode":
            y_THK, state = self._attend_decode(q_THK, k_TGK, v_TGK, state, position)
        elif isinstance(self.cache, WindowCache):
            y_THK, state = self._attend_window(q_THK, k_TGK, v_TGK, state, position, form)
        else:
            y_THK, state = self._attend_full(q_THK, k_TGK, v_TGK, state, position)
        return jnp.einsum("thk,hkd->td", y_THK, self.wo[...].astype(x_TD.dtype)), state

    def _attend_window(
        self,
        q_THK: Array,
        k_TGK: Array,
        v_TGK: Array,
        state: MixerState,
        position: Array,
        form: AttentionForm,
    ) -> tuple[Array, MixerState]:
        """Attends to the window's keys, then the new ones, at relative positions 0..W+T-1."""
        window, length = state["k"].shape[0], q_THK.shape[0]
        slot_S = jnp.arange(window + length)

        def rotated(x_THK: Array, first: int) -> Array:
            return self.apply_rope(x_THK, slot_S[first : first + x_THK.shape[0]])

        new_state = {"k": k_TGK, "v": v_TGK}
        if form != "blocked_jvp":
            new_state = {
                name: self.cache.append(state[name], new, position)
                for name, new in new_state.items()
            }
        q_THK, k_TGK, k_window = (
            rotated(q_THK, window),
            rotated(k_TGK, window),
            rotated(state["k"], 0),
        )
        if form == "dense":
            position_S = slot_S - window + position  # negative: an empty slot
            mask_TS = mask_fn(position_S[window:], position_S, self.attention_mask)
            k_SGK = jnp.concatenate((k_window, k_TGK))
            v_SGK = jnp.concatenate((state["v"], v_TGK))
            return attend(q_THK, k_SGK, v_SGK, mask_TS), new_state
        attend_blocks = {"blocked": window_attention, "blocked_jvp": window_attention_jvp}[form]
        kernel = "xla" if self.kernel == "xla" else "auto"
        y_THK = attend_blocks(
            q_THK, k_window, state["v"], k_TGK, v_TGK, position, self.attention_mask, kernel=kernel
        )
        return y_THK, new_state

    def _attend_full(
        self, q_THK: Array, k_TGK: Array, v_TGK: Array, state: MixerState, position: Array
    ) -> tuple[Array, MixerState]:
        """Attends to all keys of the sequence, each at its own position in a buffer."""
        length = q_THK.shape[0]
        query_T = position + jnp.arange(length)
        q_THK, k_TGK = self.apply_rope(q_THK, query_T), self.apply_rope(k_TGK, query_T)
        k_SGK = self.cache.append(state["k"], k_TGK, position)
        v_SGK = self.cache.append(state["v"], v_TGK, position)
        key_S = jnp.arange(k_SGK.shape[0])

        def block(rows: tuple[Array, Array]) -> Array:
            q_QHK, query_Q = rows
            return attend(q_QHK, k_SGK, v_SGK, mask_fn(query_Q, key_S, self.attention_mask))

        rows = q_THK, query_T
        count = length // self.query_block
        if count > 1 and length % self.query_block == 0:  # else the scores are few
            blocks = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), rows)
            y_THK = jax.lax.map(block, blocks).reshape(q_THK.shape)
        else:
            y_THK = block(rows)
        return y_THK, {"k": k_SGK, "v": v_SGK}

    def _attend_decode(
        self, q_1HK: Array, k_1GK: Array, v_1GK: Array, state: MixerState, position: Array
    ) -> tuple[Array, MixerState]:
        """One token; the returned state is its row alone."""
        slot = self.cache.slot(state, position)
        q_1HK, rotated_1GK = self.apply_rope(q_1HK, slot[None]), self.apply_rope(k_1GK, slot[None])
        key_S = jnp.arange(state["k"].shape[1]) + (position - slot)
        mask_S = mask_fn(position[None], key_S, self.attention_mask)[0] & (key_S < position)
        y_HK = attend_decode(q_1HK[0], state["k"], state["v"], rotated_1GK[0], v_1GK[0], mask_S)
        row = {"k": rotated_1GK, "v": v_1GK}
        if isinstance(self.cache, WindowCache):
            row["new"] = k_1GK
        return y_HK[None], {name: one.swapaxes(0, 1) for name, one in row.items()}
