"""Writing, a token at a time, for R sequences at places of their own.

Reading keeps a window of keys and values as rows in order, and moves it on by a copy. Writing opens
it: a buffer with room for some more rows, keys turned already, each new row put in its place. So a
token costs one look at weights and window. Closed again, it is what reading would have left.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tttjax.inference.prefill import Context, InferenceModel, Weights
from tttjax.models import combine
from tttjax.parallel.batching import over_sequences
from tttjax.types import Array, PyTree

HALF_AXES = {"position": 0, "blocks": 1}


class DecodeState(NamedTuple):
    """Contexts that are open for writing: of one sequence, or of R with another axis (`axes`)."""

    below: PyTree
    above: PyTree
    fast: PyTree


def to_decode_state(
    reader: InferenceModel, past: Context, now: Context, pending: Array, room: int
) -> DecodeState:
    """For up to `room` tokens after `past`; `now` is `past` after `pending` of them.

    Contexts are of one sequence, [1, ...]; of `past`, states alone are looked at.
    """
    halves = reader.learner.cut.opened(_halves(past), _halves(now), pending, room)
    return DecodeState(*halves, _one(now.fast))


def write(
    reader: InferenceModel, weights: Weights, writing: DecodeState, token_R: Array
) -> tuple[DecodeState, Array]:
    """R contexts after a token each, and the logits [R, V] of the next, in float32 at least."""
    cut = reader.learner.cut

    def one(writing: DecodeState, token: Array) -> tuple[Array, tuple[PyTree, PyTree]]:
        upper = combine(weights.upper, writing.fast)
        halves = writing.below, writing.above
        x_D, new = cut.decode_one(weights.lower, upper, halves, token)
        h_1D = cut.model.final_norm(upper, x_D[None])
        return cut.model.logits(upper, h_1D)[0], new

    every = over_sequences(one, in_axes=(axes(writing), 0), out_axes=(0, (HALF_AXES, HALF_AXES)))
    logit_RV, new = every(writing, token_R)
    halves = cut.committed((writing.below, writing.above), new)
    return DecodeState(*halves, writing.fast), logit_RV


def from_decode_state(
    reader: InferenceModel, past: Context, writing: DecodeState, pending: Array
) -> Context:
    """The context for reading on, `pending` tokens after `past`."""
    states = writing.below, writing.above
    below, above = reader.learner.cut.closed(_halves(past), states, pending)
    return Context(_batch(below), _batch(above), _expand(writing.fast), past.rule_state)


def axes(writing: DecodeState) -> DecodeState:
    """Where many of them have their axis: after that of the layers, over which the model loops."""

    def half(state: PyTree) -> PyTree:
        return {"position": 0, "blocks": _ones(state["blocks"])}

    fast = {
        name: _ones(tree) if name == "suffix" else jax.tree.map(lambda _: 0, tree)
        for name, tree in writing.fast.items()
    }
    return DecodeState(half(writing.below), half(writing.above), fast)


def _ones(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda _: 1, tree)


def _one(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x[0], tree)


def _expand(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.asarray(x)[None], tree)


def _halves(context: Context) -> tuple[PyTree, PyTree]:
    below, above = (
        {**half, "blocks": _one(half["blocks"])} for half in (context.below, context.above)
    )
    return below, above


def _batch(half: PyTree) -> PyTree:
    return {**half, "blocks": _expand(half["blocks"])}
