"""Decoding: one token for each of R sequences, which may be at different positions.

Prefill keeps the window's keys and values as rows in order and shifts them by a copy. Decoding
converts the window to a buffer with free slots and RoPE already applied, and writes one row per
token in place: a token costs one pass over weights and window. Converted back, the context is the
one that prefill would give.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tttjax.inference.prefill import Context, InferenceModel, Weights
from tttjax.models.caches import Cache
from tttjax.models.stacking import combine
from tttjax.parallel.batching import over_sequences
from tttjax.types import Array, PyTree

STEP_AXES = {"position": 0, "blocks": 1}  # of R sequences in what `decode_one` returns


class DecodeState(NamedTuple):
    """Contexts for decoding: of one sequence, or of R with another axis (`decode_axes`)."""

    parallel: PyTree
    sequential: PyTree
    fast: PyTree


def to_decode_state(
    inference_model: InferenceModel,
    committed: Context,
    current: Context,
    uncommitted: Array,
    capacity: int,
) -> DecodeState:
    """The decode state for up to `capacity` tokens after `committed`.

    current: `committed` after `uncommitted` more tokens. Contexts are of one sequence, [1, ...]; of
    `committed`, only the states are used.
    """

    def convert(caches: PyTree, before: PyTree, now: PyTree) -> PyTree:
        position = before["position"]
        sizes = {"first": position, "uncommitted": uncommitted, "capacity": capacity}
        to_decode = _by_layer(lambda cache: partial(cache.to_decode_cache, **sizes))
        return {**now, "blocks": jax.tree.map(to_decode, caches, before["blocks"], now["blocks"])}

    parallel, sequential = map(
        convert, _caches(inference_model), _parts(committed), _parts(current)
    )
    return DecodeState(parallel, sequential, _unbatch(current.fast))


def decode_step(
    inference_model: InferenceModel, weights: Weights, state: DecodeState, token_R: Array
) -> tuple[DecodeState, Array]:
    """R contexts after one token each, and the logits [R, V] of the next, in float32 at least."""
    split = inference_model.chunk_model.split

    def one(state: DecodeState, token: Array) -> tuple[Array, tuple[PyTree, PyTree]]:
        sequential = combine(weights.sequential, state.fast)
        parts = state.parallel, state.sequential
        x_D, new = split.decode_one(weights.parallel, sequential, parts, token)
        h_1D = split.model.final_norm(sequential, x_D[None])
        return split.model.logits(sequential, h_1D)[0], new

    run_all = over_sequences(
        one, in_axes=(decode_axes(state), 0), out_axes=(0, (STEP_AXES, STEP_AXES))
    )
    logit_RV, new = run_all(state, token_R)

    def append(caches: PyTree, before: PyTree, after: PyTree) -> PyTree:
        def of_mixer(cache: Cache, state: PyTree, new: PyTree) -> PyTree:
            return cache.append_kv(state, new, before["position"])

        return {
            **after,
            "blocks": jax.tree.map(of_mixer, caches, before["blocks"], after["blocks"]),
        }

    parallel, sequential = map(append, _caches(inference_model), state[:2], new)
    return DecodeState(parallel, sequential, state.fast), logit_RV


def from_decode_state(
    inference_model: InferenceModel, committed: Context, state: DecodeState, uncommitted: Array
) -> Context:
    """The context `uncommitted` tokens after `committed`."""

    def convert(caches: PyTree, before: PyTree, after: PyTree) -> PyTree:
        from_decode = _by_layer(
            lambda cache: partial(cache.from_decode_cache, uncommitted=uncommitted)
        )
        blocks = jax.tree.map(from_decode, caches, before["blocks"], after["blocks"])
        return _batch({**after, "blocks": blocks})

    parallel, sequential = map(convert, _caches(inference_model), _parts(committed), state[:2])
    return Context(parallel, sequential, _add_axis(state.fast), committed.rule_state)


def decode_axes(state: DecodeState) -> DecodeState:
    """The axis of sequences in every array: after that of layers, over which the model loops."""

    def part(state: PyTree) -> PyTree:
        return {"position": 0, "blocks": _ones(state["blocks"])}

    fast = {
        name: _ones(tree) if name == "suffix" else jax.tree.map(lambda _: 0, tree)
        for name, tree in state.fast.items()
    }
    return DecodeState(part(state.parallel), part(state.sequential), fast)


def _caches(inference_model: InferenceModel) -> tuple[PyTree, PyTree]:
    split = inference_model.chunk_model.split
    return split.parallel_caches, split.sequential_caches


def _by_layer(method: Callable[[Cache], Callable]) -> Callable[..., PyTree]:
    """(cache, states of a stack) -> what the cache's method gives for each of its layers."""
    return lambda cache, *states: jax.vmap(method(cache))(*states)


def _ones(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda _: 1, tree)


def _unbatch(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x[0], tree)


def _add_axis(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.asarray(x)[None], tree)


def _parts(context: Context) -> tuple[PyTree, PyTree]:
    parallel, sequential = (
        {**part, "blocks": _unbatch(part["blocks"])}
        for part in (context.parallel, context.sequential)
    )
    return parallel, sequential


def _batch(part: PyTree) -> PyTree:
    return {**part, "blocks": _add_axis(part["blocks"])}
