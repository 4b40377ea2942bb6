"""Prefill with a trace of every update: loss before and after it, gradients, drift by layer.

`trace_chunks` is `prefill.read_chunks` with one more forward pass of every chunk through the
sequential part of the model. The two are separate programs, so they may round differently.
"""

from collections.abc import Callable
from functools import cached_property, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tttjax.inference.engine import Engine
from tttjax.inference.prefill import (
    Context,
    InferenceModel,
    UpdateCarry,
    Weights,
    prepare_chunks,
    update_from_chunk,
)
from tttjax.ttt.chunk import Chunks, batch_loss
from tttjax.ttt.layer_norms import sequential_norms
from tttjax.types import Array, PyTree


class UpdateTrace(NamedTuple):
    """Records of N chunks in L layers (`fast_layers`); the first three as in `ChunkRecords`."""

    loss_NB: Array
    nll_NBC: Array
    grad_norm_NB: Array
    loss_after_NB: Array  # of the same chunk, from the same state, with W_i
    grad_norm_NBL: Array  # before the rule clips it
    drift_NBL: Array  # ||W_i - W0||


def trace_chunks(
    inference_model: InferenceModel,
    fast_start: PyTree,
    weights: Weights,
    context: Context,
    token_BT: Array,
    next_B: Array,
    mask_BT: Array | None = None,
    *,
    at_start: bool = False,
) -> tuple[Context, UpdateTrace]:
    """`read_chunks` with a trace of its updates.

    fast_start: W0 of one sequence, [1, ...], laid out by `init_context`.
    """
    chunk_model = inference_model.chunk_model
    zero = jax.tree.map(lambda w: w[0], fast_start)
    chunks, parallel = prepare_chunks(
        inference_model, weights, context, token_BT, next_B, mask_BT, at_start
    )

    by_layer = partial(sequential_norms, chunk_model.split)

    def drift(fast: PyTree) -> Array:
        return by_layer(jax.tree.map(jnp.subtract, fast, zero))

    def step(carry: UpdateCarry, chunk: Chunks) -> tuple[UpdateCarry, UpdateTrace]:
        sequential_before, _, _ = carry
        carry, records, g = update_from_chunk(inference_model, weights, carry, chunk)
        _, fast, _ = carry
        _, after = batch_loss(
            chunk_model, weights.sequential, fast, sequential_before, chunk, "blocked"
        )
        trace = after.mean_nll_B, jax.vmap(by_layer)(g), jax.vmap(drift)(fast)
        return carry, UpdateTrace(*records, *trace)

    carry = context.sequential, context.fast, context.rule_state
    (sequential, fast, rule_state), trace = jax.lax.scan(step, carry, chunks)
    return Context(parallel, sequential, fast, rule_state), trace


def start_norms(engine: Engine) -> Array:
    """||W0|| by layer, [L]."""
    fast = jax.tree.map(lambda w: w[0], engine.start().learned.fast)
    return sequential_norms(engine.inference_model.chunk_model.split, fast)


class TracingEngine(Engine):
    """An engine whose `read` returns `UpdateTrace`, not `ChunkRecords`."""

    @cached_property
    def _read_chunks(self) -> Callable[..., tuple[Context, PyTree]]:
        run = jax.jit(partial(trace_chunks, self.inference_model), static_argnames="at_start")
        return partial(run, self._empty_context.fast)
