"""Caches: the states of mixers, and every operation on them outside the forward pass.

    WindowCache     the last rows of keys and values
    FullCache       all rows, each at its own position
    RecurrentCache  arrays of constant size, replaced by every call

A mixer's `cache` is one of these. Its methods serve the buffers and cotangents of the fast form
(`ttt.kv_buffer`), the layout for decoding (`inference.decode`), and the arrays of a session file
(`inference.session_file`).

Methods on "arrays" take one array of B sequences and the L layers of a stack, [B, L, ...]; of keys
and values [B, L, S, G, K]. Methods for decoding take a state, a dict of arrays, of one layer and
one sequence.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from tttjax.types import Array

ROWS = 2  # the axis of rows in arrays of keys or values
MixerState = dict[str, Array]
Shape = tuple[int, ...]


class Cache:
    """The methods of every cache; here for arrays that every call replaces.

    is_buffered: whether all chunks of a sequence share one buffer in training; else the state
    before each chunk is stored. grows: whether the arrays hold `max_length` tokens.
    """

    is_buffered = False
    grows = False

    # --- training: buffers and cotangents of the fast form -------------------------------------

    def buffer_shape(self, shape: Shape, tokens: int) -> Shape:
        """Of the buffer for a sequence of `tokens`. shape: of the array in a state."""
        del tokens
        return shape

    def view(self, buffer: Array, shape: Shape, position: Array) -> Array:
        """The array before the token at `position`."""
        del shape, position
        return buffer

    def write(self, buffer: Array, new: Array, position: Array, tokens: int) -> Array:
        """`buffer` after `tokens` more tokens. new: the array after them."""
        del buffer, position, tokens
        return new

    def last_rows(self, array: Array, tokens: int) -> Array:
        """The part of an array that the last `tokens` computed."""
        del tokens
        return array

    def cotangent_before(self, after: Array, bar: Array, tokens: int) -> Array:
        """The cotangent of an array before a chunk of `tokens`.

        after: of the array after the chunk. bar: through the chunk's own computation.
        """
        del after, tokens
        return bar

    # --- decoding, one token at a time ---------------------------------------------------------

    def to_decode_cache(
        self,
        committed: MixerState,
        current: MixerState,
        *,
        first: Array,
        uncommitted: Array,
        capacity: int,
    ) -> MixerState:
        """The layout for decoding, with slots for `capacity` tokens after `committed`.

        current: `committed` after `uncommitted` more tokens. first: position of the first of these.
        """
        del committed, first, uncommitted, capacity
        return current

    def append_kv(self, state: MixerState, new: MixerState, position_R: Array) -> MixerState:
        """The decode state after one token each of R sequences, [L, R, ...].

        new: what the mixer returned for the tokens, which are at `position_R`.
        """
        del state, position_R
        return new

    def from_decode_cache(
        self, committed: MixerState, state: MixerState, uncommitted: Array
    ) -> MixerState:
        """The inverse of `to_decode_cache`: the state `uncommitted` tokens after `committed`."""
        del committed, uncommitted
        return state

    def base_for_decode(self, array: Array) -> Array:
        """What `from_decode_cache` needs of an array of `committed`."""
        return jnp.zeros(array.shape[:ROWS])

    # --- session files ---------------------------------------------------------------------------

    def to_store(
        self, committed: Array, current: Array, tokens: int, uncommitted: int
    ) -> dict[str, Array]:
        """Arrays of a file by suffix of their name, each row once.

        committed: after the last update. current: after all `tokens`, `uncommitted` of them since.
        """
        del tokens, uncommitted
        return {"": committed, "/now": current}

    def from_store(
        self, stored: Mapping[str, Array], empty: Array, tokens: int
    ) -> tuple[Array, Array]:
        """(committed, current) as given to `to_store`. empty: the array before the first token."""
        del empty, tokens
        return stored[""], stored["/now"]

    def stored_shapes(self, shape: Shape, tokens: int, uncommitted: int) -> dict[str, Shape]:
        """Shapes of `to_store`."""
        del tokens, uncommitted
        return {"": shape, "/now": shape}


class RecurrentCache(Cache):
    """Arrays of constant size, such as a memory matrix or the last inputs of a convolution."""


@dataclass(frozen=True)
class FullCache(Cache):
    """All keys, with RoPE applied, and values, each at its own position in a buffer."""

    is_buffered = True
    grows = True

    def empty(self, max_length: int, row: Shape, dtype: jnp.dtype) -> Array:
        """An array of one layer and one sequence before the first token, [S, ...]."""
        return jnp.zeros((max_length, *row), dtype)

    def append(self, array_SGK: Array, new_TGK: Array, position: Array | int) -> Array:
        """An array of one layer and one sequence with the rows of more tokens."""
        return jax.lax.dynamic_update_slice_in_dim(array_SGK, new_TGK, position, axis=0)

    def slot(self, state: MixerState, position: Array) -> Array:
        """The slot of the token at `position` in a decode state."""
        del state
        return position

    def to_decode_cache(
        self, committed: MixerState, current: MixerState, **slots: Array | int
    ) -> MixerState:
        """With axes heads, rows, entries."""
        del committed, slots
        return _heads_first(current)

    def append_kv(self, state: MixerState, new: MixerState, position_R: Array) -> MixerState:
        return _write_rows(state, new, {"k": position_R, "v": position_R})

    def from_decode_cache(
        self, committed: MixerState, state: MixerState, uncommitted: Array
    ) -> MixerState:
        del committed, uncommitted
        return _heads_first(state)

    def to_store(
        self, committed: Array, current: Array, tokens: int, uncommitted: int
    ) -> dict[str, Array]:
        """The rows in use; `committed` has the same ones up to its position."""
        del committed, uncommitted
        return {"": current[:, :, :tokens]}

    def from_store(
        self, stored: Mapping[str, Array], empty: Array, tokens: int
    ) -> tuple[Array, Array]:
        filled = empty.at[:, :, :tokens].set(stored[""])
        return filled, filled

    def stored_shapes(self, shape: Shape, tokens: int, uncommitted: int) -> dict[str, Shape]:
        del uncommitted
        return {"": (*shape[:ROWS], tokens, *shape[ROWS + 1 :])}


@dataclass(frozen=True)
class WindowCache(Cache):
    """The last `size` rows of keys, after k_norm and before RoPE, and of values.

    Positions within a window are relative, 0..W+T-1, and never grow. rotate: RoPE of keys at given
    positions.
    """

    size: int
    rotate: Callable[[Array, Array], Array]

    is_buffered = True

    def empty(self, max_length: int, row: Shape, dtype: jnp.dtype) -> Array:
        """An array of one layer and one sequence before the first token, [W, ...]."""
        del max_length
        return jnp.zeros((self.size, *row), dtype)

    def append(self, array_WGK: Array, new_TGK: Array, position: Array | int) -> Array:
        """An array of one layer and one sequence with the rows of more tokens."""
        del position
        return jnp.concatenate((array_WGK, new_TGK))[-self.size :]

    def slot(self, state: MixerState, position: Array) -> Array:
        """The slot of the token at `position` in a decode state."""
        return position - state["first"] + self.size

    # --- training: each row once, in a buffer as long as the sequence ---------------------------

    def buffer_shape(self, shape: Shape, tokens: int) -> Shape:
        return (*shape[:ROWS], shape[ROWS] + tokens, *shape[ROWS + 1 :])

    def view(self, buffer: Array, shape: Shape, position: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(buffer, position, shape[ROWS], ROWS)

    def write(self, buffer: Array, new: Array, position: Array, tokens: int) -> Array:
        rows = self.last_rows(new, tokens)
        return jax.lax.dynamic_update_slice_in_dim(buffer, rows, self.size + position, ROWS)

    def last_rows(self, array: Array, tokens: int) -> Array:
        return jax.lax.slice_in_dim(array, -tokens, None, axis=ROWS)

    def cotangent_before(self, after: Array, bar: Array, tokens: int) -> Array:
        """Also of the rows that stay in the window, which are `tokens` rows further back."""
        rolled = jnp.roll(after, tokens, ROWS)  # the chunk's own rows come first
        is_older = jnp.arange(after.shape[ROWS]) >= tokens
        shape = (-1,) + (1,) * (after.ndim - ROWS - 1)
        return bar + jnp.where(is_older.reshape(shape), rolled, 0)

    # --- decoding: a buffer whose keys have RoPE applied once and are never shifted --------------

    def to_decode_cache(
        self,
        committed: MixerState,
        current: MixerState,
        *,
        first: Array,
        uncommitted: Array,
        capacity: int,
    ) -> MixerState:
        """With axes heads, rows, entries; "new" has keys before RoPE."""

        def new_slots(name: str) -> Array:
            empty = jnp.zeros((capacity, *current[name].shape[1:]), current[name].dtype)
            # Of more uncommitted tokens than the window holds, the oldest are never attended to.
            rows = jnp.concatenate((empty, current[name], empty))
            start = capacity + self.size - uncommitted
            return jax.lax.dynamic_slice_in_dim(rows, start, capacity)

        k_SGK, v_SGK = (jnp.concatenate((committed[name], new_slots(name))) for name in ("k", "v"))
        rotated_SGK = self.rotate(k_SGK, jnp.arange(k_SGK.shape[0]))
        rows = {"k": rotated_SGK, "v": v_SGK, "new": new_slots("k")}
        return _heads_first(rows) | {"first": first}

    def append_kv(self, state: MixerState, new: MixerState, position_R: Array) -> MixerState:
        slot_R = position_R - state["first"][0] + self.size
        return _write_rows(state, new, {"k": slot_R, "v": slot_R, "new": slot_R - self.size})

    def from_decode_cache(
        self, committed: MixerState, state: MixerState, uncommitted: Array
    ) -> MixerState:
        rows = _heads_first({name: x for name, x in state.items() if name != "first"})
        rows["k"] = jnp.concatenate((committed["k"], rows.pop("new")))
        take = partial(jax.lax.dynamic_slice_in_dim, start_index=uncommitted, slice_size=self.size)
        return {name: take(x) for name, x in rows.items()}

    def base_for_decode(self, array: Array) -> Array:
        return array

    # --- session files: the rows at the last update, and those since ------------------------------

    def to_store(
        self, committed: Array, current: Array, tokens: int, uncommitted: int
    ) -> dict[str, Array]:
        del tokens
        first = max(0, current.shape[ROWS] - uncommitted)
        return {"": committed, "/new": current[:, :, first:]}

    def from_store(
        self, stored: Mapping[str, Array], empty: Array, tokens: int
    ) -> tuple[Array, Array]:
        del empty, tokens
        rows = jnp.concatenate((stored[""], stored["/new"]), axis=ROWS)
        return stored[""], rows[:, :, rows.shape[ROWS] - stored[""].shape[ROWS] :]

    def stored_shapes(self, shape: Shape, tokens: int, uncommitted: int) -> dict[str, Shape]:
        del tokens
        new = min(uncommitted, shape[ROWS])
        return {"": shape, "/new": (*shape[:ROWS], new, *shape[ROWS + 1 :])}


def _heads_first(rows: MixerState) -> MixerState:
    """[S, G, K] to [G, S, K], and back."""
    return {name: x.swapaxes(0, 1) for name, x in rows.items()}


def _write_rows(state: MixerState, row: MixerState, slots: Mapping[str, Array]) -> MixerState:
    """The decode state [L, R, G, S, K] with one row per sequence, each written in place."""

    def write(r: Array, buffers: MixerState) -> MixerState:
        def one(name: str, buffer_LRGSK: Array) -> Array:
            rows = jax.lax.dynamic_slice_in_dim(row[name], r, 1, axis=1)
            start = [jnp.asarray(i, jnp.int32) for i in (0, r, 0, slots[name][r], 0)]
            return jax.lax.dynamic_update_slice(buffer_LRGSK, rows, start)

        return {name: one(name, buffer) for name, buffer in buffers.items()}

    buffers = {name: state[name] for name in slots}
    count = next(iter(slots.values())).shape[0]
    return {**state, **jax.lax.fori_loop(0, count, write, buffers)}
