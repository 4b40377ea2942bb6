"""A text's losses, token by token, and the fast weights after its updates."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tttjax.inference.prefill import (
    InferenceModel,
    extend,
    init_context,
    logits,
    read_chunks,
    sequence_nll,
    split_weights,
)
from tttjax.types import Array, Batch, Params, PyTree


class TextForward(NamedTuple):
    """A forward pass over the T + 1 tokens of a text, of which N full chunks are learned.

    token_T: the targets. nll_T: their NLL in nats, each before the update it belongs to.
    chunk_loss_N: mean NLL of each full chunk. grad_norm_N: norm of its inner gradient, before the
    rule. fast: the fast weights after the last update.
    """

    token_T: np.ndarray
    nll_T: Array
    chunk_loss_N: Array
    grad_norm_N: Array
    fast: PyTree


def forward_text(
    inference_model: InferenceModel, params: Params, token_T: np.ndarray
) -> TextForward:
    """The forward pass over a text, int [T + 1]. Compiled once for each length."""
    return TextForward(token_T[1:], *_compiled(inference_model)(params, jnp.asarray(token_T)))


@lru_cache(maxsize=4)
def _compiled(
    inference_model: InferenceModel,
) -> Callable[[Params, Array], tuple[Array, Array, Array, PyTree]]:
    return jax.jit(partial(_forward, inference_model))


def _forward(
    inference_model: InferenceModel, params: Params, token_T: Array
) -> tuple[Array, Array, Array, PyTree]:
    size, length = inference_model.chunk_size, token_T.size - 1
    if not size:
        is_target_T = jnp.ones((1, length), bool)
        batch = Batch(token_T[None, :-1], token_T[None, 1:], is_target_T)
        none_N = jnp.zeros(0)
        nll_T = sequence_nll(inference_model, params, batch)[0]
        return nll_T, none_N, none_N, params.fast
    full = length // size * size
    weights = split_weights(inference_model, params)
    context = init_context(inference_model, params, 1, length)
    records, nll = None, []
    if full:
        next_1 = token_T[full][None]
        context, records = read_chunks(
            inference_model, weights, context, token_T[None, :full], next_1, at_start=True
        )
        nll.append(records.nll_NBC.reshape(-1))
    if full < length:
        _, h_1TD = extend(
            inference_model, weights, context, token_T[None, full:-1], at_start=not full
        )
        logit_TV = logits(inference_model, weights, context, h_1TD)[0]
        logprob_TV = jax.nn.log_softmax(logit_TV)
        nll.append(-jnp.take_along_axis(logprob_TV, token_T[full + 1 :, None], axis=1)[:, 0])
    fast = inference_model.chunk_model.split.join(jax.tree.map(lambda w: w[0], context.fast))
    none_N = jnp.zeros(0)
    loss_N, norm_N = (
        (records.loss_NB[:, 0], records.grad_norm_NB[:, 0]) if records else (none_N, none_N)
    )
    return jnp.concatenate(nll), loss_N, norm_N, fast
