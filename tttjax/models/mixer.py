"""Sequence mixers: what they all do, and how one is made from its configuration.

Every mixer is a function of any number of tokens of one sequence:

    mixer(x_TD, state, position, form) -> (y_TD, state)

state: None if x_TD is the full sequence. Training also calls with a state, in the loop over chunks.
position: number of tokens before x_TD. form: of attention with a state; other mixers ignore it.

    dense        all scores in memory; any derivative
    blocked      window attention in blocks, for jax.grad
    blocked_jvp  the same, for jax.grad of jax.jvp
    prefill      the first tokens of a sequence, with an empty state
    decode       one token, with a state in the layout of `cache.to_decode_cache`

docs/concepts.md has the table of which attention runs when.
"""

import importlib
from typing import Literal, Protocol, cast

import jax.numpy as jnp
from flax import nnx

from tttjax.config.model import ModelConfig
from tttjax.models.caches import Cache, MixerState
from tttjax.types import Array

State = MixerState | None
AttentionForm = Literal["dense", "blocked", "blocked_jvp", "prefill", "decode"]


class Mixer(Protocol):
    """A layer made by `layer(kind, model, rngs)`, an nnx.Module."""

    @property
    def cache(self) -> Cache:
        """How the state is stored, extended and saved."""

    def init_state(self, max_length: int, dtype: jnp.dtype) -> MixerState:
        """The state before the first token. max_length: capacity in tokens."""

    def __call__(
        self, x_TD: Array, state: State, position: Array, form: AttentionForm = "dense"
    ) -> tuple[Array, State]:
        """x [T, D] -> (y [T, D], the new state), as in the module docstring."""


def make_mixer(kind: str, model: ModelConfig, rngs: nnx.Rngs) -> Mixer:
    """The mixer called `kind`. Raises ValueError for an unknown kind."""
    module, _, name = model.mixer(kind).layer.partition(":")
    return cast(Mixer, getattr(importlib.import_module(module), name)(kind, model, rngs))
