"""Sampling a token from logits: temperature, top-k, top-p, min-p, repetition penalty.

Parameters are arrays, so that requests with different parameters are sampled together.
"""

from dataclasses import fields

import flax.struct
import jax
import jax.numpy as jnp

from tttjax.inference.options import Sampling
from tttjax.types import Array


@flax.struct.dataclass
class SamplingParams:
    """`Sampling` of R requests, an array [R] of each field."""

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    repetition_penalty: Array


def stack(requests: list[Sampling]) -> SamplingParams:
    """The parameters of several requests as arrays."""
    columns: dict[str, Array] = {
        field.name: jnp.asarray([getattr(request, field.name) for request in requests])
        for field in fields(Sampling)
    }
    return SamplingParams(**columns)


def penalise(logit_V: Array, has_occurred_V: Array, penalty: Array) -> Array:
    """Logits with the repetition penalty for tokens that occurred, and finite."""
    limit = jnp.finfo(logit_V.dtype).max
    lower_V = jnp.where(logit_V > 0, logit_V / penalty, logit_V * penalty)
    lower_V = jnp.clip(lower_V, -limit, limit)
    return jnp.where(has_occurred_V, lower_V, logit_V)


def filter_logits(logit_V: Array, params: SamplingParams) -> Array:
    """Logits with -inf for tokens that top-k, top-p or min-p exclude.

    The most likely token always stays. Ties at the threshold all stay.
    """
    sorted_V = jnp.sort(logit_V, descending=True)
    p_V = jax.nn.softmax(sorted_V)
    before_V = jnp.cumsum(p_V) - p_V  # total probability of more likely tokens
    rank_V = jnp.arange(logit_V.size)
    is_kept_V = (rank_V < jnp.where(params.top_k > 0, params.top_k, logit_V.size)) & (
        ((params.top_p >= 1) | (before_V < params.top_p)) & (p_V >= params.min_p * p_V[0])
    )
    lowest = jnp.min(jnp.where(is_kept_V | (rank_V == 0), sorted_V, jnp.inf))
    return jnp.where(logit_V >= lowest, logit_V, -jnp.inf)


def sample_token(
    key: Array, logit_V: Array, has_occurred_V: Array, params: SamplingParams
) -> tuple[Array, Array]:
    """(token, its log-probability under the model, before penalty and filters)."""
    penalised_V = penalise(logit_V, has_occurred_V, params.repetition_penalty)
    greedy = jnp.argmax(penalised_V)
    temperature = jnp.where(params.temperature > 0, params.temperature, 1)
    # Relative to the largest logit, so that low temperatures do not overflow.
    sampled = jax.random.categorical(
        key, filter_logits((penalised_V - penalised_V[greedy]) / temperature, params)
    )
    token = jnp.where(params.temperature > 0, sampled, greedy)
    return token, jax.nn.log_softmax(logit_V)[token]
