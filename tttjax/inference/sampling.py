"""Choosing the next token from logits: temperature, top-k, top-p, min-p, repetition penalty.

Everything is an array, so that requests with different wishes are sampled together.
"""

from dataclasses import dataclass, fields
from typing import Any

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
    """How a request wants its tokens to be chosen.

    temperature: 0 takes the likeliest. top_k: among so many of the likeliest (0: all). top_p: among
    the fewest likeliest that together have this probability (1: all). min_p: among those at least
    this fraction as likely as the likeliest (0: all). repetition_penalty: positive logits of tokens
    that occurred before are divided by it, negative ones multiplied (1: off).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        for field in fields(self):
            value, (low, high) = getattr(self, field.name), LIMITS[field.name]
            if not low <= value <= high:
                above = f"at least {low:g}" if high == FLOAT_MAX else f"from {low:g} to {high}"
                raise UserError(f"{field.name}={value} must be {above}.")
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


def stack(wishes: list[Sampling]) -> SamplingParams:
    """The wishes of several requests together."""
    columns: dict[str, Any] = {
        field.name: jnp.asarray([getattr(wish, field.name) for wish in wishes])
        for field in fields(Sampling)
    }
    return SamplingParams(**columns)


def penalise(logit_V: Array, has_occurred_V: Array, penalty: Array) -> Array:
    """Logits with those of tokens that occurred made less likely, and finite."""
    limit = jnp.finfo(logit_V.dtype).max
    lower_V = jnp.where(logit_V > 0, logit_V / penalty, logit_V * penalty)
    lower_V = jnp.clip(lower_V, -limit, limit)
    return jnp.where(has_occurred_V, lower_V, logit_V)


def filter_logits(logit_V: Array, wish: SamplingParams) -> Array:
    """Logits with those of tokens that top-k, top-p or min-p leave out at -inf.

    At least the likeliest stays. Of equally likely ones at the edge, all stay.
    """
    sorted_V = jnp.sort(logit_V, descending=True)
    p_V = jax.nn.softmax(sorted_V)
    before_V = jnp.cumsum(p_V) - p_V  # probability of the likelier ones
    rank_V = jnp.arange(logit_V.size)
    kept_V = (rank_V < jnp.where(wish.top_k > 0, wish.top_k, logit_V.size)) & (
        ((wish.top_p >= 1) | (before_V < wish.top_p)) & (p_V >= wish.min_p * p_V[0])
    )
    lowest = jnp.min(jnp.where(kept_V | (rank_V == 0), sorted_V, jnp.inf))
    return jnp.where(logit_V >= lowest, logit_V, -jnp.inf)


def choose(
    key: Array, logit_V: Array, has_occurred_V: Array, wish: SamplingParams
) -> tuple[Array, Array]:
    """(token, its log-probability by the model itself: before anything was changed)."""
    penalised_V = penalise(logit_V, has_occurred_V, wish.repetition_penalty)
    likeliest = jnp.argmax(penalised_V)
    warm = jnp.where(wish.temperature > 0, wish.temperature, 1)
    # From the likeliest, so that no temperature, however low, makes it infinite.
    drawn = jax.random.categorical(
        key, filter_logits((penalised_V - penalised_V[likeliest]) / warm, wish)
    )
    token = jnp.where(wish.temperature > 0, drawn, likeliest)
    return token, jax.nn.log_softmax(logit_V)[token]
