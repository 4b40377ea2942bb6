"""Prefill without test-time training: the losses of the same chunks, from weights that stay W0."""

from collections.abc import Callable
from functools import cached_property, partial

import jax
import jax.numpy as jnp

from tttjax.inference.engine import Engine
from tttjax.inference.prefill import Context, InferenceModel, Weights, prepare_chunks
from tttjax.ttt.chunk import ChunkRecords, Chunks, batch_loss
from tttjax.types import Array, PyTree


def score_chunks(
    inference_model: InferenceModel,
    weights: Weights,
    context: Context,
    token_BT: Array,
    next_B: Array,
    mask_BT: Array | None = None,
    *,
    at_start: bool = False,
) -> tuple[Context, ChunkRecords]:
    """`read_chunks` without its updates and gradients: `grad_norm_NB` is 0."""
    chunk_model = inference_model.chunk_model
    chunks, parallel = prepare_chunks(
        inference_model, weights, context, token_BT, next_B, mask_BT, at_start
    )

    def step(sequential: PyTree, chunk: Chunks) -> tuple[PyTree, ChunkRecords]:
        _, losses = batch_loss(
            chunk_model, weights.sequential, context.fast, sequential, chunk, "blocked"
        )
        mean_nll_B = losses.mean_nll_B
        return losses.state, ChunkRecords(mean_nll_B, losses.nll_BC, jnp.zeros_like(mean_nll_B))

    sequential, records = jax.lax.scan(step, context.sequential, chunks)
    return context._replace(parallel=parallel, sequential=sequential), records


class StaticEngine(Engine):
    """An engine with the weights of another, whose `read` scores chunks and updates nothing.

    Its sessions are those of the other engine, with fast weights that never change.
    """

    def __init__(self, engine: Engine):
        self.inference_model, self.max_length = engine.inference_model, engine.max_length
        self.weights, self._params = engine.weights, engine._params

    @cached_property
    def _read_chunks(self) -> Callable[..., tuple[Context, ChunkRecords]]:
        return jax.jit(partial(score_chunks, self.inference_model), static_argnames="at_start")
