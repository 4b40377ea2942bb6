"""Attention mixers: full, sliding-window, and local (within blocks).

Every mixer has the one form of the framework, for any number of tokens of one sequence:

    mixer(x_TD, state, position) -> (y_TD, state)

state None means that the sequence starts here and that nothing will follow: the form of training
over a whole sequence. `position` is the number of tokens read before.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from tttjax.models.layers import Identity, RMSNorm, normal_weight
from tttjax.ops.attention.attend import AttentionMask, attend, attend_one, mask_fn
from tttjax.ops.attention.library import attend_whole
from tttjax.ops.rope import rotate
from tttjax.ops.window_attention import window_attention, window_attention_jvp
from tttjax.types import Array

Kept = dict[str, Array]
State = Kept | None


class Attention(nnx.Module):
    """Multi-head attention with QK-norm before RoPE; what it sees is said by `attention_mask`.

    kv_heads: heads of keys and values (G), a divisor of num_heads; only these are kept.
    form: of attention with a state. "dense": all scores in memory, any derivative. "once", "twice":
    the window before a chunk in blocks (`ops.window_attention`), for jax.grad alone and for
    jax.grad of jax.jvp, where the new state of a window is the chunk's own rows alone. "start": the
    state is empty, the tokens are the first of their sequence. "one": a single token, with a state
    that is `opened` for writing.
    kernel: "xla" for XLA alone; else the platform's kernels where they apply.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int,
        rngs: nnx.Rngs,
        *,
        kv_heads: int,
        attention_mask: AttentionMask,
        rope_theta: float,
        rope_scaling: tuple[float, ...],
        qk_norm: bool,
        norm_eps: float,
        std: float,
        dtype: jnp.dtype,
        query_block: int,
        form: str = "dense",
        kernel: str = "auto",
    ):
        def weight(shape, axes):
            return normal_weight(rngs, shape, axes, std=std, dtype=dtype, cast_to_compute=True)

        def head_norm():
            return RMSNorm(head_dim, "head_dim", eps=norm_eps, dtype=dtype)

        def into_heads(heads, name):
            return weight((embed_dim, heads, head_dim), ("embed", name, "head_dim"))

        self.wq = into_heads(num_heads, "heads")
        self.wk = into_heads(kv_heads, "kv_heads")
        self.wv = into_heads(kv_heads, "kv_heads")
        self.wo = weight((num_heads, head_dim, embed_dim), ("heads", "head_dim", "embed"))
        self.q_norm = head_norm() if qk_norm else Identity()
        self.k_norm = head_norm() if qk_norm else Identity()
        self.attention_mask = attention_mask
        self.apply_rope = partial(rotate, theta=rope_theta, scaling=rope_scaling)
        self.query_block = query_block
        self.form = form
        self.kernel = kernel

    @property
    def memory(self) -> int:
        """Keys that have to be kept for the tokens to come; 0 where all of them must be."""
        reach = [size for size in self.attention_mask if size]
        return min(reach) if reach else 0

    @property
    def keeps(self) -> str:
        """How the state grows. "window": the last so many rows; "whole": all, each at its place."""
        return "window" if self.memory else "whole"

    def init_state(self, max_length: int, dtype: jnp.dtype) -> dict[str, Array]:
        """An empty state. Its size does not depend on `max_length` except for full attention.

        A window's keys are kept after k_norm but before RoPE, so that they can be given positions
        of its own, which never grow; of a whole past, keys are kept as they are met, after RoPE.
        """
        shape = (self.memory or max_length, *self.wk.shape[-2:])
        return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}

    def __call__(self, x_TD: Array, state: State, position: Array) -> tuple[Array, State]:
        def project(weight):
            return jnp.einsum("td,dhk->thk", x_TD, weight[...].astype(x_TD.dtype))

        q_THK = self.q_norm(project(self.wq))
        k_TGK = self.k_norm(project(self.wk))
        v_TGK = project(self.wv)
        if state is None or self.form == "start":
            position_T = jnp.arange(x_TD.shape[0])
            q_THK, turned_TGK = (self.apply_rope(x, position_T) for x in (q_THK, k_TGK))
            new_state = state and self._kept(state, k_TGK if self.memory else turned_TGK, v_TGK)
            y_THK = attend_whole(
                q_THK, turned_TGK, v_TGK, self.attention_mask, self.query_block, self.kernel
            )
            state = new_state
        elif self.form == "one":
            y_THK, state = self._attend_one(q_THK, k_TGK, v_TGK, state, position)
        elif self.memory:
            y_THK, state = self._attend_window(q_THK, k_TGK, v_TGK, state, position)
        else:
            y_THK, state = self._attend_all(q_THK, k_TGK, v_TGK, state, position)
        return jnp.einsum("thk,hkd->td", y_THK, self.wo[...].astype(x_TD.dtype)), state

    def _kept(self, state, k_TGK, v_TGK):
        """What the first tokens of a sequence leave in an empty state."""

        def one(past_SGK, new_TGK):
            if self.memory:
                return jnp.concatenate((past_SGK, new_TGK))[-self.memory :]
            return jax.lax.dynamic_update_slice_in_dim(past_SGK, new_TGK, 0, axis=0)

        return {"k": one(state["k"], k_TGK), "v": one(state["v"], v_TGK)}

    def _attend_window(self, q_THK, k_TGK, v_TGK, state, position):
        """Keys are the window's, then the new ones, at positions 0..W+T-1 whatever was read."""
        window, length = self.memory, q_THK.shape[0]
        slot_S = jnp.arange(window + length)

        def apply_rope(x_THK, first):
            return self.apply_rope(x_THK, slot_S[first : first + x_THK.shape[0]])

        new_state = {"k": k_TGK, "v": v_TGK}
        if self.form != "twice":
            new_state = {
                name: jnp.concatenate((state[name], new))[length:]
                for name, new in new_state.items()
            }
        q_THK, k_TGK, k_past = (
            apply_rope(q_THK, window),
            apply_rope(k_TGK, window),
            apply_rope(state["k"], 0),
        )
        if self.form == "dense":
            true_S = slot_S - window + position  # negative: a slot that no token has filled yet
            seen_TS = mask_fn(true_S[window:], true_S, self.attention_mask)
            k_SGK = jnp.concatenate((k_past, k_TGK))
            v_SGK = jnp.concatenate((state["v"], v_TGK))
            return attend(q_THK, k_SGK, v_SGK, seen_TS), new_state
        attend_blocks = {"once": window_attention, "twice": window_attention_jvp}[self.form]
        kernel = "xla" if self.kernel == "xla" else "auto"
        y_THK = attend_blocks(
            q_THK, k_past, state["v"], k_TGK, v_TGK, position, self.attention_mask, kernel=kernel
        )
        return y_THK, new_state

    def _attend_all(self, q_THK, k_TGK, v_TGK, state, position):
        """Keys are all that were ever read, each at its own position in a buffer."""
        write, length = jax.lax.dynamic_update_slice_in_dim, q_THK.shape[0]
        query_T = position + jnp.arange(length)
        q_THK, k_TGK = self.apply_rope(q_THK, query_T), self.apply_rope(k_TGK, query_T)
        k_SGK = write(state["k"], k_TGK, position, axis=0)
        v_SGK = write(state["v"], v_TGK, position, axis=0)
        key_S = jnp.arange(k_SGK.shape[0])

        def block(rows):
            q_QHK, query_Q = rows
            return attend(q_QHK, k_SGK, v_SGK, mask_fn(query_Q, key_S, self.attention_mask))

        rows = q_THK, query_T
        count = length // self.query_block
        if count > 1 and length % self.query_block == 0:  # else their scores are few
            blocks = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), rows)
            y_THK = jax.lax.map(block, blocks).reshape(q_THK.shape)
        else:
            y_THK = block(rows)
        return y_THK, {"k": k_SGK, "v": v_SGK}

    # --- writing, a token at a time ---------------------------------------------------------------

    def opened(self, past: Kept, now: Kept, first: Array, pending: Array, room: int) -> Kept:
        """The state for single tokens, form "one", with places for `room` of them after `past`.

        now: `past` after `pending` more tokens. first: tokens read before the first of these. A
        window lies in a buffer there, its keys turned once, and is not moved on by a copy. Heads
        come first, rows second.
        """
        if not self.memory:
            return {name: kept.swapaxes(0, 1) for name, kept in now.items()}

        def added(name):
            none = jnp.zeros((room, *now[name].shape[1:]), now[name].dtype)
            # Of more pending tokens than a window holds, the last are left; no other is ever seen.
            rows = jnp.concatenate((none, now[name], none))
            return jax.lax.dynamic_slice_in_dim(rows, room + self.memory - pending, room)

        k_SGK, v_SGK = (jnp.concatenate((past[name], added(name))) for name in ("k", "v"))
        turned_SGK = self.apply_rope(k_SGK, jnp.arange(k_SGK.shape[0]))
        rows = {"k": turned_SGK, "v": v_SGK, "new": added("k")}
        return {name: kept.swapaxes(0, 1) for name, kept in rows.items()} | {"first": first}

    def committed(self, state: Kept, row: Kept, position_R: Array) -> Kept:
        """The state with the rows that calls of form "one" have returned.

        Of L layers and R sequences at once, [L, R, ...], so that each row is put in its place and
        nothing else is moved.
        """
        at = {"k": position_R, "v": position_R}
        if self.memory:
            slot_R = position_R - state["first"][0] + self.memory
            at = {"k": slot_R, "v": slot_R, "new": slot_R - self.memory}

        def put(r, kept):
            def one(name, kept_LRGSK):
                rows = jax.lax.dynamic_slice_in_dim(row[name], r, 1, axis=1)
                start = [jnp.asarray(i, jnp.int32) for i in (0, r, 0, at[name][r], 0)]
                return jax.lax.dynamic_update_slice(kept_LRGSK, rows, start)

            return {name: one(name, array) for name, array in kept.items()}

        kept = {name: state[name] for name in at}
        return {**state, **jax.lax.fori_loop(0, position_R.shape[0], put, kept)}

    def closed(self, past: Kept, state: Kept, pending: Array) -> Kept:
        """What `opened` was given as `now`, `pending` tokens after `past`."""
        rows = {name: kept.swapaxes(0, 1) for name, kept in state.items() if name != "first"}
        if not self.memory:
            return rows
        rows["k"] = jnp.concatenate((past["k"], rows.pop("new")))
        cut = jax.lax.dynamic_slice_in_dim
        return {name: cut(kept, pending, self.memory) for name, kept in rows.items()}

    def _attend_one(self, q_1HK, k_1GK, v_1GK, state, position):
        """A single token; the state that is returned is its row alone, to be committed."""
        slot = position - state["first"] + self.memory if self.memory else position
        q_1HK, turned_1GK = self.apply_rope(q_1HK, slot[None]), self.apply_rope(k_1GK, slot[None])
        key_S = jnp.arange(state["k"].shape[1]) + (position - slot)
        seen_S = mask_fn(position[None], key_S, self.attention_mask)[0] & (key_S < position)
        y_HK = attend_one(q_1HK[0], state["k"], state["v"], turned_1GK[0], v_1GK[0], seen_S)
        row = {"k": turned_1GK, "v": v_1GK} | ({"new": k_1GK} if self.memory else {})
        return y_HK[None], {name: one.swapaxes(0, 1) for name, one in row.items()}


class NoMixer(nnx.Module):
    """A block without a mixer of tokens (the toy of the paper's appendix A)."""

    def init_state(self, max_length: int, dtype: jnp.dtype) -> dict[str, Array]:
        """Nothing has to be kept."""
        del max_length, dtype
        return {}
