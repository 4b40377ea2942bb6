"""Sampling a token from logits: temperature, top-k, top-p, min-p, repetition penalty.

Parameters are arrays, so that requests with different parameters are sampled together.
"""

from dataclasses import dataclass, fields

import flax.struct
import jax
import jax.numpy as jnp

from tttjax.config.limits import FLOAT_MAX, FLOAT_WORDS, INT_MAX, fits_float
from tttjax.errors import UserError
from tttjax.types import Array

LIMITS: dict[str, tuple[float, float]] = {
    "temperature": (0.0, FLOAT_MAX),
    "top_k": (0, INT_MAX),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.0, FLOAT_MAX),
}


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of a request.

    temperature: 0 is greedy decoding. top_k: sample from the k most likely tokens (0: all). top_p:
    from the smallest set of most likely tokens with this total probability (1: all). min_p: from
    tokens with at least this fraction of the highest probability (0: all). repetition_penalty:
    positive logits of tokens that occurred before are divided by it, negative ones multiplied (1:
    off).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, (low, high) = getattr(self, field.name), LIMITS[field.name]
            if not low <= value <= high:
                limits = f"at least {low:g}" if high == FLOAT_MAX else f"from {low:g} to {high}"
                raise UserError(f"{field.name}={value} must be {limits}.")
            if not fits_float(value):
                raise UserError(f"{field.name}={value} must be {FLOAT_WORDS}.")
        if self.top_p == 0 or self.repetition_penalty == 0:
            raise UserError(
                f"top_p={self.top_p} and repetition_penalty={self.repetition_penalty} must be "
                "above 0."
            )


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
