"""A text's losses, token by token, and the fast weights after its updates."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tttjax.inference.prefill import InferenceModel, read_sequences
from tttjax.types import Array, Batch, Params, PyTree


class TextForward(NamedTuple):
    """A forward pass over the T + 1 tokens of a text, of which N full chunks are learned.

    token_T: the targets. nll_T: their NLL in nats, each before the update it belongs to.
    chunk_loss_N: mean NLL of each full chunk. grad_norm_N: norm of its inner gradient, before the
    rule. fast: the fast weights after the last update.
    """

    token_T: Array
    nll_T: Array
    chunk_loss_N: Array
    grad_norm_N: Array
    fast: PyTree


@partial(jax.jit, static_argnums=0)
def forward_text(inference_model: InferenceModel, params: Params, token_T: Array) -> TextForward:
    """The forward pass over a text, int [T + 1]. Compiled once for each length."""
    inputs_1T, targets_1T = token_T[None, :-1], token_T[None, 1:]
    batch = Batch(inputs_1T, targets_1T, jnp.ones(inputs_1T.shape, bool))
    nll_1T, records, context = read_sequences(inference_model, params, batch)
    if records is None:
        none_N = jnp.zeros(0, nll_1T.dtype)
        return TextForward(token_T[1:], nll_1T[0], none_N, none_N, params.fast)
    fast = inference_model.chunk_model.split.join(jax.tree.map(lambda w: w[0], context.fast))
    return TextForward(
        token_T[1:], nll_1T[0], records.loss_NB[:, 0], records.grad_norm_NB[:, 0], fast
    )
