"""Reading with a look at every update: the loss before and after it, gradients, drift by layer.

`trace_chunks` reads like `reading.read_chunks` and shows more, for one more forward pass of every
chunk through the upper half of the model. Ordinary reading knows nothing of it; as two programs
they may round differently.
"""

from functools import cached_property, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tttjax.inference.engine import Engine
from tttjax.inference.prefill import Context, InferenceModel, Weights, learn_from, whole_chunks
from tttjax.ttt.chunk import Chunks, batch_loss
from tttjax.ttt.layer_norms import sequential_norms
from tttjax.types import Array, PyTree


class UpdateTrace(NamedTuple):
    """What N chunks showed, in L layers (`fast_layers`); the first three as in `ChunkRecords`."""

    loss_NB: Array
    nll_NBC: Array
    grad_norm_NB: Array
    loss_after_NB: Array  # the same chunk's, read again from the same past with W_i
    grad_norm_NBL: Array  # before the rule clips it
    drift_NBL: Array  # ||W_i - W0||


def trace_chunks(
    reader: InferenceModel,
    fast_start: PyTree,
    weights: Weights,
    context: Context,
    token_BT: Array,
    next_B: Array,
    counted_BT: Array | None = None,
    *,
    at_start: bool = False,
) -> tuple[Context, UpdateTrace]:
    """`read_chunks`, and what its updates did.

    fast_start: W0 of one sequence, [1, ...], as `start` lays it out.
    """
    learner = reader.learner
    zero = jax.tree.map(lambda w: w[0], fast_start)
    chunks, below = whole_chunks(reader, weights, context, token_BT, next_B, counted_BT, at_start)

    by_layer = partial(sequential_norms, learner.cut)

    def moved(fast: PyTree) -> Array:
        return by_layer(jax.tree.map(jnp.subtract, fast, zero))

    def step(carry, chunk: Chunks):
        above_before, _, _ = carry
        carry, records, g = learn_from(reader, weights, carry, chunk)
        _, fast, _ = carry
        loss_after_B, _ = batch_loss(learner, weights.upper, fast, above_before, chunk, "once")
        shown = loss_after_B, jax.vmap(by_layer)(g), jax.vmap(moved)(fast)
        return carry, UpdateTrace(*records, *shown)

    carry = context.above, context.fast, context.rule_state
    (above, fast, rule_state), seen = jax.lax.scan(step, carry, chunks)
    return Context(below, above, fast, rule_state), seen


def start_norms(engine: Engine) -> Array:
    """||W0|| by layer, [L]."""
    fast = jax.tree.map(lambda w: w[0], engine.start().learned.fast)
    return sequential_norms(engine.reader.learner.cut, fast)


class TracingEngine(Engine):
    """An engine whose `read` gives `UpdateTrace` of what it learns from, not `ChunkRecords`."""

    @cached_property
    def _read_chunks(self):
        run = jax.jit(partial(trace_chunks, self.reader), static_argnames="at_start")
        return partial(run, self._fresh.fast)
