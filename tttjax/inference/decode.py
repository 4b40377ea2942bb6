"""Decoding: one token for each of R sequences, which may be at different positions.

Prefill keeps the window's keys and values as rows in order and shifts them by a copy. Decoding
converts the window to a buffer with free slots and RoPE already applied, and writes one row per
token in place: a token costs one pass over weights and window. Converted back, the context is the
one that prefill would give.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tttjax.inference.prefill import Context, InferenceModel, Weights
from tttjax.models import combine
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
    parts = inference_model.chunk_model.split.to_decode_cache(
        _parts(committed), _parts(current), uncommitted, capacity
    )
    return DecodeState(*parts, _unbatch(current.fast))


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
    parts = split.append_kv((state.parallel, state.sequential), new)
    return DecodeState(*parts, state.fast), logit_RV


def from_decode_state(
    inference_model: InferenceModel, committed: Context, state: DecodeState, uncommitted: Array
) -> Context:
    """The context `uncommitted` tokens after `committed`."""
    states = state.parallel, state.sequential
    parallel, sequential = inference_model.chunk_model.split.from_decode_cache(
        _parts(committed), states, uncommitted
    )
    return Context(
        _batch(parallel), _batch(sequential), _add_axis(state.fast), committed.rule_state
    )


def decode_axes(state: DecodeState) -> DecodeState:
    """The axis of sequences in every array: after that of layers, over which the model loops."""

    def part(state: PyTree) -> PyTree:
        return {"position": 0, "blocks": _ones(state["blocks"])}

    fast = {
        name: _ones(tree) if name == "suffix" else jax.tree.map(lambda _: 0, tree)
        for name, tree in state.fast.items()
    }
    return DecodeState(part(state.parallel), part(state.sequential), fast)


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
