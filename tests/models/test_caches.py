"""Caches: buffers, cotangents, decoding and session files agree with appending rows."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.small import worst

from tttjax.models.caches import ROWS, FullCache, RecurrentCache, WindowCache
from tttjax.ops.rope import apply_rope

pytestmark = pytest.mark.usefixtures("x64")
LENGTH, CHUNK, WINDOW = 12, 3, 5
HEADS = (2, 4)  # heads and entries of a row
CACHES = {
    "window": WindowCache(WINDOW, partial(apply_rope, theta=100.0)),
    "full": FullCache(),
}
every_cache = pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)


def rows(seed=0):
    return np.random.default_rng(seed).normal(size=(LENGTH, *HEADS))


def arrays_after(cache, row_TGK):
    """The array [1, 1, S, G, K] before each token, and after the last, by appending one by one."""
    array, result = cache.empty(LENGTH, HEADS, jnp.float64), []
    for position in range(LENGTH + 1):
        result.append(np.asarray(array)[None, None])
        if position < LENGTH:
            array = cache.append(array, row_TGK[position : position + 1], position)
    return result


def test_window_has_the_last_rows_and_full_all():
    row_TGK = rows()
    window, full = (arrays_after(cache, row_TGK)[8][0, 0] for cache in CACHES.values())
    np.testing.assert_array_equal(window, row_TGK[3:8])
    np.testing.assert_array_equal(full, np.concatenate((row_TGK[:8], 0 * row_TGK[8:])))


@every_cache
def test_any_split_appends_the_same(cache):
    array = cache.empty(LENGTH, HEADS, jnp.float64)
    for first, last in ((0, 1), (1, 8), (8, LENGTH)):  # 7 tokens: more than the window
        array = cache.append(array, rows()[first:last], first)
    np.testing.assert_array_equal(array, arrays_after(cache, rows())[-1][0, 0])


@every_cache
def test_buffer_shows_the_array_before_every_chunk(cache):
    arrays = arrays_after(cache, rows())
    shape = arrays[0].shape
    buffer = jnp.zeros(cache.buffer_shape(shape, LENGTH))
    for position in range(0, LENGTH, CHUNK):
        np.testing.assert_array_equal(cache.view(buffer, shape, position), arrays[position])
        buffer = cache.write(buffer, arrays[position + CHUNK], position, CHUNK)


def test_recurrent_arrays_are_replaced():
    cache, old, new = RecurrentCache(), np.zeros((1, 1, 2)), np.ones((1, 1, 2))
    assert cache.view(cache.write(old, new, 3, CHUNK), new.shape, 6) is new
    assert (
        cache.to_decode_cache({"m": old}, {"m": new}, first=0, uncommitted=3, capacity=4)["m"]
        is new
    )
    assert cache.from_decode_cache({"m": old}, {"m": new}, 3)["m"] is new
    assert not cache.grows


def test_only_full_attention_grows():
    sizes = [cache.empty(1000, HEADS, jnp.float32).shape[0] for cache in CACHES.values()]
    assert sizes == [WINDOW, 1000]
    assert [cache.grows for cache in CACHES.values()] == [False, True]


def test_window_cotangents_equal_autodiff():
    """Of a loss of the window before every chunk, in the rows of the whole sequence."""
    cache = CACHES["window"]
    weights = np.random.default_rng(1).normal(size=(LENGTH // CHUNK, 1, 1, WINDOW, *HEADS))

    def losses(row_TGK):
        array, total = cache.empty(LENGTH, HEADS, jnp.float64), 0.0
        for i, weight in enumerate(weights):
            total += jnp.sum(jnp.sin(array) * weight[0, 0])
            chunk = row_TGK[i * CHUNK : (i + 1) * CHUNK]
            array = cache.append(array, chunk, i * CHUNK)
        return total

    arrays = arrays_after(cache, rows())
    bar, of_rows = jnp.zeros(arrays[0].shape), []
    for i in reversed(range(LENGTH // CHUNK)):
        of_rows.insert(0, np.asarray(cache.last_rows(bar, CHUNK))[0, 0])
        bar = cache.cotangent_before(bar, np.cos(arrays[i * CHUNK]) * weights[i], CHUNK)
    expected_TGK = jax.jit(jax.grad(losses))(rows())
    np.testing.assert_allclose(np.concatenate(of_rows), expected_TGK, atol=1e-14)


@every_cache
@pytest.mark.parametrize(("committed", "current"), [(0, 0), (2, 2), (3, 6), (2, 9)])
def test_decoding_gives_the_state_of_appending(cache, committed, current):
    """Two sequences, the second one token behind, decoded for three tokens."""
    arrays = {name: arrays_after(cache, rows(seed)) for seed, name in enumerate(("k", "v"))}

    def state(position):
        return {name: x[position][0, 0] for name, x in arrays.items()}

    starts = [committed, max(committed - 1, 0)]
    decoded = [
        cache.to_decode_cache(
            state(start), state(now), first=start, uncommitted=now - start, capacity=10
        )
        for start, now in zip(starts, (current, max(current - 1, 0)), strict=True)
    ]
    stacked = jax.tree.map(lambda *x: jnp.stack(x)[None], *decoded)
    position_R = np.array([current, max(current - 1, 0)])
    for _ in range(3):
        new = {name: np.stack([rows(s)[position_R]], 0) for s, name in enumerate(("k", "v"))}
        row = {name: x[..., None, :] for name, x in new.items()}  # [L, R, G, 1, K]
        if isinstance(cache, WindowCache):
            slots = cache.slot({"first": np.array(starts)}, position_R)
            rotated = [
                cache.rotate(x[None], s[None]) for x, s in zip(new["k"][0], slots, strict=True)
            ]
            row = {**row, "new": row["k"], "k": jnp.stack(rotated)[None, :, 0, :, None]}
        stacked = cache.append_kv(stacked, row, jnp.asarray(position_R))
        position_R = position_R + 1
    for r, start in enumerate(starts):
        one = jax.tree.map(lambda x, r=r: x[0, r], stacked)
        result = cache.from_decode_cache(state(start), one, position_R[r] - start)
        assert worst(result, state(position_R[r])) == 0


@pytest.mark.parametrize("cache", [*CACHES.values(), RecurrentCache()], ids=[*CACHES, "recurrent"])
@pytest.mark.parametrize(("tokens", "pending"), [(0, 0), (3, 3), (9, 2), (12, 7)])
def test_stored_arrays_restore_both_contexts(cache, tokens, pending):
    if isinstance(cache, RecurrentCache):
        arrays = [np.full((1, 1, 2, 2), float(i)) for i in range(LENGTH + 1)]
    else:
        arrays = arrays_after(cache, rows())
    learned, now = arrays[tokens - pending], arrays[tokens]
    stored = cache.to_store(learned, now, tokens, pending)
    shapes = cache.stored_shapes(now.shape, tokens, pending)
    assert {suffix: x.shape for suffix, x in stored.items()} == shapes
    restored = cache.from_store(stored, jnp.asarray(arrays[0]), tokens)
    np.testing.assert_array_equal(restored[1], now)
    if cache.grows:  # the rows after its position are never attended to
        rows_in_use = np.s_[:, :, : tokens - pending]
        np.testing.assert_array_equal(restored[0][rows_in_use], learned[rows_in_use])
    else:
        np.testing.assert_array_equal(restored[0], learned)


def test_a_window_is_stored_once():
    """The rows at the last update and those since, not both contexts."""
    shapes = CACHES["window"].stored_shapes((1, 1, WINDOW, *HEADS), tokens=9, uncommitted=2)
    assert [shape[ROWS] for shape in shapes.values()] == [WINDOW, 2]
